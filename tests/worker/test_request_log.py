"""One line a request, and nothing in it that was not asked for."""

from __future__ import annotations

import asyncio
import io
import json
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from google.protobuf import duration_pb2

from inference_worker import request_log
from inference_worker.request_log import configure_logging, flush_log, get_logger
from protos.sluice.v1 import generation_pb2 as pb
from tests.patience import PATIENCE
from tests.worker.served_worker import (
    LONG_STREAMS,
    generate_request,
    read_until,
    refusal_of,
    serve_script,
    stalled_call,
)

SECRET = "a secret prompt"


@pytest.fixture(autouse=True)
def _json_lines(capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
    configure_logging("info")
    yield
    flush_log(5)  # into what capsys captures
    structlog.reset_defaults()


def output_of(capsys: pytest.CaptureFixture[str]) -> str:
    """What the log wrote since the last time."""
    assert flush_log(PATIENCE)
    return capsys.readouterr().out


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """The request lines; every line of the log is JSON."""
    parsed = [json.loads(line) for line in output_of(capsys).splitlines()]
    return [line for line in parsed if line["event"] == "request"]


async def test_a_finished_request(capsys: pytest.CaptureFixture[str]) -> None:
    async with serve_script(model_name="mine") as worker:
        await worker.generate(text=SECRET, request_id="r1", n=2, max_tokens=3)
        output = output_of(capsys)
        assert SECRET not in output
        line = json.loads(output)
    assert line["request_id"] == "r1"
    assert line["model"] == "mine"
    assert (line["status"], line["finish_reasons"]) == ("OK", ["LENGTH", "LENGTH"])
    assert line["prompt_tokens"] > 0
    assert (line["completion_tokens"], line["cached_tokens"]) == (6, 0)
    times = ["queued_seconds", "prefill_seconds", "decode_seconds", "ttft_seconds"]
    assert all(0 <= line[name] <= line["total_seconds"] for name in times)


async def test_refused_cancelled_late_and_failed_requests(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with serve_script(step_milliseconds=20, failing_seed=1) as worker:
        await refusal_of(worker.stub.Generate(generate_request(n=0)))
        (line,) = lines(capsys)
        assert (line["status"], line["field"], line["phase"]) == (
            "INVALID_ARGUMENT",
            "n",
            "admission",
        )

        call = worker.stub.Generate(generate_request(max_tokens=1000))
        await read_until(call, "delta")
        call.cancel()
        await worker.wait_idle()
        (line,) = lines(capsys)
        assert (line["status"], line["phase"]) == ("CANCELLED", "decode")
        assert line["completion_tokens"] > 0

        # four steps of 20 ms before the first token
        late = generate_request(ids=[5] * 2000, timeout=duration_pb2.Duration(nanos=50_000_000))
        assert (await refusal_of(worker.stub.Generate(late))).info.reason == "DEADLINE_PASSED"
        await worker.wait_idle()
        (line,) = lines(capsys)
        assert (line["status"], line["reason"]) == ("DEADLINE_EXCEEDED", "DEADLINE_PASSED")

        await refusal_of(worker.stub.Generate(generate_request(sampling=pb.Sampling(seed=1))))
        await worker.wait_idle()
        (line,) = lines(capsys)
        assert line["status"] == "INTERNAL"


async def test_a_stream_that_is_not_read(capsys: pytest.CaptureFixture[str]) -> None:
    async with (
        serve_script(**LONG_STREAMS, send_timeout_seconds=0.2) as worker,
        stalled_call(worker),
    ):
        await worker.wait_for(requests=0)
        (line,) = lines(capsys)
    assert (line["status"], line["reason"]) == ("ABORTED", "SLOW_READER")


@pytest.mark.parametrize("bad", ["r" * 2_000_000, SECRET])
async def test_a_bad_request_id_is_not_written(
    capsys: pytest.CaptureFixture[str], bad: str
) -> None:
    async with serve_script() as worker:
        await refusal_of(worker.stub.Generate(generate_request(request_id=bad)))
        (line,) = lines(capsys)
    assert (line["status"], line["field"]) == ("INVALID_ARGUMENT", "request_id")
    assert line["request_id"] is None


async def test_prompts_and_completions_are_written_if_asked(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with serve_script(log_prompts=True, text="Yes. ") as worker:
        await worker.generate(text=SECRET, max_tokens=2)
        (line,) = lines(capsys)
    assert line["prompt"] == {"text": SECRET}
    assert line["completions"][0].startswith("Yes")


async def test_nobody_can_forge_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    evil = 'x"}\n{"event": "request", "status": "OK"}\r\u2028\u0085'
    async with serve_script(log_prompts=True) as worker:
        await worker.generate(text=evil)
        await refusal_of(worker.stub.Generate(generate_request(request_id=evil)))
        output = output_of(capsys)
    assert len(output.splitlines()) == 2
    assert output.isascii()


def test_lines_of_libraries_are_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    import logging

    library = logging.getLogger("some.library")
    library.info("not written")
    library.warning("odd\nthing")
    ours = logging.getLogger("inference_worker.model.loader")
    ours.debug("not written")
    ours.info("steps run in %s", "C")
    get_logger().debug("not written")
    written = [json.loads(line) for line in output_of(capsys).splitlines()]
    assert [(line["event"], line["level"]) for line in written] == [
        ("odd\nthing", "warning"),
        ("steps run in C", "info"),
    ]


class Blocked(io.StringIO):
    """A stdout that nobody reads, until it is released."""

    def __init__(self) -> None:
        super().__init__()
        self.is_released = threading.Event()

    def flush(self) -> None:
        self.is_released.wait(2 * PATIENCE)


async def test_a_log_that_nobody_reads_holds_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = Blocked()
    monkeypatch.setattr(sys, "stdout", blocked)
    monkeypatch.setattr(request_log, "_MAX_PENDING_CHARS", 2000)
    try:
        async with serve_script() as worker:
            for _ in range(20):
                await asyncio.wait_for(worker.generate(), PATIENCE)
        assert not flush_log(0.01)
    finally:
        blocked.is_released.set()
    assert flush_log(PATIENCE)
    parsed = [json.loads(line) for line in blocked.getvalue().splitlines()]
    written = [line for line in parsed if line["event"] == "request"]
    assert 1 <= len(written) < 20
    dropped = parsed[-1]
    assert (dropped["event"], dropped["level"]) == ("log lines dropped", "warning")
    assert dropped["lines"] == 20 - len(written)
    assert len(parsed) == len(written) + 1
