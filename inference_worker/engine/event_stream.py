"""One request's events on their way from the engine's thread to the reader on the event loop."""

from __future__ import annotations

import asyncio

from inference_worker.engine.event import Delta, Event, Failed, Finished


class EventStream:
    """A mailbox for one reader. Used on the event loop only.

    Bounded without limiting the engine: whatever the reader has not taken is merged, so that a slow reader costs one
    pending delta a choice, never a queue.
    """

    def __init__(self) -> None:
        self._pending: list[Event] = []
        self._is_pending = asyncio.Event()

    def put(self, event: Event) -> None:
        """Add an event."""
        self._pending.append(event)
        self._is_pending.set()

    async def next(self) -> list[Event]:
        """All that is pending, once there is something. Deltas of one choice come as one.

        The last event ever is Failed, or the Finished that has usage; awaiting more than that waits for ever.
        """
        await self._is_pending.wait()
        self._is_pending.clear()
        pending, self._pending = self._pending, []
        return merge(pending)


def is_last(event: Event) -> bool:
    """Whether no event of this request follows."""
    return isinstance(event, Failed) or (isinstance(event, Finished) and event.usage is not None)


def merge(events: list[Event]) -> list[Event]:
    """The same events with each choice's completion deltas joined into its first one."""
    if len(events) == 1:
        return events
    merged: list[Event | list[Delta]] = []
    deltas: dict[int, list[Delta]] = {}
    for event in events:
        if not isinstance(event, Delta) or event.is_prompt:
            merged.append(event)
        elif event.choice_index in deltas:
            deltas[event.choice_index].append(event)
        else:
            deltas[event.choice_index] = [event]
            merged.append(deltas[event.choice_index])
    return [_join(event) if isinstance(event, list) else event for event in merged]


def _join(deltas: list[Delta]) -> Delta:
    if len(deltas) == 1:
        return deltas[0]
    tokens = tuple(token for delta in deltas for token in delta.tokens)
    return Delta(deltas[0].choice_index, "".join([delta.text for delta in deltas]), tokens)
