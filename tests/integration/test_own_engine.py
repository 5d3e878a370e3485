"""An engine of the user's own in a real worker, behind a real edge: the example, and one that tells what reaches it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from protos.sluice.v1 import generation_pb2 as pb
from tests.integration.stack import PATIENCE, Stack, running_stack

QUESTION: Any = [{"role": "user", "content": "Count to 10"}]


@pytest.fixture(scope="module")
def example() -> Iterator[Stack]:
    with running_stack({"engine": "examples.own_engine:Plain"}) as stack:
        yield stack


def test_the_example_says_what_the_workers_own_engine_says(
    example: Stack, pinned: list[dict[str, Any]]
) -> None:
    client = openai.OpenAI(base_url=f"{example.url}/v1", api_key="none", max_retries=0)
    for conversation in pinned[:8]:
        chat = pb.Chat(messages=[pb.ChatMessage(**m) for m in conversation["messages"]])
        request = pb.GenerateRequest(prompt=pb.Prompt(chat=chat))
        messages = list(example.stub.Generate(request))
        assert "".join(m.delta.text for m in messages) == conversation["answer"]
        usage = messages[-1].finished.usage
        chunks = client.chat.completions.create(
            model="default",
            messages=conversation["messages"],
            stream=True,
            stream_options={"include_usage": True},
        )
        text, counted = "", None
        for chunk in chunks:
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
            counted = chunk.usage or counted
        assert text == conversation["answer"]
        assert counted is not None
        assert counted.completion_tokens == usage.completion_tokens > 1
        assert counted.prompt_tokens == usage.prompt_tokens > 1


def test_the_example_draws_by_seed_and_refuses_what_it_cannot(example: Stack) -> None:
    client = openai.OpenAI(base_url=f"{example.url}/v1", api_key="none", max_retries=0)
    options: dict[str, Any] = {"model": "default", "messages": QUESTION, "max_tokens": 16}

    def draw(seed: int) -> str | None:
        answer = client.chat.completions.create(temperature=5, seed=seed, **options)
        text: str | None = answer.choices[0].message.content
        return text

    assert draw(1) == draw(1) != draw(2)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(top_p=0.5, **options)
    assert caught.value.param == "top_p"


def test_a_reader_that_leaves_the_edge_ends_the_engines_work(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    flags = {"engine": "tests.worker.own_engines:Watched", "model_name": log}
    with running_stack(flags) as stack:
        url = f"{stack.url}/v1/streams"
        parameters = {"prompt": "slow"}
        with httpx.stream("POST", url, json=parameters, timeout=PATIENCE) as response:
            assert response.status_code == 200
            assert "event: delta" in response.iter_lines()
        deadline = time.monotonic() + PATIENCE
        while not log.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        (line,) = log.read_text().splitlines()
        assert line.startswith("abort ")
        stack.wait_idle()
    assert log.read_text().splitlines()[1:] == ["ended 1", "close"]
