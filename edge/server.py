"""Listens, serves, and stops in order."""

import asyncio
import contextlib
import os
import resource
import signal
import socket
from collections.abc import Iterator

import structlog
import uvicorn

from edge.app import create_app
from edge.drain import Drain
from edge.protocol import StreamProtocol
from edge.settings import EdgeSettings

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


def listen(settings: EdgeSettings) -> socket.socket:
    """A listening socket whose options each connection inherits. Raises OSError when the port is taken."""
    family, _, _, _, address = socket.getaddrinfo(
        settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
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

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def abort_running(self) -> None:
        """Drops the connections that still have a response under way: their clients do not read."""
        for connection in self.server_state.connections:
            if isinstance(connection, StreamProtocol):
                connection.abort_if_running()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or []:
            host, port = listener.getsockname()[:2]
            _log.info("edge listening", host=host, port=port)


async def serve(settings: EdgeSettings, listener: socket.socket) -> None:
    """Serves until SIGTERM or SIGINT, then drains. A second signal ends the process at once."""
    drain = Drain()
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop(number: int) -> None:
        if stopping.is_set():
            os._exit(128 + number)
        drain.is_stopping = True
        _log.info("edge stopping", signal=signal.Signals(number).name)
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)

    server = _Server(_config(settings, drain))
    serving = asyncio.create_task(server.serve([listener]), name="uvicorn")
    stopped = asyncio.create_task(stopping.wait(), name="stop signal")
    await asyncio.wait([serving, stopped], return_when=asyncio.FIRST_COMPLETED)
    if not serving.done():
        ended = await drain.run(settings.unready_seconds, settings.drain_seconds)
        server.abort_running()
        server.should_exit = True
        _log.info("edge drained", ended_early=ended)
    stopped.cancel()
    await serving


def _config(settings: EdgeSettings, drain: Drain) -> uvicorn.Config:
    class Protocol(StreamProtocol):
        read_timeout_seconds = settings.read_timeout_seconds
        max_connections = settings.max_connections

    return uvicorn.Config(
        create_app(settings, drain),
        http=Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=_CLOSE_SECONDS,
        backlog=_BACKLOG,
    )
