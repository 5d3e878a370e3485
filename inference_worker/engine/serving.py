"""What the worker asks of whatever generates: our engine's thread, or that of an engine that a user brought."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from inference_worker.engine.event import Event, FinishReason
from inference_worker.engine.event_stream import EventStream
from inference_worker.engine.load import Load
from inference_worker.engine.request import Request


class ServingEngine(Protocol):
    """Runs requests elsewhere than on the event loop. All methods are for the loop's thread."""

    @property
    def load(self) -> Load:
        """How busy it is."""
        ...

    def start(self) -> None:
        """Begin; events are delivered on the running event loop."""
        ...

    def submit(
        self, request: Request, on_event: Callable[[Event], None] | None = None
    ) -> EventStream:
        """Hand a request over. `on_event` hears of its events on the loop, before any reader takes them.

        The events are Started, Scheduled, any deltas, and a Finished for each choice; or at any point Failed.
        Raises: EngineStopped, if it has ended.
        """
        ...

    def cancel(self, request: Request, reason: FinishReason | None = None) -> None:
        """End a request soon, and free what it holds.

        With a reason its reader is told by a Finished for each choice that had none. Without one the reader is gone:
        its stream gets nothing more. Ended requests are ignored.
        """
        ...

    def progress(self) -> int | None:
        """What differs from call to call, seconds apart, as long as it gets on; None while there is nothing to do."""
        ...

    @property
    def thread_id(self) -> int | None:
        """The thread that generates."""
        ...

    def fail(self) -> None:
        """Give it up: every stream gets Failed with EngineStopped, and nothing more."""
        ...

    async def stop(self) -> None:
        """End every request with SHUTDOWN, and release everything."""
        ...
