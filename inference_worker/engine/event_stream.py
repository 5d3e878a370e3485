"""A request's events on their way from the engine's thread to the reader on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from itertools import chain

from inference_worker.engine.event import Delta, Event, Failed, Finished
from inference_worker.engine.request import Request


class EventStream:
    """A mailbox for one reader. Used on the event loop only.

    Bounded without limiting the engine: what the reader has not taken is joined as it comes, so that a slow reader
    costs one pending delta a choice, never a queue.
    """

    def __init__(self, on_event: Callable[[Event], None] | None = None) -> None:
        """`on_event` hears of every event as it comes, however late the reader takes it."""
        self._on_event = on_event
        self._pending: list[Event | _Joined] = []
        self._joined: dict[int, _Joined] = {}  # pending completion deltas by choice
        self._is_pending = asyncio.Event()

    def put(self, event: Event) -> None:
        """Add an event."""
        if self._on_event is not None:
            self._on_event(event)
        if not isinstance(event, Delta) or event.is_prompt:
            self._pending.append(event)
        elif (joined := self._joined.get(event.choice_index)) is not None:
            joined.add(event)
        else:
            self._joined[event.choice_index] = joined = _Joined(event)
            self._pending.append(joined)
        self._is_pending.set()

    def wake(self) -> None:
        """Let the reader return, with nothing if nothing is pending."""
        self._is_pending.set()

    async def next(self) -> list[Event]:
        """All that is pending, once there is something. Completion deltas of one choice come as one.

        The last event ever is Failed, or the Finished that has usage; awaiting more than that waits for ever.
        """
        await self._is_pending.wait()
        self._is_pending.clear()
        pending, self._pending = self._pending, []
        self._joined.clear()
        return [event.delta() if isinstance(event, _Joined) else event for event in pending]


class EventStreams:
    """The streams of every request that has a reader. Used on the event loop only."""

    def __init__(self) -> None:
        self._streams: dict[int, EventStream] = {}  # by the request's key

    def open(self, request: Request, on_event: Callable[[Event], None] | None) -> EventStream:
        """Begin a request's stream."""
        stream = self._streams[request.key] = EventStream(on_event)
        return stream

    def drop(self, request: Request) -> None:
        """Its reader is gone; the stream gets nothing more."""
        self._streams.pop(request.key, None)

    def deliver(self, events: Iterable[tuple[Request, Event]]) -> None:
        """Put events into their streams; those without a reader are nobody's."""
        for request, event in events:
            if (stream := self._streams.get(request.key)) is None:
                continue
            stream.put(event)
            if is_last(event):
                del self._streams[request.key]

    def fail_all(self, error: Exception) -> None:
        """Whatever fed them is gone."""
        for stream in self._streams.values():
            stream.put(Failed(error))
        self._streams.clear()


class _Joined:
    """Deltas of one choice on their way to become one."""

    __slots__ = ("_choice_index", "_texts", "_tokens")

    def __init__(self, first: Delta) -> None:
        self._choice_index = first.choice_index
        self._texts = [first.text]
        self._tokens = [first.tokens]

    def add(self, delta: Delta) -> None:
        self._texts.append(delta.text)
        self._tokens.append(delta.tokens)

    def delta(self) -> Delta:
        tokens = self._tokens[0] if len(self._tokens) == 1 else tuple(chain(*self._tokens))
        return Delta(self._choice_index, "".join(self._texts), tokens)


def is_last(event: Event) -> bool:
    """Whether no event of this request follows."""
    return isinstance(event, Failed) or (isinstance(event, Finished) and event.usage is not None)
