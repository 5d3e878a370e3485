"""Listens, serves, and stops in order."""

import asyncio
import contextlib
import gc
import ipaddress
import os
import resource
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import structlog
import uvicorn
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute

from edge.app import create_apps
from edge.connection_limits import Addresses, ConnectionLimits
from edge.drain import Drain
from edge.gate import Gate
from edge.protocol import StreamProtocol
from edge.server_certificate import ServerCertificate
from edge.settings import EdgeSettings
from edge.socket_protocol import SocketProtocol
from edge.terminal import Terminal
from edge.tls_acceptor import TlsAcceptor

# What the kernel buffers for a client that does not read; by default it is megabytes.
_SEND_BUFFER_BYTES = 16 * 1024
_BACKLOG = 2048
# The kernel gives up on a peer after the edge would, so that the log says which of the two it was.
_KERNEL_MARGIN_SECONDS = 5
# Open files besides connections.
_OTHER_FILES = 256
# Longer than clients and proxies keep idle connections, so that it is they who close and none meets a closed one.
_KEEP_ALIVE_SECONDS = 75
# After the drain only connections that do not read are left.
_CLOSE_SECONDS = 1
_log = structlog.get_logger("edge")


def allow_connections(count: int) -> None:
    """Raises the limit of open files, where it may be, to what so many connections need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        wanted = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class AddressUnusable(Exception):
    """The edge cannot listen where it is told to."""


@dataclass(frozen=True)
class Listeners:
    """Where connections come from."""

    public: socket.socket
    admin: socket.socket | None


def listen(settings: EdgeSettings) -> Listeners:
    """Takes all addresses. Raises AddressUnusable."""
    public = _listen(settings.host, settings.port, settings)
    if settings.admin_port is None:
        return Listeners(public, None)
    try:
        return Listeners(public, _listen(settings.admin_host, settings.admin_port, settings))
    except AddressUnusable:
        public.close()
        raise


def _listen(host: str, port: int, settings: EdgeSettings) -> socket.socket:
    try:
        return _listener(host, port, settings)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise AddressUnusable(f"cannot listen on {host}:{port}: {reason}") from error


def _listener(host: str, port: int, settings: EdgeSettings) -> socket.socket:
    """A listening socket whose options each connection inherits."""
    family, _, _, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _notice_vanished_peers(listener, settings.send_timeout_seconds)
        listener.bind(address)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def _notice_vanished_peers(listener: socket.socket, send_timeout_seconds: float) -> None:
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_KEEPIDLE", 15),
        ("TCP_KEEPINTVL", 5),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", int((send_timeout_seconds + _KERNEL_MARGIN_SECONDS) * 1000)),
    ):
        if hasattr(socket, option):  # not every system has all of them
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, which would end the process by the signal instead of with 0."""

    def __init__(
        self, config: uvicorn.Config, name: str, tls: ServerCertificate | None = None
    ) -> None:
        super().__init__(config)
        self._name = name
        self._tls = tls
        self._accepting: list[asyncio.Task[None]] = []

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def abort_running(self) -> None:
        """Drops the connections that still have a response under way: their clients do not read."""
        for connection in self.server_state.connections:
            if isinstance(connection, StreamProtocol):
                connection.abort_if_running()
            elif isinstance(connection, SocketProtocol):
                connection.abort_if_stalled()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets if self._tls is None else [])
        # What is there now stays: a full collection that looks through all of it stops every stream for some 70 ms.
        gc.collect()
        gc.freeze()
        for listener in sockets or []:
            if self._tls is not None:
                task = asyncio.create_task(self._acceptor(self._tls).run(listener), name="accept")
                self._accepting.append(task)
            host, port = listener.getsockname()[:2]
            _log.info(self._name, host=host, port=port)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for task in self._accepting:
            task.cancel()
        await asyncio.gather(*self._accepting, return_exceptions=True)
        await super().shutdown(sockets)

    def _acceptor(self, certificate: ServerCertificate) -> TlsAcceptor:
        config, protocol = self.config, self.config.http_protocol_class
        assert issubclass(protocol, StreamProtocol)  # noqa: S101

        def make() -> StreamProtocol:
            return protocol(
                config=config, server_state=self.server_state, app_state=self.lifespan.state
            )

        return TlsAcceptor(certificate, protocol, make, self.server_state.connections)


