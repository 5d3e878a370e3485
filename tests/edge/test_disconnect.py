"""A client that goes away, in whatever manner and phase, ends its generation."""

import asyncio
import re
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import psutil
import pytest

from tests.edge.edge_process import PATIENCE, EdgeProcess, fresh_id, running_edge
from tests.edge.pool import until
from tests.edge.raw_http import RawClient, request_bytes
from tests.edge.scripted_worker import ScriptedCall, ScriptedWorker

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", CHAT | {"stream": True}),
    "chat unstreamed": ("/v1/chat/completions", CHAT),
    "completions": ("/v1/completions", {"prompt": "hi", "stream": True}),
    "batch": ("/v1/completions", {"prompt": ["hi", "ho"], "stream": True}),
    "batch unstreamed": ("/v1/completions", {"prompt": ["hi", "ho"]}),
    "native": ("/v1/streams", {"prompt": "hi"}),
    "AI SDK": ("/api/completion", {"prompt": "hi"}),
    "AI SDK text": ("/api/text", {"prompt": "hi"}),
}


async def close(client: RawClient) -> None:
    client.socket.close()


async def reset(client: RawClient) -> None:
    client.reset()


async def half_close(client: RawClient) -> None:
    client.socket.shutdown(socket.SHUT_WR)


async def pipeline_and_close(client: RawClient) -> None:
    await client.send(request_bytes("/health", method="GET"))
    client.socket.close()


async def pipeline_and_stay(client: RawClient) -> None:
    await client.send(request_bytes("/health", method="GET"))


LEAVE: dict[str, Callable[[RawClient], Awaitable[None]]] = {
    "close": close,
    "reset": reset,
    "half-close": half_close,
    "pipeline and close": pipeline_and_close,
    "pipeline": pipeline_and_stay,
}


def hang_in(phase: str, reached: asyncio.Event) -> Callable[[ScriptedCall], Awaitable[None]]:
    async def script(call: ScriptedCall) -> None:
        if phase != "queue":
            await call.started()
        if phase == "decode":
            await call.delta("one")
        reached.set()
        while phase == "decode":
            await call.delta("more")
            await asyncio.sleep(0.01)
        await call.hang()

    return script


async def assert_cancelled(worker: ScriptedWorker, calls: int) -> None:
    async with asyncio.timeout(PATIENCE):
        while len(worker.calls) < calls:
            await asyncio.sleep(0.01)
        for call in worker.calls:
            await call.ended.wait()
    assert [call.was_cancelled for call in worker.calls] == [True] * calls


@pytest.mark.parametrize("manner", LEAVE)
@pytest.mark.parametrize("phase", ["queue", "prefill", "decode"])
async def test_leaving_a_stream_cancels_the_call(
    edge: EdgeProcess, worker: ScriptedWorker, phase: str, manner: str
) -> None:
    reached = asyncio.Event()
    worker.script = hang_in(phase, reached)
    client_id = fresh_id("leave")
    path, body = REQUESTS["chat"]
    async with RawClient(edge.port) as client:
        await client.send(request_bytes(path, body, x_request_id=client_id))
        await asyncio.wait_for(reached.wait(), PATIENCE)
        if phase == "decode":
            await client.read_until(b"more")
        await LEAVE[manner](client)
        await assert_cancelled(worker, 1)
    line = await edge.request_line(client_id)
    assert line["status"] == 499


@pytest.mark.parametrize("kind", [kind for kind in REQUESTS if kind != "chat"])
@pytest.mark.parametrize("phase", ["queue", "prefill", "decode"])
async def test_every_route_cancels(
    edge: EdgeProcess, worker: ScriptedWorker, phase: str, kind: str
) -> None:
    reached = asyncio.Event()
    worker.script = hang_in(phase, reached)
    path, body = REQUESTS[kind]
    async with RawClient(edge.port) as client:
        await client.send(request_bytes(path, body))
        await asyncio.wait_for(reached.wait(), PATIENCE)
        calls = 2 if "batch" in kind else 1
        async with asyncio.timeout(PATIENCE):
            while len(worker.calls) < calls:
                await asyncio.sleep(0.01)
        client.socket.close()
        await assert_cancelled(worker, calls)


async def test_an_event_source_cancels(edge: EdgeProcess, worker: ScriptedWorker) -> None:
    reached = asyncio.Event()
    worker.script = hang_in("decode", reached)
    async with RawClient(edge.port) as client:
        await client.send(request_bytes("/v1/streams?prompt=x", method="GET"))
        await client.read_until(b"more")
    await assert_cancelled(worker, 1)


TOKENIZING: list[tuple[str, dict[str, Any]]] = [
    ("/tokenize", {"inputs": "hi"}),
    ("/v1/messages/count_tokens", CHAT | {"model": "default"}),
]


@pytest.mark.parametrize(("path", "body"), [REQUESTS["chat"], *TOKENIZING])
async def test_a_client_that_leaves_within_its_body_starts_nothing(
    edge: EdgeProcess, worker: ScriptedWorker, path: str, body: dict[str, Any]
) -> None:
    client_id = fresh_id("half-a-body")
    head = request_bytes(path, body, x_request_id=client_id)[:-5]
    async with RawClient(edge.port) as client:
        await client.send(head)
    line = await edge.request_line(client_id)
    assert line["status"] == 499
    assert line["level"] == "info"  # nobody need look into it
    assert worker.calls == []
    assert worker.tokenizations == []


