"""One line a request, and nothing in it that was not asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
import structlog

from inference_worker.request_log import configure_logging, get_logger
from protos.sluice.v1 import generation_pb2 as pb
from tests.worker.served_worker import generate_request, read_until, refusal_of, serve_script

SECRET = "a secret prompt"


@pytest.fixture(autouse=True)
def _json_lines(capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
    configure_logging("info")  # after capsys, so that it writes to what that captures
    yield
    structlog.reset_defaults()


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """The request lines; every line of the log is JSON."""
    parsed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return [line for line in parsed if line["event"] == "request"]


async def test_a_finished_request(capsys: pytest.CaptureFixture[str]) -> None:
    async with serve_script(model_name="mine") as worker:
        await worker.generate(text=SECRET, request_id="r1", n=2, max_tokens=3)
        output = capsys.readouterr().out
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

        late = worker.stub.Generate(generate_request(max_tokens=1000), timeout=0.3)
        assert (await refusal_of(late)).code == grpc.StatusCode.DEADLINE_EXCEEDED
        await worker.wait_idle()
        (line,) = lines(capsys)
        assert line["status"] == "DEADLINE_EXCEEDED"

        await refusal_of(worker.stub.Generate(generate_request(sampling=pb.Sampling(seed=1))))
        await worker.wait_idle()
        (line,) = lines(capsys)
        assert line["status"] == "INTERNAL"


async def test_a_bad_request_id_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    async with serve_script() as worker:
        await refusal_of(worker.stub.Generate(generate_request(request_id="r" * 2_000_000)))
        (line,) = lines(capsys)
    assert (line["status"], line["field"]) == ("INVALID_ARGUMENT", "request_id")
    assert line["request_id"] == "r" * 128


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
        output = capsys.readouterr().out
    assert len(output.splitlines()) == 2
    assert output.isascii()


def test_lines_of_libraries_are_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    import logging

    logging.getLogger("some.library").warning("odd\nthing")
    get_logger().debug("not written")
    line = json.loads(capsys.readouterr().out)
    assert (line["event"], line["level"]) == ("odd\nthing", "warning")
