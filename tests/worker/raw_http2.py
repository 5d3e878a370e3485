"""HTTP/2 frames written by hand (RFC 9113, HPACK of RFC 7541), for what no client library would send."""

from __future__ import annotations

import asyncio
import struct
from dataclasses import dataclass
from types import TracebackType

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, CONTINUATION = 0, 1, 3, 4, 6, 7, 9
END_STREAM, ACK, END_HEADERS = 1, 1, 4
ENHANCE_YOUR_CALM = 11


@dataclass(frozen=True)
class Frame:
    kind: int
    flags: int
    stream: int
    payload: bytes

    @property
    def error_code(self) -> int:
        """Of a GOAWAY."""
        code: int = struct.unpack_from(">I", self.payload, 4)[0]
        return code


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    head = struct.pack(">I", len(payload))[1:] + bytes([kind, flags])
    return head + struct.pack(">I", stream) + payload


def header(name: bytes, value: bytes) -> bytes:
    """A literal that no table remembers."""
    return b"\0" + _length(name) + name + _length(value) + value


def _length(text: bytes) -> bytes:
    """An integer with a prefix of 7 bits."""
    number = len(text)
    if number < 127:
        return bytes([number])
    digits = [127]
    number -= 127
    while number >= 128:
        digits.append(number % 128 | 128)
        number //= 128
    return bytes([*digits, number])


def call_headers(method: str) -> bytes:
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": f"/sluice.v1.GenerationService/{method}",
        ":authority": "worker",
        "content-type": "application/grpc",
        "te": "trailers",
    }
    return b"".join(header(name.encode(), value.encode()) for name, value in fields.items())


class RawHttp2:
    """A connection that has said hello. An async context manager."""

    def __init__(self, address: str, hello: bytes = PREFACE + frame(SETTINGS)) -> None:
        host, _, port = address.rpartition(":")
        self._place = host, int(port)
        self._hello = hello

    async def __aenter__(self) -> RawHttp2:
        self._reader, self._writer = await asyncio.open_connection(*self._place)
        self._writer.write(self._hello)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._writer.transport.abort()

    async def send(self, data: bytes) -> bool:
        """Whether the peer still takes it."""
        try:
            self._writer.write(data)
            await self._writer.drain()
        except ConnectionError:
            return False
        return not self._writer.is_closing()

    async def read(self) -> Frame | None:
        """The next frame; None at the end."""
        try:
            head = await self._reader.readexactly(9)
            payload = await self._reader.readexactly(int.from_bytes(head[:3], "big"))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        return Frame(head[3], head[4], int.from_bytes(head[5:], "big"), payload)

    async def acknowledge(self) -> None:
        """Take the peer's settings for its own."""
        assert await self.read_until(SETTINGS) is not None
        await self.send(frame(SETTINGS, ACK))

    async def read_until(self, kind: int) -> Frame | None:
        """The next frame of this kind, or the end."""
        while (frame := await self.read()) is not None and frame.kind != kind:
            pass
        return frame
