"""Deadlines over gRPC: refused in advance, and expired while tokenizing, in the queue, in prefill and in decode."""

from __future__ import annotations

import threading
import time
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2

from inference_worker.engine.engine import Engine
from inference_worker.engine.request import Request
from protos.sluice.v1 import generation_pb2 as pb
from tests.worker.served_worker import (
    Call,
    ServedWorker,
    generate_request,
    kinds,
    read_rest,
    read_until,
    reasons,
    refusal_of,
    serve_script,
    texts,
)


def within(seconds: float, **fields: Any) -> pb.GenerateRequest:
    """A request with this timeout."""
    timeout = duration_pb2.Duration()
    timeout.FromNanoseconds(round(seconds * 1e9))
    return generate_request(timeout=timeout, **fields)


async def endless(worker: ServedWorker) -> Call:
    """A call that takes the only slot for as long as the test lasts."""
    call = worker.stub.Generate(generate_request(max_tokens=4000))
    await read_until(call, "delta")
    return call


async def test_one_that_expires_in_the_queue_never_reaches_prefill() -> None:
    async with serve_script(max_running=1, step_milliseconds=5) as worker:
        running = await endless(worker)
        call = worker.stub.Generate(within(1.5, ids=[5] * 100))
        messages = await read_until(call, "started")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            messages += await read_rest(call)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert kinds(messages) == ["started"]
        load = await worker.wait_for(running=1, waiting=0, waiting_tokens=0, requests=1)
        assert load.waiting_blocks == 0
        running.cancel()


async def test_one_that_expires_in_prefill_is_deadline_exceeded() -> None:
    # a prefill of two seconds
    async with serve_script(max_running=1, max_batch_tokens=1, step_milliseconds=10) as worker:
        refusal = await refusal_of(worker.stub.Generate(within(0.3, ids=[5] * 200)))
        assert refusal.code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert refusal.info.reason == "DEADLINE_PASSED"


async def test_one_that_expires_in_decode_ends_with_what_it_has() -> None:
    async with serve_script(step_milliseconds=10) as worker:
        call = worker.stub.Generate(within(1.5, max_tokens=4000, n=2), timeout=60)
        messages = await read_rest(call)
        assert await call.code() is grpc.StatusCode.OK
        assert reasons(messages) == ["DEADLINE", "DEADLINE"]
        assert messages[-1].finished.usage.completion_tokens == sum(
            message.delta.token_count for message in messages
        )
        assert texts(messages)[0]
        assert texts(messages)[1]


async def test_a_call_without_a_timeout_ends_before_its_own_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[Request] = []
    add = Engine.add

    def note(engine: Engine, request: Request) -> None:
        given.append(request)
        add(engine, request)

    monkeypatch.setattr(Engine, "add", note)
    async with serve_script() as worker:
        for seconds, margin in ((2000.0, 0.5), (4.0, 0.4)):
            began = time.monotonic()
            await read_rest(worker.stub.Generate(generate_request(), timeout=seconds))
            (request,) = given
            given.clear()
            assert request.deadline is not None
            # gRPC may round the time that it tells up, by a little
            assert (
                seconds - 2 * margin < request.deadline - began < time.monotonic() - began + seconds
            )
        await read_rest(worker.stub.Generate(generate_request()))
        assert given[0].deadline is None


async def test_one_that_would_miss_its_deadline_is_refused_at_once() -> None:
    async with serve_script(max_running=1, step_milliseconds=5) as worker:
        running = await endless(worker)
        # One leaves the slot, another takes it: from now on it is known how long that takes.
        before = worker.stub.Generate(generate_request(max_tokens=4000))
        await read_until(before, "started")
        await worker.wait_for(waiting=1)
        running.cancel()
        await read_until(before, "delta")
        waiting = worker.stub.Generate(generate_request(max_tokens=4000))
        await read_until(waiting, "started")
        admission = worker.worker._admission
        assert admission.forecast.seconds_per_request > 0
        admission.forecast._request._seconds = 60.0  # as if it had taken a minute
        refusal = await refusal_of(worker.stub.Generate(within(100)))
        assert refusal.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert refusal.info.reason == "WOULD_MISS_DEADLINE"
        assert refusal.retry_seconds == 5
        patient = worker.stub.Generate(within(150))  # two have to leave first
        await read_until(patient, "started")
        for call in (before, waiting, patient):
            call.cancel()


async def test_the_deadline_of_a_prompt_that_is_still_being_tokenized(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with serve_script() as worker:
        go_on = threading.Event()
        encode = worker.served.tokenizer.encode

        def wait_and_encode(text: str, *, special_tokens: bool) -> list[int]:
            go_on.wait(60)
            return encode(text, special_tokens=special_tokens)

        monkeypatch.setattr(worker.served.tokenizer, "encode", wait_and_encode)
        refusal = await refusal_of(worker.stub.Generate(within(0.1)))
        go_on.set()
        assert refusal.code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert refusal.info.reason == "DEADLINE_PASSED"
        assert (await worker.load()).steps == 0
