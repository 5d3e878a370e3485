"""A TCP proxy that cuts connections in the middle of an answer, as networks do."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress


class CuttingProxy:
    """Forwards to a port; connection i ends after `limits[i]` bytes of answer, later ones live."""

    def __init__(self, port: int, limits: Sequence[int]) -> None:
        self._port = port
        self._limits = list(limits)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.requests: list[str] = []  # the head of each connection's first request
        self.cuts = 0

    def serve(self) -> None:
        """Accepts until closed."""
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                limit = self._limits.pop(0) if self._limits else None
                threading.Thread(target=self._forward, args=(client, limit), daemon=True).start()

    def close(self) -> None:
        """Takes no more connections."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _forward(self, client: socket.socket, limit: int | None) -> None:
        with client, socket.create_connection(("127.0.0.1", self._port)) as server:
            threading.Thread(target=self._upload, args=(client, server), daemon=True).start()
            sent = 0
            with suppress(OSError):
                while data := server.recv(65536):
                    if limit is not None and sent + len(data) >= limit:
                        client.sendall(data[: limit - sent])
                        self.cuts += 1
                        # at once, though the other thread is reading from it
                        client.shutdown(socket.SHUT_RDWR)
                        return
                    client.sendall(data)
                    sent += len(data)

    def _upload(self, client: socket.socket, server: socket.socket) -> None:
        is_first = True
        with suppress(OSError):
            while data := client.recv(65536):
                if is_first:
                    self.requests.append(data.partition(b"\r\n\r\n")[0].decode().lower())
                    is_first = False
                server.sendall(data)
            server.shutdown(socket.SHUT_WR)


@contextmanager
def cutting(port: int, limits: Sequence[int]) -> Iterator[CuttingProxy]:
    """A proxy before this port of this machine."""
    proxy = CuttingProxy(port, limits)
    threading.Thread(target=proxy.serve, daemon=True).start()
    try:
        yield proxy
    finally:
        proxy.close()
