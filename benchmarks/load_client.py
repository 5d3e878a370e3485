"""A lean streaming client: keeps the bytes and the moments they came, and leaves the counting for later."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from typing import Final

_OPEN_SECONDS: Final = 60.0

Receipt = tuple[int, bytes]  # time.monotonic_ns() and what came then


class StreamFailed(Exception):
    """A stream ended before it was as far as expected."""


def get(path: str) -> bytes:
    """A GET request whose connection ends with the answer."""
    return f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode()


def post(path: str, body: bytes | dict[str, object]) -> bytes:
    """A POST request whose connection ends with the answer."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


class Stream(asyncio.Protocol):
    """One request on a connection of its own."""

    def __init__(self, request: bytes, awaited: bytes) -> None:
        """`awaited` are bytes that say that the stream has begun."""
        loop = asyncio.get_running_loop()
        self.receipts: list[Receipt] = []
        self.has_begun: asyncio.Future[None] = loop.create_future()
        self.has_ended: asyncio.Future[None] = loop.create_future()
        self._request = request
        self._awaited = awaited
        self._transport: asyncio.Transport | None = None

    def connection_made(  # type: ignore[override]  # uvloop's transports are no asyncio.Transport
        self, transport: asyncio.Transport
    ) -> None:
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.receipts.append((time.monotonic_ns(), data))
        if not self.has_begun.done() and self._awaited in data:
            self.has_begun.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self.has_ended.set_result(None)
        if not self.has_begun.done():
            received = b"".join(data for _, data in self.receipts)
            self.has_begun.set_exception(StreamFailed(received[-500:].decode(errors="replace")))
            self.has_begun.exception()  # looked at, should nobody await it

    def close(self) -> None:
        """Go away, as a client does whose user closed the page."""
        assert self._transport is not None
        self._transport.close()


async def open_streams(port: int, requests: Sequence[bytes], awaited: bytes) -> list[Stream]:
    """Send all requests at once, each on its own connection."""
    loop = asyncio.get_running_loop()

    async def connect(request: bytes) -> Stream:
        _, stream = await loop.create_connection(
            lambda: Stream(request, awaited), "127.0.0.1", port
        )
        return stream

    return list(await asyncio.gather(*map(connect, requests)))


async def begun(streams: Sequence[Stream]) -> None:
    """Until every stream has begun. Raises: StreamFailed, TimeoutError."""
    async with asyncio.timeout(_OPEN_SECONDS):
        await asyncio.gather(*(stream.has_begun for stream in streams))


async def ended(streams: Sequence[Stream]) -> None:
    """Until every stream has ended. Raises: TimeoutError."""
    async with asyncio.timeout(_OPEN_SECONDS):
        await asyncio.gather(*(stream.has_ended for stream in streams))