async def serve(settings: EdgeSettings, listeners: Listeners, gate: Gate) -> None:
    """Serves until SIGTERM or SIGINT, then drains. A second signal ends the process at once.

    SIGHUP reads the API keys and the certificate again; that of a terminal which is closed ends the process, too.
    """
    drain = Drain()
    stopping = asyncio.Event()

    def stop(number: int) -> None:
        if stopping.is_set():
            os._exit(128 + number)
        drain.is_stopping = True
        _log.info("edge stopping", signal=signal.Signals(number).name)
        stopping.set()

    tls = ServerCertificate(settings.tls_cert, settings.tls_key) if settings.tls_cert else None
    reloads = [gate.reload] if gate.has_keys else []
    if tls is not None:
        reloads.append(tls.reload)
    _heed_signals(stop, reloads)
    if not gate.has_keys and not _is_loopback(listeners.public):
        _log.warning("edge open to everybody: no API keys are set", host=settings.host)

    apps = create_apps(settings, drain, gate)
    server = _Server(_config(settings, apps.public), "edge listening", tls)
    serving = asyncio.create_task(server.serve([listeners.public]), name="uvicorn")
    stopped = asyncio.create_task(stopping.wait(), name="stop signal")
    async with _served_beside(settings, apps.admin, listeners.admin):
        await asyncio.wait([serving, stopped], return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            ended = await drain.run(settings.unready_seconds, settings.drain_seconds)
            server.abort_running()
            server.should_exit = True
            _log.info("edge drained", ended_early=ended)
        stopped.cancel()
        await serving


def _heed_signals(stop: Callable[[int], None], reloads: list[Callable[[], None]]) -> None:
    loop = asyncio.get_running_loop()
    terminal = Terminal()

    def hang_up() -> None:
        if terminal.is_gone:
            # The system may tell it twice, which is no second signal to end at once for.
            loop.add_signal_handler(signal.SIGHUP, lambda: None)
            stop(signal.SIGHUP)
            return
        for reload in reloads:
            reload()
        if not reloads:
            _log.info("nothing to reload: there are neither API keys nor a certificate")

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    loop.add_signal_handler(signal.SIGHUP, hang_up)


@contextlib.asynccontextmanager
async def _served_beside(
    settings: EdgeSettings, app: Starlette | None, listener: socket.socket | None
) -> AsyncIterator[None]:
    """Answers probes on their own port until the block ends, through the whole drain."""
    if app is None or listener is None:
        yield
        return
    server = _Server(_config(settings, app, lifespan="off"), "edge admin listening")
    serving = asyncio.create_task(server.serve([listener]), name="uvicorn admin")
    try:
        yield
    finally:
        server.should_exit = True
        await serving


def _is_loopback(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def _config(
    settings: EdgeSettings,
    app: Starlette,
    lifespan: Literal["on", "off"] = "on",
) -> uvicorn.Config:
    paths = frozenset(
        route.path.encode() for route in app.routes if isinstance(route, WebSocketRoute)
    )

    class Protocol(StreamProtocol):
        socket_paths = paths
        limits = ConnectionLimits.of(settings)
        addresses = Addresses(settings.max_connections_per_address)

    class WebSocketProtocol(SocketProtocol):
        max_fragments = settings.max_socket_fragments

    return uvicorn.Config(
        app,
        http=Protocol,
        ws=WebSocketProtocol,
        ws_max_size=settings.max_body_bytes,
        ws_ping_interval=settings.heartbeat_seconds,
        ws_ping_timeout=None,  # see SocketProtocol
        ws_per_message_deflate=False,  # a token is shorter than its compressed self
        lifespan=lifespan,
        log_config=None,
        access_log=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=_CLOSE_SECONDS,
        backlog=_BACKLOG,
    )
