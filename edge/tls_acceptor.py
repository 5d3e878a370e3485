"""Accepts the connections of clients that speak TLS: their handshakes have a time, and count as connections."""

import asyncio
import contextlib
import socket
from collections import Counter
from collections.abc import Callable, Sized

from edge.protocol import StreamProtocol
from edge.server_certificate import ServerCertificate

# Before the next try when the system has no more files, say.
_PAUSE_SECONDS = 0.1


class TlsAcceptor:
    """Shakes hands with each client, and then has an HTTP protocol for it.

    An event loop's own TLS servers tell nobody of a connection before its handshake is over, so that those whose
    handshake never is would count nowhere.
    """

    def __init__(
        self,
        certificate: ServerCertificate,
        protocol: type[StreamProtocol],
        make: Callable[[], StreamProtocol],
        connections: Sized,
    ) -> None:
        """`make` makes the protocol of one connection; `connections` are those that have one."""
        self._certificate = certificate
        self._limits, self._addresses = protocol.limits, protocol.addresses
        self._make = make
        self._connections = connections
        self._shaking: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, listener: socket.socket) -> None:
        """Accepts until cancelled."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                try:
                    connection, address = await loop.sock_accept(listener)
                except OSError:
                    await asyncio.sleep(_PAUSE_SECONDS)
                    continue
                if self._has_room_for(address[0]):
                    task = asyncio.create_task(
                        self._shake(connection, address[0]), name="tls handshake"
                    )
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
                else:
                    connection.close()
        finally:
            for task in self._tasks:
                task.cancel()

    def _has_room_for(self, address: str) -> bool:
        return not (
            self._limits.are_far_too_many(len(self._connections) + len(self._tasks) + 1)
            or self._addresses.has_far_too_many(address, self._shaking[address] + 1)
        )

    async def _shake(self, connection: socket.socket, address: str) -> None:
        self._shaking[address] += 1
        try:
            # A client that speaks no TLS, or not ours, that is too slow, or gone: the loop has closed its connection.
            with contextlib.suppress(OSError):
                await asyncio.get_running_loop().connect_accepted_socket(
                    self._make,
                    connection,
                    ssl=self._certificate.context,
                    ssl_handshake_timeout=self._limits.read_timeout_seconds,
                )
        finally:
            self._shaking[address] -= 1
            if not self._shaking[address]:
                del self._shaking[address]
