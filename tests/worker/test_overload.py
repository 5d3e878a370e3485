"""Beyond the limits a request is refused at once, with a time to come back."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from protos.sluice.v1 import generation_pb2 as pb
from tests.worker.served_worker import generate_request, read_until, refusal_of, serve_script


async def test_slots_then_queue_then_refusal() -> None:
    async with serve_script(max_running=2, max_waiting=2, step_milliseconds=5) as worker:
        calls = []
        for kind in ("delta", "delta", "started", "started"):
            calls.append(worker.stub.Generate(generate_request(max_tokens=1000)))
            await read_until(calls[-1], kind)
        load = await worker.wait_for(running=2, waiting=2, requests=4)
        assert (load.max_running, load.max_waiting) == (2, 2)
        refusal = await refusal_of(worker.stub.Generate(generate_request()))
        assert refusal.code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert refusal.info.reason == "QUEUE_FULL"
        assert 1 <= refusal.retry_seconds <= 5
        assert 1 <= int(refusal.info.metadata["hold_ms"]) <= 50
        calls.pop().cancel()  # a place in the queue is free again
        await worker.wait_for(requests=3)
        calls.append(worker.stub.Generate(generate_request()))
        await read_until(calls[-1], "started")
        for call in calls:
            call.cancel()


async def test_the_token_budget() -> None:
    settings = {"max_running": 1, "max_waiting_tokens": 100, "step_milliseconds": 5}
    async with serve_script(**settings) as worker:
        running = worker.stub.Generate(generate_request(ids=[5] * 500, max_tokens=1000))
        await read_until(running, "delta")
        waiting = worker.stub.Generate(generate_request(ids=[5] * 60))
        await read_until(waiting, "started")
        await worker.wait_for(waiting=1, waiting_tokens=60)
        refusal = await refusal_of(worker.stub.Generate(generate_request(ids=[5] * 41)))
        assert refusal.code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert refusal.info.reason == "TOKEN_BUDGET"
        assert 1 <= refusal.retry_seconds <= 5
        fits = worker.stub.Generate(generate_request(ids=[5] * 40))
        await read_until(fits, "started")
        for call in (running, waiting, fits):
            call.cancel()


async def test_the_budget_of_kv_blocks() -> None:
    settings = {"max_running": 1, "max_waiting_kv": 1, "blocks": 8, "step_milliseconds": 100}
    async with serve_script(**settings, block_size=16) as worker:
        running = worker.stub.Generate(generate_request(ids=[5] * 16, max_tokens=100))
        await read_until(running, "delta")
        waiting = worker.stub.Generate(generate_request(ids=[5] * 64))
        await read_until(waiting, "started")
        refusal = await refusal_of(worker.stub.Generate(generate_request(ids=[5] * 80)))
        assert refusal.info.reason == "TOKEN_BUDGET"
        assert "blocks" in refusal.message
        for call in (running, waiting):
            call.cancel()


async def test_the_waiting_tokens_are_those_that_the_limit_counts() -> None:
    async with serve_script(max_running=1, step_milliseconds=5) as worker:
        running = worker.stub.Generate(generate_request(ids=[5] * 60, n=3, max_tokens=1000))
        await read_until(running, "delta")
        load = await worker.wait_for(running=1, waiting=2)  # choices of a request that runs
        assert load.waiting_tokens == 0
        waiting = worker.stub.Generate(generate_request(ids=[5] * 40))
        await read_until(waiting, "started")
        assert (await worker.wait_for(waiting=3)).waiting_tokens == 40
        for call in (running, waiting):
            call.cancel()


async def test_a_large_prompt_is_refused_before_it_is_tokenized(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {"max_running": 1, "max_waiting": 0, "context_length": 2**17}
    async with serve_script(**settings, step_milliseconds=5) as worker:
        running = worker.stub.Generate(generate_request(max_tokens=1000))
        await read_until(running, "delta")
        tokenized: list[str] = []
        monkeypatch.setattr(worker.served.tokenizer, "encode", tokenized.append)
        refusals = await asyncio.gather(
            *(
                refusal_of(worker.stub.Generate(generate_request(text="x" * 200_000)))
                for _ in range(5)
            )
        )
        assert {refusal.code for refusal in refusals} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert not tokenized
        running.cancel()


async def test_a_burst_beyond_the_limits_is_served_or_refused_and_nothing_is_left() -> None:
    async with serve_script(max_running=4, max_waiting=8, step_milliseconds=1) as worker:

        async def one() -> grpc.StatusCode:
            call = worker.stub.Generate(generate_request(max_tokens=20))
            while await call.read() is not grpc.aio.EOF:
                pass
            return await call.code()

        async def refused_or_served() -> grpc.StatusCode:
            try:
                return await one()
            except grpc.aio.AioRpcError as error:
                return error.code()

        codes = await asyncio.gather(*(refused_or_served() for _ in range(200)))
        assert set(codes) == {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert codes.count(grpc.StatusCode.OK) >= 12


async def test_side_calls_are_bounded_too() -> None:
    async with serve_script(max_waiting=1, max_tokenize_bytes=2**20) as worker:
        request = pb.TokenizeRequest(prompt=pb.Prompt(text="word " * 100_000))

        async def code() -> grpc.StatusCode:
            try:
                await worker.stub.Tokenize(request)
            except grpc.aio.AioRpcError as error:
                return error.code()
            return grpc.StatusCode.OK

        codes = await asyncio.gather(*(code() for _ in range(10)))
        assert grpc.StatusCode.OK in codes
        assert grpc.StatusCode.RESOURCE_EXHAUSTED in codes
