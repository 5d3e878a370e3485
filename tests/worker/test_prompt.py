"""Prompts become ids that the model knows, or are refused."""

from __future__ import annotations

import pytest

from inference_worker.default_model import CHECKPOINT
from inference_worker.errors import InvalidField
from inference_worker.prompt import PromptReader
from inference_worker.tokenizer import Tokenizer
from protos.sluice.v1 import generation_pb2 as pb


@pytest.mark.parametrize("kind", ["text", "chat"])
async def test_a_token_that_the_model_does_not_know_is_refused(kind: str) -> None:
    """It would read past the end of the embedding: a lost GPU, or memory of something else."""
    text = "What is streaming?"
    prompt = pb.Prompt(text=text)
    if kind == "chat":
        prompt = pb.Prompt(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content=text)]))
    tokenizer = Tokenizer.load(str(CHECKPOINT))
    knows_all, knows_few = (
        PromptReader(tokenizer, tokenizer.vocabulary_size),
        PromptReader(tokenizer, 280),
    )
    try:
        highest = max(await knows_all.read(prompt, list))
        assert highest >= 280
        with pytest.raises(InvalidField, match=f"token {highest}, outside the model") as refusal:
            await knows_few.read(prompt, list)
        assert f"prompt.{kind}" in str(refusal.value)
    finally:
        knows_all.close()
        knows_few.close()
