"""Serves /metrics, /health and /ready over HTTP, on threads of its own, which never hold the event loop up."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable
from socketserver import TCPServer, ThreadingMixIn
from typing import Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

from inference_worker.probes import Probes

# Scrapers are few and quick: whoever takes longer is cut off, and of too many the one that came first, so that those
# who hold connections open keep no probe from its answer.
_MAX_CONNECTIONS: Final = 8
_MAX_SECONDS: Final = 10.0
# For whoever was cut off to leave its place.
_LEAVE_SECONDS: Final = 0.5
_BACKLOG: Final = 16

_Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class MetricsServer:
    """Listens from `bind` on."""

    def __init__(self, registry: CollectorRegistry, probes: Probes) -> None:
        self._registry = registry
        self._probes = probes
        self.port: int | None = None  # known once bound

    def bind(self, host: str, port: int) -> None:
        """Listen, and answer until the process ends. Raises: OSError."""
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        server = _Server(family, (str(address[0]), int(address[1])))
        server.set_app(self._application())
        self.port = server.server_port
        threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()

    def _application(self) -> _Application:
        metrics = make_wsgi_app(self._registry)
        probes = {"/health": self._probes.is_alive, "/ready": self._probes.is_ready}

        def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            path = environ["PATH_INFO"]
            if path == "/metrics":
                answered: Iterable[bytes] = metrics(environ, start_response)
                return answered
            status, text = "404 Not Found", "There are /metrics, /health and /ready."
            if (probe := probes.get(path)) is not None:
                status, text = ("200 OK", "yes") if probe() else ("503 Service Unavailable", "no")
            start_response(status, [("content-type", "text/plain")])
            return [f"{text}\n".encode()]

        return answer


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = _BACKLOG

    def __init__(self, family: socket.AddressFamily, address: tuple[str, int]) -> None:
        self.address_family = family
        self._places = threading.BoundedSemaphore(_MAX_CONNECTIONS)
        # Those answered now, the first that came first, each with what cuts it off.
        self._requests: dict[socket.socket, threading.Timer] = {}
        self._lock = threading.Lock()
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """As HTTPServer does, without asking a name server who we are."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer on a thread, for so long at most, in the place of the one that came first if there is no other."""
        if not self._places.acquire(blocking=False):
            self._cut_first()
            if not self._places.acquire(timeout=_LEAVE_SECONDS):
                self.shutdown_request(request)
                return
        limit = threading.Timer(_MAX_SECONDS, _cut, (request,))
        limit.daemon = True
        with self._lock:
            self._requests[request] = limit
        try:
            limit.start()
            super().process_request(request, client_address)
        except BaseException:  # no thread can be started; who called closes the connection
            self._leave(request)
            raise

    def _cut_first(self) -> None:
        with self._lock:
            if (first := next(iter(self._requests), None)) is not None:
                _cut(first)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer, and leave the place."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._leave(request)

    def _leave(self, request: socket.socket) -> None:
        with self._lock:
            limit = self._requests.pop(request)
        limit.cancel()
        self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: whoever went away before the end will ask again."""


class _Handler(WSGIRequestHandler):
    def log_message(self, *_: object) -> None:
        """Nothing: the log is JSON, and scrapes are many."""


def _cut(request: socket.socket) -> None:
    try:
        request.shutdown(socket.SHUT_RDWR)
    except OSError:  # it ended meanwhile
        return
