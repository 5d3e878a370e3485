"""The prompt tokens that the prefix cache had are told wherever a prompt is counted: exactly its full blocks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from protos.sluice.v1 import generation_pb2 as pb
from tests.integration.stack import PATIENCE, Stack

BLOCK = 16  # tokens, the worker's default


def words(number: int) -> str:
    """A prompt that no other test sends, longer than two blocks."""
    return " ".join(f"{number} and {i} are numbers" for i in range(12))


def expected(prompt_tokens: int) -> int:
    """All full blocks, less the one in which the last token lies: a step must compute that."""
    cached = (prompt_tokens - 1) // BLOCK * BLOCK
    assert cached >= 2 * BLOCK
    return cached


def events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.text.splitlines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def test_grpc_tells_in_started_and_in_usage(stack: Stack) -> None:
    request = pb.GenerateRequest(
        prompt=pb.Prompt(text=words(71)), stopping=pb.Stopping(max_tokens=2)
    )
    found: list[tuple[int, int, int]] = []
    for _ in range(2):
        messages = list(stack.stub.Generate(request, timeout=PATIENCE))
        started, usage = messages[0].started, messages[-1].finished.usage
        found.append((started.prompt_tokens, started.cached_tokens, usage.cached_tokens))
    (prompt_tokens, *first), (_, *second) = found
    assert first == [0, 0]
    assert second == [expected(prompt_tokens)] * 2


def test_the_native_stream_tells_in_started_and_in_usage(stack: Stack) -> None:
    body = {"prompt": words(72), "max_tokens": 2}
    found: list[list[dict[str, Any]]] = []
    for _ in range(2):
        response = httpx.post(f"{stack.url}/v1/streams", json=body, timeout=PATIENCE)
        assert response.status_code == 200, response.text
        found.append(list(events(response)))
    for stream, is_second in zip(found, (False, True), strict=True):
        cached = expected(stream[0]["prompt_tokens"]) if is_second else 0
        assert stream[0]["cached_tokens"] == cached
        assert stream[-1]["usage"]["cached_tokens"] == cached


@pytest.mark.parametrize("streams", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("route", ["chat/completions", "completions"])
def test_openai_tells_in_the_details_of_usage(stack: Stack, route: str, streams: bool) -> None:
    text = words(73 + 2 * streams + len(route))
    prompt: dict[str, Any] = (
        {"messages": [{"role": "user", "content": text}]} if "chat" in route else {"prompt": text}
    )
    body = {"model": "default", "max_tokens": 2, "stream": streams, **prompt}
    if streams:
        body["stream_options"] = {"include_usage": True}
    usages: list[dict[str, Any]] = []
    for _ in range(2):
        response = httpx.post(f"{stack.url}/v1/{route}", json=body, timeout=PATIENCE)
        assert response.status_code == 200, response.text
        last = list(events(response))[-1] if streams else response.json()
        usages.append(last["usage"])
    cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]
    assert cached == [0, expected(usages[0]["prompt_tokens"])]
