"""Prompts become ids that the model knows, or are refused; and those that nobody wants any more are let go."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from inference_worker.default_model import CHECKPOINT
from inference_worker.errors import InvalidField
from inference_worker.prompt import PromptReader
from inference_worker.tokenizer import Tokenizer
from protos.sluice.v1 import generation_pb2 as pb
from tests.patience import PATIENCE


@contextmanager
def prompt_reader(vocabulary_size: int | None = None) -> Iterator[PromptReader]:
    tokenizer = Tokenizer.load(str(CHECKPOINT))
    reader = PromptReader(tokenizer, vocabulary_size or tokenizer.vocabulary_size)
    try:
        yield reader
    finally:
        reader.close()


@pytest.mark.parametrize("kind", ["text", "chat"])
async def test_a_token_that_the_model_does_not_know_is_refused(kind: str) -> None:
    """It would read past the end of the embedding: a lost GPU, or memory of something else."""
    text = "What is streaming?"
    prompt = pb.Prompt(text=text)
    if kind == "chat":
        prompt = pb.Prompt(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content=text)]))
    with prompt_reader() as knows_all, prompt_reader(280) as knows_few:
        highest = max(await knows_all.read(prompt, list))
        assert highest >= 280
        with pytest.raises(InvalidField, match=f"token {highest}, outside the model") as refusal:
            await knows_few.read(prompt, list)
        assert f"prompt.{kind}" in str(refusal.value)


async def test_a_prompt_that_is_given_up_in_the_queue_is_held_by_nobody() -> None:
    is_free = threading.Event()

    def wait(ids: list[int]) -> list[int]:
        assert is_free.wait(PATIENCE)
        return ids

    def count(ids: list[int]) -> int:
        return len(ids)

    prompt = pb.Prompt(text="What is streaming?")
    with prompt_reader() as reader:
        try:
            first, second = reader.read(prompt, wait), reader.read(prompt, count)
            held = weakref.ref(count)
            del count
            assert held() is not None
            second.cancel()
            await asyncio.sleep(0)
            assert held() is None, "though its turn has not come"
        finally:
            is_free.set()
        assert await reader.read(prompt, list) == await first
