"""uvicorn's HTTP protocol, made safe for long streams."""

import asyncio
from typing import Any, ClassVar

import httptools
import structlog
from starlette.types import Message
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from edge.connection import EXTENSION, Connection
from edge.connection_limits import Addresses, ConnectionLimits
from edge.errors import EdgeError
from edge.json_codec import encode

WRITE_HIGH_WATER = 8 * 1024
# What the WebSocket library takes of a handshake; it has no answer for more.
_MAX_SOCKET_HEADERS = 120
_MAX_SOCKET_LINE_BYTES = 8000
# The colon, the space and the line's end.
_HEADER_FRAME_BYTES = 4


_ERROR_TYPES = {
    400: "invalid_request_error",
    408: "timeout",
    414: "invalid_request_error",
    431: "invalid_request_error",
}

_log = structlog.get_logger("edge.request")


class StreamProtocol(HttpToolsProtocol):
    """HTTP/1.1 whose disconnects always reach the application.

    Plain uvicorn loses the disconnect of a running response when another request is pipelined behind it: it pauses
    reading, and marks only the newest request as disconnected. Here such a request ends the connection, which HTTP
    allows at any time and no ordinary client provokes.
    """

    # Where an offered WebSocket is taken; everywhere else the request is answered as if nothing had been offered.
    socket_paths: frozenset[bytes] = frozenset()
    # Of the server that the connection came to.
    limits: ClassVar[ConnectionLimits]
    addresses: ClassVar[Addresses]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_refusing = False
        # From the first byte of a request to its last.
        self._is_in_request = False
        self._is_in_head = False
        # Header and trailer bytes of the request that are parsed, and bytes that came without any of its body.
        self._field_bytes = 0
        self._fields = 0
        self._bodiless_bytes = 0
        self._has_body = False
        self._declined_head: bytes | None = None
        self._is_socket_wanted = False
        # Whether the WebSocket protocol has the connection now.
        self.is_upgraded = False
        self._read_timer: asyncio.TimerHandle | None = None
        self._connection = Connection(self)
        self._came_beyond_limit = False
        self._address = ""
        # When the last response ended, if nothing came since.
        self._idle_since: float | None = None
        # When the first sign of it came.
        self.closed_at: float | None = None

    def connection_made(  # type: ignore[override]  # as uvicorn has it
        self, transport: asyncio.Transport
    ) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=WRITE_HIGH_WATER)
        self._address = self.client[0] if self.client else ""
        self.addresses.add(self._address)
        if self.addresses.has_far_too_many(self._address):
            transport.abort()
        elif self.addresses.has_too_many(self._address):
            self._came_beyond_limit = True
        elif len(self.connections) > self.limits.max_connections:
            self._came_beyond_limit = not self._close_idlest()
            if self._came_beyond_limit and self.limits.are_far_too_many(len(self.connections)):
                transport.abort()
        self._start_read_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self.note_closed()
        self._stop_read_timer()
        self.leave()
        super().connection_lost(exc)

    def leave(self) -> None:
        """Counts the connection no more as one of its address."""
        self.addresses.remove(self._address)

    def abort_if_running(self) -> None:
        """Drops the connection if a response is under way on it."""
        if self._is_response_running():
            self.transport.abort()

    @property
    def is_surplus(self) -> bool:
        """Whether there were too many connections when this one came, and there still are."""
        self._came_beyond_limit &= len(
            self.connections
        ) > self.limits.max_connections or self.addresses.has_too_many(self._address)
        return self._came_beyond_limit

    def _close_idlest(self) -> bool:
        """Makes room by closing the connection that was kept alive for longest without use, if there is one."""
        idle = [
            (connection._idle_since, number, connection)
            for number, connection in enumerate(self.connections)
            if isinstance(connection, StreamProtocol)
            and connection._idle_since is not None
            and not connection.transport.is_closing()
        ]
        if not idle:
            return False
        min(idle)[2].transport.close()
        return True

    def note_closed(self) -> None:
        """Remembers when the first sign came that the client ends the connection."""
        if self.closed_at is None:
            self.closed_at = self.loop.time()

    def eof_received(self) -> None:
        self.note_closed()
        # A client that half-closes has gone as far as a stream is concerned. Closing would first wait for it to read
        # what is buffered, so abort; with no response running, uvicorn's plain close is right.
        self.abort_if_running()

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        self._has_body = False
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            rest = data[offer.args[0] :]
            if self._is_socket_wanted:
                self._become_socket(rest)
            else:
                self._decline_upgrade(rest)
            return
        except httptools.HttpParserError:
            self._refuse(400, "Invalid HTTP request.")
        # The parser holds a header or trailer until it is whole, however long it gets.
        if self._is_in_request:
            self._bodiless_bytes = 0 if self._has_body else self._bodiless_bytes + len(data)
            self._limit_fields(self._bodiless_bytes)

    def on_message_begin(self) -> None:
        if self._is_response_running():
            self._is_refusing = True
            self.note_closed()
            self.transport.abort()
        super().on_message_begin()
        self._connection = Connection(self)
        extensions: dict[str, Any] = {EXTENSION: self._connection}
        self.scope["extensions"] = extensions
        self._idle_since = None
        self._start_read_timer()
        self._is_in_request = self._is_in_head = True
        self._field_bytes = self._fields = self._bodiless_bytes = 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._field_bytes += len(url)
        if len(self.url) > self.limits.max_url_bytes:
            self._refuse(414, "The request's URL is too long.")
        elif self.url.count(b"&") >= self.limits.max_query_parameters:
            self._refuse(400, "The request's URL has too many parameters.")
        else:
            self._limit_fields(self._field_bytes)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._field_bytes += len(name) + len(value) + _HEADER_FRAME_BYTES
        self._fields += 1
        if self._fields > self.limits.max_headers:
            self._refuse(431, "The request has too many headers.")
        self._limit_fields(self._field_bytes)
        # Trailers are dropped: they must not pass for headers.
        if self._is_in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        if self.parser.should_upgrade():
            self._is_socket_wanted = self._offers_socket()
            if not self._is_socket_wanted:
                self._declined_head = self._head_without_offer()
        elif not self._is_refusing:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._has_body = True
        if not self._is_refusing:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._is_in_request = False
        is_upgrade = self._declined_head is not None or self._is_socket_wanted
        if not is_upgrade and not self._is_refusing:
            self._stop_read_timer()
            super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._idle_since = self.loop.time()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        if cycle.scope["http_version"] == "1.0":
            cycle.send = _unframed(cycle)  # type: ignore[method-assign]
        super()._start_asgi_task(cycle, app)

    def _limit_fields(self, size: int) -> None:
        if size > self.limits.max_header_bytes:
            self._refuse(431, "The request's headers are too large.")

    def _offers_socket(self) -> bool:
        return (
            self.url.partition(b"?")[0] in self.socket_paths
            and self.parser.get_method() == b"GET"
            and self._get_upgrade() == b"websocket"
        )

    def _become_socket(self, rest: bytes) -> None:
        """Hands the connection over to the WebSocket protocol, which reads the handshake again."""
        if self._is_refusing:
            return
        if rest:  # RFC 6455, section 4.1: nothing may follow before the answer
            self._refuse(400, "A WebSocket's handshake has no body.")
            return
        lines = [name + b": " + value for name, value in self.headers]
        lines.insert(0, b"GET " + self.url + b" HTTP/1.1")
        if len(lines) > _MAX_SOCKET_HEADERS or max(map(len, lines)) > _MAX_SOCKET_LINE_BYTES:
            self._refuse(431, "The handshake's headers are too large.")
            return
        self._stop_read_timer()
        self.is_upgraded = True
        self.connections.discard(self)
        socket: Any = self.ws_protocol_class(  # type: ignore[call-arg,misc]  # uvicorn's own types for it
            config=self.config, server_state=self.server_state, app_state=self.app_state
        )
        socket.connection = self._connection
        self.transport.set_protocol(socket)
        socket.connection_made(self.transport)
        socket.data_received(b"\r\n".join([*lines, b"", b""]))

    def _head_without_offer(self) -> bytes:
        """The head of the current request as if it had not offered another protocol."""
        lines = [self.parser.get_method() + b" " + self.url + b" HTTP/1.1"]
        for name, value in self.headers:
            if name == b"connection":
                value = b"close" if b"close" in value.lower() else b"keep-alive"
            if name != b"upgrade":
                lines.append(name + b": " + value)
        return b"\r\n".join(lines) + b"\r\n\r\n"

    def _decline_upgrade(self, rest: bytes) -> None:
        """Reads a request again that offered another protocol; its body would be taken for that protocol."""
        head, self._declined_head = self._declined_head, None
        if head is None or head.startswith(b"CONNECT "):
            self._refuse(400, "CONNECT is not supported.")
            return
        self.parser = httptools.HttpRequestParser(self)
        self.data_received(head + rest)

    def _refuse(self, status: int, message: str, finish: str | None = None) -> None:
        """Answers a request that cannot be read to its end, and closes."""
        self._is_refusing = True
        if self.transport.is_closing():
            return
        if self._is_response_running():
            if self.cycle.response_started:  # with another answer
                self.transport.abort()
                return
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            self._connection.refused_status, self._connection.finish = status, finish
        else:
            # The application will not hear of it. How a request that cannot be read names itself is not known.
            self._log_refused(status, finish)
        shown_id = self._connection.shown_id.encode()
        body = encode(EdgeError(status, _ERROR_TYPES[status], message).body())
        self.transport.write(
            STATUS_LINE[status]
            + b"content-type: application/json\r\nconnection: close\r\n"
            + b"x-request-id: %b\r\nrequest-id: %b\r\n" % (shown_id, shown_id)
            + b"content-length: %d\r\n\r\n" % len(body)
            + body
        )
        self.transport.close()

    def _log_refused(self, status: int, finish: str | None) -> None:
        fields = {} if finish is None else {"finish": finish}
        _log.info(
            "request",
            request_id=self._connection.request_id,
            client_request_id=None,
            method=None,
            route=None,
            status=status,
            error=_ERROR_TYPES[status],
            **fields,
        )

    def _is_response_running(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _start_read_timer(self) -> None:
        self._stop_read_timer()
        self._read_timer = self.loop.call_later(
            self.limits.read_timeout_seconds, self._read_timed_out
        )

    def _stop_read_timer(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def _read_timed_out(self) -> None:
        if self.transport.is_closing():
            return
        if self._is_in_request:
            self._connection.finish = "read_timeout"
            self._refuse(408, "The request did not come in time.", "read_timeout")
        else:
            self.transport.abort()


def _unframed(cycle: RequestResponseCycle) -> Any:
    """`send` of an HTTP/1.0 response, which knows no chunks: a body without a length ends with the connection."""
    is_unframed = False

    async def send(message: Message) -> None:
        nonlocal is_unframed
        if message["type"] == "http.response.start":
            names = {name.lower() for name, _ in message.get("headers", ())}
            is_unframed = b"content-length" not in names
            if is_unframed:
                cycle.chunked_encoding = False
        elif is_unframed:
            cycle.expected_content_length = len(message.get("body", b""))
        await RequestResponseCycle.send(cycle, message)  # type: ignore[arg-type]  # uvicorn's types for the same

    return send
