"""A client that takes its answer as slowly as it likes, and can vanish at any moment."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Final

import httptools

_READ_BYTES: Final = 4096
_RECEIVE_BUFFER_BYTES: Final = 16 * 1024  # small, so that a slow reader holds its server up soon
_PATIENCE_SECONDS: Final = 60.0  # without a byte, pings included


class CutOff(Exception):
    """The connection ended before the answer did."""


@dataclass(frozen=True, slots=True)
class Event:
    """A server-sent event; what it does not have is empty."""

    kind: str
    id: str
    data: str

    def json(self) -> dict[str, Any]:
        """Its data as a JSON object."""
        fields: dict[str, Any] = json.loads(self.data)
        return fields


def delete(path: str) -> bytes:
    """A DELETE request whose connection ends with the answer."""
    return f"DELETE {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode()


class Call:
    """One HTTP request on a connection of its own. `begin` makes it; `close` or `vanish` must end it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._parser = httptools.HttpResponseParser(self)
        self._body = bytearray()
        self._is_whole = False
        self.status = 0

    @classmethod
    async def begin(cls, port: int, request: bytes) -> Call:
        """Send a request and wait for the answer's head. Raises: OSError, CutOff, TimeoutError."""
        raw = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        raw.setblocking(False)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER_BYTES)
        try:
            await asyncio.get_running_loop().sock_connect(raw, ("127.0.0.1", port))
        except BaseException:
            raw.close()
            raise
        call = cls(*await asyncio.open_connection(sock=raw, limit=_READ_BYTES))
        try:
            call._writer.write(request)
            while not call.status:
                await call._receive()
        except BaseException:
            call.close()
            raise
        return call

    async def events(self) -> AsyncIterator[Event]:
        """The events of a stream, to its very end. Raises: CutOff, TimeoutError."""
        while True:
            while (end := self._body.find(b"\n\n")) >= 0:
                block = self._body[:end].decode()
                del self._body[: end + 2]
                if (event := _event(block)) is not None:
                    yield event
            if self._is_whole:
                return
            await self._receive()

    async def body(self) -> bytes:
        """All of the answer. Raises: CutOff, TimeoutError."""
        while not self._is_whole:
            await self._receive()
        return bytes(self._body)

    def close(self) -> None:
        """Say goodbye, as a client does whose user closed the page."""
        self._writer.close()

    def vanish(self) -> None:
        """Leave with a reset in place of a goodbye."""
        sock = self._writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()

    async def _receive(self) -> None:
        async with asyncio.timeout(_PATIENCE_SECONDS):
            data = await self._reader.read(_READ_BYTES)
        if not data:
            raise CutOff
        self._parser.feed_data(data)

    # called by the parser

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        self._is_whole = True


def _event(block: str) -> Event | None:
    fields = dict.fromkeys(("event", "id", "data"), "")
    for line in block.splitlines():
        name, _, value = line.partition(":")
        if name in fields:
            fields[name] = value.removeprefix(" ")
    if not any(fields.values()):  # a ping
        return None
    return Event(fields["event"], fields["id"], fields["data"])
