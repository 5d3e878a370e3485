"""The WebSocket: whoever leaves, does not read, or is there when the edge stops."""

import asyncio
import signal
import sys

import pytest
from websockets.exceptions import InvalidStatus
from websockets.frames import Frame, Opcode

from tests.edge.edge_process import PATIENCE, EdgeProcess, running_edge
from tests.edge.raw_http import RawClient
from tests.edge.scripted_worker import (
    ScriptedCall,
    ScriptedWorker,
)
from tests.edge.socket_client import connected, ended, handshake, hang, text_frame, url


@pytest.mark.parametrize("manner", ["close", "abort", "half-close"])
@pytest.mark.parametrize("phase", ["queued", "decode"])
async def test_whoever_leaves_ends_the_generation(
    edge: EdgeProcess, worker: ScriptedWorker, manner: str, phase: str
) -> None:
    worker.script = hang if phase == "decode" else ScriptedCall.hang
    async with RawClient(edge.port) as client:
        await client.send(handshake())
        await client.read_until(b"\r\n\r\n")
        await client.send(text_frame({"type": "generate", "prompt": "x"}))
        async with asyncio.timeout(PATIENCE):
            while not worker.calls:
                await asyncio.sleep(0.01)
        if phase == "decode":
            await client.read_until(b"more")
        if manner == "close":
            await client.send(Frame(Opcode.CLOSE, b"\x03\xe8").serialize(mask=True))
        elif manner == "abort":
            client.reset()
        else:
            client.socket.shutdown(1)
        assert (await ended(worker)).was_cancelled


CLIENT = """
import asyncio, sys
from websockets.asyncio.client import connect
async def main():
    async with connect(sys.argv[1], proxy=None) as socket:
        await socket.send('{"type": "generate", "prompt": "x"}')
        await socket.recv()
        print("begun", flush=True)
        await asyncio.sleep(3600)
asyncio.run(main())
"""


async def test_a_client_that_is_killed_ends_its_generation(
    edge: EdgeProcess, worker: ScriptedWorker
) -> None:
    worker.script = hang
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CLIENT, url(edge), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(PATIENCE):
            assert await process.stdout.readline() == b"begun\n"
    finally:
        process.kill()
        await process.wait()
    assert (await ended(worker)).was_cancelled


async def test_a_reader_that_does_not_read_stalls_itself_alone_and_is_dropped(
    target: str, worker: ScriptedWorker
) -> None:
    written = 0

    async def script(call: ScriptedCall) -> None:
        nonlocal written
        if call.request.prompt.text == "short":
            await call.started()
            await call.finished()
            return
        await call.started()
        while True:
            await call.delta("x" * 1000)
            written += 1000

    worker.script = script
    async with (
        running_edge(target, send_timeout_seconds=2) as edge,
        RawClient(edge.port, receive_buffer=4096) as client,
    ):
        await client.send(handshake())
        await client.read_until(b"\r\n\r\n")
        await client.send(text_frame({"type": "generate", "prompt": "long"}))
        await client.read_until(b"xxx")
        async with connected(edge) as other:
            await other.said(prompt="short")
        assert (await ended(worker, 0)).was_cancelled
        await edge.line(lambda line: line.get("finish") == "send_timeout")
    assert written < 1_000_000, "back-pressure must reach the worker"


async def test_pings_of_a_reader_that_does_not_read_are_not_answered_without_end(
    edge: EdgeProcess, worker: ScriptedWorker
) -> None:
    async def script(call: ScriptedCall) -> None:
        await call.started()
        while True:
            await call.delta("x" * 1000)

    worker.script = script
    ping = Frame(Opcode.PING, b"x" * 125).serialize(mask=True)
    async with RawClient(edge.port, receive_buffer=4096) as client:
        await client.send(handshake())
        await client.read_until(b"\r\n\r\n")
        await client.send(text_frame({"type": "generate", "prompt": "x"}))
        await client.read_until(b"xxx")
        await client.send(ping * 10_000)  # all of it is taken, for the edge reads on
    assert (await ended(worker)).was_cancelled


async def test_shutdown_closes_idle_sockets_at_once_and_others_at_their_end(
    target: str, worker: ScriptedWorker
) -> None:
    go_on = asyncio.Event()

    async def script(call: ScriptedCall) -> None:
        await call.started()
        await go_on.wait()
        await call.delta("the end")
        await call.finished()

    worker.script = script
    async with (
        running_edge(target, drain_seconds=PATIENCE) as edge,
        connected(edge) as idle,
        connected(edge) as busy,
    ):
        await busy.generate(prompt="x")
        assert (await busy.event())["type"] == "started"
        edge.process.send_signal(signal.SIGTERM)
        assert await idle.closed() == 1001
        with pytest.raises(InvalidStatus) as refused:
            async with connected(edge):
                pass
        assert refused.value.response.status_code == 503
        go_on.set()
        assert [event["type"] for event in await busy.events()] == ["delta", "finished"]
        assert await busy.closed() == 1001
        assert await edge.wait() == 0


async def test_shutdown_tells_a_generation_that_stays(target: str, worker: ScriptedWorker) -> None:
    worker.script = hang
    async with running_edge(target, drain_seconds=0.2) as edge, connected(edge) as client:
        await client.generate(id="a", prompt="x")
        edge.process.send_signal(signal.SIGTERM)
        *_, last = await client.events()
        assert (last["type"], last["status"], last["id"]) == ("failed", 503, "a")
        assert await client.closed() == 1001
        assert await edge.wait() == 0