@pytest.mark.parametrize(("path", "body"), TOKENIZING)
async def test_leaving_cancels_a_tokenization(
    edge: EdgeProcess, worker: ScriptedWorker, path: str, body: dict[str, Any]
) -> None:
    worker.is_tokenizer_stuck = True
    client_id = fresh_id("tokenize")
    async with RawClient(edge.port) as client:
        await client.send(request_bytes(path, body, x_request_id=client_id))
        await until(lambda: bool(worker.tokenizations))
    await until(lambda: worker.cancelled_tokenizations == 1)
    assert (await edge.request_line(client_id))["status"] == 499


async def test_a_batch_refused_in_part_is_refused_and_cancelled(
    edge: EdgeProcess, worker: ScriptedWorker
) -> None:
    other_started = asyncio.Event()

    async def script(call: ScriptedCall) -> None:
        if call.request.prompt.text == "bad":
            await asyncio.wait_for(other_started.wait(), PATIENCE)
            await call.fail(grpc.StatusCode.RESOURCE_EXHAUSTED)
        await call.started()
        other_started.set()
        await call.hang()

    worker.script = script
    async with RawClient(edge.port) as client:
        await client.send(
            request_bytes("/v1/completions", {"prompt": ["good", "bad"], "stream": True})
        )
        assert (await client.read_until(b"overloaded")).startswith(b"HTTP/1.1 429")
    async with asyncio.timeout(PATIENCE):
        for call in worker.calls:
            await call.ended.wait()
    good = next(call for call in worker.calls if call.request.prompt.text == "good")
    assert good.was_cancelled


async def test_a_reader_that_stops_reading_is_dropped_and_costs_little(
    target: str, worker: ScriptedWorker
) -> None:
    written = 0

    async def script(call: ScriptedCall) -> None:
        nonlocal written
        await call.started()
        while True:
            await call.delta("x" * 1000)
            written += 1000

    worker.script = script
    clients = 8
    async with running_edge(target, send_timeout_seconds=2) as edge:
        process = psutil.Process(edge.process.pid)
        before = process.memory_info().rss
        readers = [RawClient(edge.port, receive_buffer=4096) for _ in range(clients)]
        for number, reader in enumerate(readers):
            await reader.__aenter__()
            await reader.send(request_bytes(*REQUESTS["chat"], x_request_id=f"stall-{number}"))
        async with asyncio.timeout(PATIENCE):
            while len(worker.calls) < clients:
                await asyncio.sleep(0.01)
        # All of it flows into buffers until they are full; then the worker's writes block.
        seen = -1
        while seen != written:
            seen = written
            await asyncio.sleep(0.3)
        grown = process.memory_info().rss - before
        await assert_cancelled(worker, clients)
        for number, reader in enumerate(readers):
            line = await edge.request_line(f"stall-{number}")
            assert (line["status"], line["finish"]) == (499, "send_timeout")
            reader.socket.close()
    assert written / clients < 1_000_000, "back-pressure must reach the worker"
    assert grown / clients < 1_000_000


async def test_a_stalled_reader_that_half_closes_is_dropped_at_once(
    edge: EdgeProcess, worker: ScriptedWorker
) -> None:
    async def script(call: ScriptedCall) -> None:
        await call.started()
        while True:
            await call.delta("x" * 1000)

    worker.script = script
    client_id = fresh_id("stalled")
    async with RawClient(edge.port, receive_buffer=4096) as client:
        await client.send(request_bytes(*REQUESTS["chat"], x_request_id=client_id))
        await client.read_until(b"xxx")
        await asyncio.sleep(0.5)  # so that nothing flows any more, most likely
        client.socket.shutdown(socket.SHUT_WR)
        await assert_cancelled(worker, 1)
    line = await edge.request_line(client_id)
    assert line["status"] == 499
    assert "finish" not in line, "for its half-close, not for having stopped to read"


async def test_a_slow_request_is_cut_off(target: str) -> None:
    client_id = fresh_id("stalled")
    async with (
        running_edge(target, read_timeout_seconds=2) as edge,
        RawClient(edge.port) as silent,
        RawClient(edge.port) as half,
        RawClient(edge.port) as second,
    ):
        await half.send(request_bytes(*REQUESTS["chat"], x_request_id=client_id)[:-3])
        await second.send(request_bytes("/health", method="GET"))
        await second.read_until(b'{"status":"ok"}')
        second.received = b""
        await second.send(b"GET /hea")
        assert await silent.read_to_end() == b""
        answer = await half.read_to_end()
        assert answer.startswith(b"HTTP/1.1 408")
        assert b'"type":"timeout"' in answer
        assert f"\r\nx-request-id: {client_id}\r\n".encode() in answer
        line = await edge.request_line(client_id)
        assert (line["status"], line["finish"]) == (408, "read_timeout")
        answer = await second.read_to_end()
        assert answer.startswith(b"HTTP/1.1 408")
        request_id = re.search(rb"\r\nrequest-id: (req-\w+)\r\n", answer)
        assert request_id
        line = await edge.line(lambda line: line.get("request_id") == request_id[1].decode())
        assert (line["status"], line["finish"]) == (408, "read_timeout")


async def test_connections_can_be_reused(edge: EdgeProcess, worker: ScriptedWorker) -> None:
    async with RawClient(edge.port) as client:
        for _ in range(3):
            client.received = b""
            await client.send(request_bytes(*REQUESTS["chat"]))
            await client.read_until(b"[DONE]\n\n\r\n0\r\n\r\n")
    assert [call.was_cancelled for call in worker.calls] == [False] * 3
