"""A client of the edge's WebSocket, and what the scripted worker does for it."""

import asyncio
import base64
import contextlib
import json
import os
from collections.abc import AsyncIterator
from typing import Any

from google.protobuf import json_format
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame, Opcode

from tests.edge.edge_process import PATIENCE, EdgeProcess
from tests.edge.raw_http import request_bytes
from tests.edge.scripted_worker import (
    ScriptedCall,
    ScriptedWorker,
)

PATH = "/v1/ws"


def url(edge: EdgeProcess) -> str:
    return f"ws://127.0.0.1:{edge.port}{PATH}"


class Client:
    """One conversation."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket

    async def send(self, frame: Any) -> None:
        """Sends a frame, JSON unless it is one already."""
        await self.socket.send(frame if isinstance(frame, str | bytes) else json.dumps(frame))

    async def generate(self, **fields: Any) -> None:
        await self.send({"type": "generate", **fields})

    async def event(self) -> dict[str, Any]:
        """The next frame of the server."""
        async with asyncio.timeout(PATIENCE):
            event: dict[str, Any] = json.loads(await self.socket.recv(decode=True))
        return event

    async def events(self) -> list[dict[str, Any]]:
        """All of one generation of one choice."""
        events = [await self.event()]
        while events[-1]["type"] not in ("finished", "failed"):
            events.append(await self.event())
        return events

    async def said(self, **fields: Any) -> str:
        """What the model says to that."""
        await self.generate(**fields)
        events = await self.events()
        assert events[-1]["type"] == "finished", events
        return "".join(event.get("text", "") for event in events)

    async def refused(self, frame: Any) -> dict[str, Any]:
        """The failure that answers a frame."""
        await self.send(frame)
        event = await self.event()
        assert event["type"] == "failed"
        return event

    async def closed(self) -> int | None:
        """The code with which the server closes."""
        async with asyncio.timeout(PATIENCE):
            with contextlib.suppress(ConnectionClosed):
                while True:
                    await self.socket.recv()
        return self.socket.close_code


@contextlib.asynccontextmanager
async def connected(edge: EdgeProcess, **options: Any) -> AsyncIterator[Client]:
    async with connect(url(edge), proxy=None, **options) as socket:
        yield Client(socket)


async def ended(worker: ScriptedWorker, number: int = -1) -> ScriptedCall:
    """A call that has ended, now or soon."""
    async with asyncio.timeout(PATIENCE):
        while not worker.calls:
            await asyncio.sleep(0.01)
        await worker.calls[number].ended.wait()
    return worker.calls[number]


async def hang(call: ScriptedCall) -> None:
    """Begins, says a word, and never ends."""
    await call.started()
    await call.delta("more")
    await call.hang()


async def echo(call: ScriptedCall) -> None:
    """Says how many messages there were."""
    await call.started()
    await call.delta(f"heard {len(call.request.prompt.chat.messages)}")
    await call.finished()


def chat(worker: ScriptedWorker) -> list[dict[str, Any]]:
    """The conversation that the worker was last told."""
    told = worker.calls[-1].request.prompt.chat
    return list(json_format.MessageToDict(told, preserving_proto_field_name=True)["messages"])


USER = {"role": "user", "content": "hi"}


def handshake() -> bytes:
    return request_bytes(
        PATH,
        method="GET",
        upgrade="websocket",
        connection="Upgrade",
        sec_websocket_version="13",
        sec_websocket_key=base64.b64encode(os.urandom(16)).decode(),
    ).replace(b"content-length: 0\r\n", b"")


def text_frame(value: Any) -> bytes:
    return Frame(Opcode.TEXT, json.dumps(value).encode()).serialize(mask=True)
