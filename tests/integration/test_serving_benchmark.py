"""The load client against real servers: what it counts is what was sent. No figure of time is judged here."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from typing import Any

import pytest

from benchmarks.served_answer import Objective, read
from benchmarks.sse_client import Answer, Endpoint, exchange
from tests.integration.stack import ROOT, Stack


def measure(*flags: str) -> list[dict[str, Any]]:
    """Run it as a user does; its figures, one object for each load and server."""
    command = [sys.executable, "-m", "benchmarks.serving", "--repetitions=1", "--json=-", *flags]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    figures: list[dict[str, Any]] = json.loads(result.stdout)
    return figures


def test_both_loops_count_every_token_of_every_server(stack: Stack) -> None:
    flags = ("--concurrency=3", "--rate=50", "--requests=5", "--max-tokens=9")
    ignore_eos = '--extra={"ignore_eos": true}'
    peers = (f"--url={stack.url}/v1", f"--url={stack.url.replace('127.0.0.1', 'localhost')}/v1")
    found = measure(*peers, *flags, ignore_eos, "--slo-ttft-ms=60000", "--slo-itl-ms=60000")
    assert [(f["readers"], f["rate"]) for f in found] == [(3, None)] * 2 + [(None, 50.0)] * 2
    for figures in found:
        [repetition] = figures["repetitions"]
        assert repetition["requests"] == 5
        assert repetition["tokens"] == 5 * 9
        assert repetition["tokens_counted_by"] == "usage"
        assert repetition["failures"] == {}
        assert repetition["goodput_per_second"] > 0
        assert 0 < repetition["first_token_ms"]["50"] <= repetition["first_token_ms"]["99"]


def test_refusals_and_absent_servers_are_counted_and_never_measured(stack: Stack) -> None:
    absent = "http://127.0.0.1:9/v1"
    flags = ("--model=nonsense", "--api=completions", "--concurrency=2", "--requests=4")
    refused, missing = measure(f"--url={stack.url}/v1", f"--url={absent}", *flags)
    [repetition] = refused["repetitions"]
    assert repetition["failures"] == {"status 404": 4}
    assert repetition["tokens_per_second"] == repetition["goodput_per_second"] == 0
    [repetition] = missing["repetitions"]
    assert repetition["failures"] == {"no connection": 4}


def test_the_time_to_a_connection_counts(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    connecting_at: list[float] = []

    async def ask() -> Answer:
        loop = asyncio.get_running_loop()
        connect = loop.create_connection

        async def note(*arguments: Any, **named: Any) -> Any:
            connecting_at.append(time.perf_counter())
            return await connect(*arguments, **named)

        monkeypatch.setattr(loop, "create_connection", note)
        endpoint = Endpoint(f"{stack.url}/v1")
        return await exchange(endpoint, endpoint.request("GET", "/models", None), 60)

    answer = asyncio.run(ask())
    assert answer.failure is None
    assert answer.began_at <= connecting_at[0]


def answer_of(*data: str, failure: str | None = None) -> Answer:
    events = [(1.0 + 0.1 * i, text.encode()) for i, text in enumerate(data)]
    return Answer(began_at=0.9, ended_at=3.0, status=200, failure=failure, events=events)


def delta(text: str) -> str:
    return json.dumps({"choices": [{"delta": {"content": text}}]})


def test_events_are_counted_where_the_server_does_not_count() -> None:
    found = read(answer_of(delta(""), delta("a"), delta("b"), "[DONE]"))
    assert (found.tokens, found.is_counted, found.text) == (2, False, "ab")
    assert found.time_to_first_token == pytest.approx(0.2)
    assert found.gaps == pytest.approx([0.1])
    usage = {"completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 5}}
    told = read(answer_of(delta("a"), json.dumps({"choices": [], "usage": usage}), "[DONE]"))
    assert (told.tokens, told.is_counted, told.cached_tokens) == (7, True, 5)


def test_an_answer_that_is_not_whole_meets_no_objective() -> None:
    content = Objective(first_token=10, gap=10)
    assert read(answer_of(delta("a"))).meets(content)
    assert not read(answer_of(delta("a"))).meets(Objective(first_token=0.01))
    for broken in (
        answer_of(delta("a"), failure="cut off"),
        answer_of(delta("a"), '{"error": {"message": "x"}}'),
        answer_of("{"),
        answer_of(),
    ):
        assert not read(broken).meets(content)


def test_a_server_that_is_not_there_is_named() -> None:
    command = [sys.executable, "-m", "benchmarks.serving", "--url=http://127.0.0.1:9/v1"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "127.0.0.1:9" in result.stderr
    assert "Traceback" not in result.stderr
