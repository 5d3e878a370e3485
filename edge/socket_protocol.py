"""uvicorn's WebSocket protocol, with the limits that hold for every other connection."""

from typing import Any, ClassVar

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import CloseCode, Frame
from websockets.http11 import Request

from edge.connection import EXTENSION, Connection


class SocketProtocol(WebSocketsSansIOProtocol):
    """A connection that was upgraded; it has taken the place of the HTTP protocol on the same transport.

    A peer that is gone is noticed by TCP itself (keepalive, and the user timeout of what is sent), so pings need no
    answer in time: a reader who is merely slow has them behind all that is yet to be read.
    """

    # Pieces of one message, whose size is limited by its bytes, of which a piece need not have any.
    max_fragments: ClassVar[int]
    # Set by the HTTP protocol, whose connection it was.
    connection: Connection

    def abort_if_stalled(self) -> None:
        """Drops the connection if what is written does not leave."""
        if not self.writable.is_set():
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.connection.note_closed()
        self.connection.leave()
        super().connection_lost(exc)

    def handle_close(self, event: Frame) -> None:
        """Takes the peer's farewell, or its answer to ours."""
        self.connection.note_closed()
        super().handle_close(event)

    def eof_received(self) -> None:
        self.connection.note_closed()
        # Without a close frame there is nobody who reads on, and closing would wait for them.
        self.transport.abort()

    def handle_connect(self, event: Request) -> None:
        """Begins the application, unless the handshake is wrong, which is answered already."""
        super().handle_connect(event)
        if not self.close_sent:
            extensions: Any = self.scope["extensions"]
            extensions[EXTENSION] = self.connection

    def handle_cont(self, event: Frame) -> None:
        """Takes a piece of a message."""
        if len(self.frames) >= self.max_fragments:
            self.conn.fail(CloseCode.MESSAGE_TOO_BIG, "too many fragments")
            self.handle_parser_exception()
        else:
            super().handle_cont(event)

    def handle_ping(self) -> None:
        """Answers, unless the peer does not read: the answers to its pings would fill the memory."""
        if self.writable.is_set():
            super().handle_ping()
        else:
            self.conn.data_to_send()

    def shutdown(self) -> None:
        """Tells the peer that the server goes away; by now no generation runs."""
        self.stop_keepalive()
        if self.handshake_complete and not self.close_sent:
            self.conn.send_close(CloseCode.GOING_AWAY)
            self.transport.write(b"".join(self.conn.data_to_send()))
            self.close_sent = True
        self.transport.close()
