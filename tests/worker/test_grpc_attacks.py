"""What a stranger may do to the gRPC port in HTTP/2 itself: others are served meanwhile, and nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio
import pytest

from protos.sluice.v1 import generation_pb2 as pb
from protos.sluice.v1 import generation_pb2_grpc
from tests.patience import PATIENCE
from tests.worker import raw_http2 as h2
from tests.worker.raw_http2 import RawHttp2, call_headers, frame, header
from tests.worker.served_worker import (
    ServedWorker,
    generate_request,
    read_until,
    reasons,
    serve_script,
)

SLOW: dict[str, Any] = {"step_milliseconds": 20}  # a stream of 4000 tokens outlasts every attack
CANCEL = struct.pack(">I", 8)


def num_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@contextlib.asynccontextmanager
async def witnessed(worker: ServedWorker) -> AsyncIterator[None]:
    """Another client reads a stream during the block; at its end nothing is left but what was there before."""
    await worker.load()
    files, tasks = num_files(), len(asyncio.all_tasks())
    call = worker.stub.Generate(generate_request(max_tokens=4000, request_id="witness"))
    await read_until(call, "delta")
    reading = asyncio.ensure_future(read_until(call, "finished"))
    yield
    load = await asyncio.wait_for(worker.load(), PATIENCE)
    assert (load.requests, load.running) == (1, 1), "only the witness is inside"
    await worker.stub.Abort(pb.AbortRequest(request_id="witness"))
    streamed = await asyncio.wait_for(reading, PATIENCE)
    assert reasons(streamed) == ["CANCELLED"]
    assert sum(message.delta.token_count for message in streamed) > 0
    async with asyncio.timeout(PATIENCE):
        while num_files() > files or len(asyncio.all_tasks()) > tasks:
            await asyncio.sleep(0.01)


def pings(_: int) -> bytes:
    return frame(h2.PING, payload=b"12345678") * 50


def settings(number: int) -> bytes:
    return frame(h2.SETTINGS, payload=struct.pack(">HI", 4, 65_535 + number % 2)) * 50


def resets(number: int) -> bytes:
    stream = 2 * number + 1
    opened = frame(h2.HEADERS, h2.END_HEADERS, stream, call_headers("Generate"))
    return opened + frame(h2.RST_STREAM, 0, stream, CANCEL)


def endless_headers(number: int) -> bytes:
    if number == 0:
        return frame(h2.HEADERS, 0, 1, call_headers("GetLoad"))
    return frame(h2.CONTINUATION, 0, 1, header(b"x", b"y" * 8000))


def empty_continuations(number: int) -> bytes:
    if number == 0:
        return frame(h2.HEADERS, 0, 1, call_headers("GetLoad"))
    return frame(h2.CONTINUATION, 0, 1) * 50


def half_calls(number: int) -> bytes:
    """Calls whose message never comes, of which a connection may have only so many."""
    return frame(h2.HEADERS, h2.END_HEADERS, 2 * number + 1, call_headers("Generate"))


@pytest.mark.parametrize(
    "attack", [pings, settings, resets, endless_headers, empty_continuations, half_calls]
)
async def test_others_are_served_meanwhile_and_nothing_is_left(
    attack: Callable[[int], bytes],
) -> None:
    async with serve_script(**SLOW) as worker:

        async def run() -> None:
            async with RawHttp2(worker.address) as attacker:
                for number in range(800):
                    if not await attacker.send(attack(number)):
                        break

        async with witnessed(worker):
            await asyncio.gather(*(run() for _ in range(3)))


async def test_who_pings_too_often_is_told_to_calm_down() -> None:
    async with (
        serve_script(min_client_ping_seconds=60, **SLOW) as worker,
        witnessed(worker),
        RawHttp2(worker.address) as attacker,
    ):
        await attacker.send(frame(h2.PING, payload=b"12345678") * 10)
        async with asyncio.timeout(PATIENCE):
            told = await attacker.read_until(h2.GOAWAY)
            assert told is not None
            assert told.error_code == h2.ENHANCE_YOUR_CALM
            assert told.payload.endswith(b"too_many_pings")
            assert await attacker.read_until(h2.DATA) is None, "and then closed"


async def test_a_call_with_too_many_headers_is_refused_and_its_connection_goes_on() -> None:
    """Sent by one that does not look at the limit that the server tells, which gRPC's own clients do."""
    async with (
        serve_script(max_metadata_bytes=2048) as worker,
        RawHttp2(worker.address) as client,
    ):
        await client.acknowledge()
        for stream, size, is_fine in ((1, 4000, False), (3, 1000, True)):
            head = call_headers("GetLoad") + header(b"x", b"y" * size)
            await client.send(frame(h2.HEADERS, h2.END_HEADERS, stream, head))
            await client.send(frame(h2.DATA, h2.END_STREAM, stream, b"\0" * 5))
            kinds: list[int] = []
            async with asyncio.timeout(PATIENCE):
                while (answer := await client.read()) is not None:
                    if answer.stream == stream:
                        kinds.append(answer.kind)
                        if answer.kind == h2.RST_STREAM or answer.flags & h2.END_STREAM:
                            break
            assert answer is not None, "its connection was closed"
            assert (h2.DATA in kinds) == is_fine


