"""The peer: a bare raw-ASGI application on uvicorn that sends recorded events again, with no worker behind it.

It does what nothing can stream without: one ASGI send an event, woken once a tick for all streams together, as an
engine that drew a token for each would. The stamps in the events are renewed, so that latency means the same.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import orjson
import uvicorn

from benchmarks.pace import Pace
from benchmarks.stamp import PATTERN, stamp

_HEAD = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/event-stream; charset=utf-8")],
}

Receive = Callable[[], Coroutine[Any, Any, dict[str, Any]]]
Send = Callable[[dict[str, Any]], Coroutine[Any, Any, None]]


class Source:
    """Ticks at the pace while anybody listens."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._tick: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._listened = asyncio.Event()
        self.listeners = 0

    async def next(self) -> bytes:
        """The stamp of the next tick, when it comes."""
        return await self._tick

    def listen(self) -> None:
        """One more stream."""
        self.listeners += 1
        self._listened.set()

    async def run(self) -> None:
        """Tick for ever."""
        loop = asyncio.get_running_loop()
        while True:
            if not self.listeners:
                self._listened.clear()
                await self._listened.wait()
            await asyncio.sleep(self._pace.delay())
            tick, self._tick = self._tick, loop.create_future()
            tick.set_result(stamp())


class BareServer:
    """`POST /recording` names a file of recorded streams; `GET /streams/3` sends the fourth of them."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._streams: list[list[list[bytes]]] = []  # of each, its events, split where stamps stand
        self._source: Source | None = None
        self._ticking: asyncio.Task[None] | None = None

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """The ASGI application."""
        if self._source is None:
            self._source = Source(self._pace)
            self._ticking = asyncio.create_task(self._source.run())
        if scope["method"] == "POST":
            await self._load(receive)
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body"})
            return
        await self._play(self._streams[int(scope["path"].rsplit("/", 1)[1])], self._source, send)

    async def _load(self, receive: Receive) -> None:
        path = (await receive())["body"].decode()
        recording = orjson.loads(Path(path).read_bytes())  # noqa: ASYNC240  # nothing else runs now
        self._streams = [
            [PATTERN.split(event.encode()) for event in stream] for stream in recording
        ]

    async def _play(self, events: list[list[bytes]], source: Source, send: Send) -> None:
        source.listen()
        try:
            await send(_HEAD)
            for pieces in events:
                body = (await source.next()).join(pieces)
                await send({"type": "http.response.body", "body": body, "more_body": True})
            await send({"type": "http.response.body"})
        finally:
            source.listeners -= 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pace-file", type=Path, required=True)
    pace = Pace(parser.parse_args().pace_file)
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    config = uvicorn.Config(
        BareServer(pace),
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
    )
    print(json.dumps({"event": "listening", "port": listener.getsockname()[1]}), flush=True)
    uvicorn.Server(config).run([listener])


if __name__ == "__main__":
    main()
