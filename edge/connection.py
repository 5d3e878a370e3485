"""What the application may know of, and do to, the connection that a request came on."""

import uuid
from typing import TYPE_CHECKING

from starlette.types import Send

if TYPE_CHECKING:
    from edge.protocol import StreamProtocol

# Where a request's scope has it, among the extensions.
EXTENSION = "sluice.connection"


class Connection:
    """One of the server's own protocol; there is one for each request on it."""

    def __init__(self, protocol: "StreamProtocol") -> None:
        self._protocol = protocol
        self.request_id = f"req-{uuid.uuid4().hex}"
        # The id in the answer; a client may bring its own.
        self.shown_id = self.request_id
        # Set when the protocol itself answered, since the rest of the request did not come.
        self.refused_status: int | None = None
        self.finish: str | None = None

    @property
    def is_writable(self) -> bool:
        """Whether a send would return at once."""
        return not self._protocol.flow.write_paused

    @property
    def closed_at(self) -> float | None:
        """When the client ended it, in the event loop's seconds."""
        return self._protocol.closed_at

    @property
    def is_surplus(self) -> bool:
        """Whether the server had too many connections when this one came, and still has."""
        return self._protocol.is_surplus

    def note_closed(self) -> None:
        """Remembers that the client ends it now, if it has not yet."""
        self._protocol.note_closed()

    def sender(self) -> Send:
        """Sends past all middleware, which has nothing to do with what follows the head of a response."""
        send: Send = self._protocol.cycle.send  # type: ignore[assignment]  # uvicorn's types for the same
        return send

    def abort(self) -> None:
        """Drops the connection with all that is not yet sent."""
        self._protocol.transport.abort()

    def leave(self) -> None:
        """Notes that a connection which was upgraded is gone; the HTTP protocol itself is not told."""
        self._protocol.leave()

    def cut(self) -> None:
        """Sends what is written and closes without ending the body, so that nobody takes it for complete."""
        cycle = self._protocol.cycle
        if self._protocol.is_upgraded:
            self.abort()
            return
        cycle.disconnected = True
        cycle.message_event.set()
        self._protocol.transport.close()
