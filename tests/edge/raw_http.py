"""A client that is nothing but a socket, to do what polite clients do not."""

import asyncio
import json
import socket
import struct
from typing import Any

from tests.edge.edge_process import PATIENCE


def request_bytes(
    path: str, body: dict[str, Any] | None = None, method: str = "POST", **headers: str
) -> bytes:
    """A request on the wire."""
    payload = b"" if body is None else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "host: edge", f"content-length: {len(payload)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + payload


class RawClient:
    """One connection."""

    def __init__(self, port: int, receive_buffer: int | None = None) -> None:
        self.socket = socket.socket()
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.setblocking(False)
        self._port = port
        self.received = b""

    async def __aenter__(self) -> "RawClient":
        await asyncio.get_running_loop().sock_connect(self.socket, ("127.0.0.1", self._port))
        return self

    async def __aexit__(self, *_: object) -> None:
        self.socket.close()

    async def send(self, data: bytes) -> None:
        """Sends all of it."""
        async with asyncio.timeout(PATIENCE):
            await asyncio.get_running_loop().sock_sendall(self.socket, data)

    async def read_until(self, wanted: bytes) -> bytes:
        """Everything received, once `wanted` is in it."""
        while wanted not in self.received:
            await self.read_more()
        return self.received

    async def read_more(self) -> None:
        """Receives what comes next."""
        async with asyncio.timeout(PATIENCE):
            data = await asyncio.get_running_loop().sock_recv(self.socket, 65536)
        assert data, f"closed after {self.received!r}"
        self.received += data

    async def read_to_end(self) -> bytes:
        """Everything received, once the connection is closed in whatever way."""
        async with asyncio.timeout(PATIENCE):
            while True:
                try:
                    data = await asyncio.get_running_loop().sock_recv(self.socket, 65536)
                except ConnectionError:
                    return self.received
                if not data:
                    return self.received
                self.received += data

    def reset(self) -> None:
        """Closes with RST."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


def split_chunked(raw: bytes) -> tuple[bytes, bytes, bool]:
    """Head, body without its chunk framing, and whether the last chunk came."""
    head, _, rest = raw.partition(b"\r\n\r\n")
    body = b""
    while rest:
        size_line, _, rest = rest.partition(b"\r\n")
        size = int(size_line, 16)
        if size == 0:
            return head, body, True
        body += rest[:size]
        rest = rest[size + 2 :]
    return head, body, False