async def test_who_does_not_take_the_settings_is_left() -> None:
    async with (
        serve_script(handshake_seconds=0.5, **SLOW) as worker,
        witnessed(worker),
        RawHttp2(worker.address) as client,
    ):
        async with asyncio.timeout(PATIENCE):
            told = await client.read_until(h2.GOAWAY)
            assert told is None or b"settings" in told.payload.lower(), told
            while told is not None and await client.read() is not None:
                pass


def channel(worker: ServedWorker) -> grpc.aio.Channel:
    """A connection of its own, that does not try again by itself for long."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.initial_reconnect_backoff_ms", 100)]
    return grpc.aio.insecure_channel(worker.address, options=options)


async def get_load(channel: grpc.aio.Channel) -> pb.GetLoadResponse:
    stub: generation_pb2_grpc.GenerationServiceAsyncStub
    stub = generation_pb2_grpc.GenerationServiceStub(channel)
    return await stub.GetLoad(pb.GetLoadRequest(), timeout=PATIENCE)


async def test_connections_beyond_the_limit_are_closed_until_silent_ones_time_out() -> None:
    async with (
        serve_script(max_connections=3, handshake_seconds=6, **SLOW) as worker,
        witnessed(worker),
        RawHttp2(worker.address, hello=b"") as silent,
        RawHttp2(worker.address, hello=b"PRI * HT") as slow,
    ):
        async with channel(worker) as surplus:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await get_load(surplus)
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        async with asyncio.timeout(PATIENCE):
            for client in (silent, slow):
                while await client.read() is not None:
                    pass
            async with channel(worker) as late:
                stub: generation_pb2_grpc.GenerationServiceAsyncStub
                stub = generation_pb2_grpc.GenerationServiceStub(late)
                assert await stub.GetLoad(pb.GetLoadRequest(), wait_for_ready=True)


async def test_a_connection_without_calls_is_closed_and_comes_back_by_itself() -> None:
    async with (
        serve_script(connection_idle_seconds=0.5, **SLOW) as worker,
        witnessed(worker),
        channel(worker) as idle,
        RawHttp2(worker.address) as raw,
    ):
        assert await get_load(idle)
        async with asyncio.timeout(PATIENCE):
            told = await raw.read_until(h2.GOAWAY)
            assert told is not None
            assert told.payload.endswith(b"connection idle")
            while idle.get_state() is not grpc.ChannelConnectivity.IDLE:
                await asyncio.sleep(0.01)
        assert await get_load(idle)


async def test_calls_beyond_the_limit_of_all_connections_are_refused() -> None:
    async with serve_script(max_calls=2, **SLOW) as worker:
        running = [worker.stub.Generate(generate_request(max_tokens=4000)) for _ in range(2)]
        for call in running:
            await call.read()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await worker.load()
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        for call in running:
            call.cancel()
        async with asyncio.timeout(PATIENCE):
            while True:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    if (await worker.load()).requests == 0:
                        break
