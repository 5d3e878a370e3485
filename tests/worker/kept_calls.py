"""Calls whose streams are kept for whoever comes back, and what is read of them."""

from __future__ import annotations

import copy
from typing import Any

from google.protobuf import duration_pb2

from protos.sluice.v1 import generation_pb2 as pb
from tests.worker.served_worker import (
    Call,
    ServedWorker,
    generate_request,
)
from tests.worker.stream_record import ChoiceRecord, StreamRecord

ENDLESS: dict[str, Any] = {"max_tokens": 4000}
SLOW: dict[str, Any] = {"step_milliseconds": 2}


def window(seconds: float = 60) -> duration_pb2.Duration:
    duration = duration_pb2.Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration


def kept(worker: ServedWorker, seconds: float = 60, **fields: Any) -> Call:
    request = generate_request(resume_window=window(seconds), **fields)
    return worker.stub.Generate(request)


def resume(
    worker: ServedWorker, resume_id: str, after: int | None = None, key: str = "", **fields: Any
) -> Call:
    message = pb.Resume(resume_id=resume_id, after_sequence_number=after, **fields)
    request = pb.GenerateRequest(resume=message)
    if key:
        request.caller.key_id = key
    return worker.stub.Generate(request)


async def begin(call: Call) -> pb.Started:
    message = await call.read()
    assert isinstance(message, pb.GenerateResponse)
    assert message.started.resume_id
    return message.started


async def end(worker: ServedWorker, started: pb.Started) -> None:
    await worker.stub.Abort(pb.AbortRequest(request_id=started.request_id))
    await worker.wait_idle()


def numbers(messages: list[pb.GenerateResponse]) -> list[int]:
    return [message.sequence_number for message in messages]


def untimed(record: StreamRecord) -> dict[int, ChoiceRecord]:
    choices = copy.deepcopy(record.choices)
    for choice in choices.values():
        assert choice.finished is not None
        choice.finished.ClearField("timings")
    return choices
