"""Those who read on the event loop, as the thread that generates for them reaches them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from typing import Any

from inference_worker.engine.event import EngineStopped, Event
from inference_worker.engine.event_stream import EventStream, EventStreams
from inference_worker.engine.request import Request


class Readers:
    """The streams of a thread that generates. `deliver` and `crash` are for that thread, the others for the loop's."""

    def __init__(self, on_crash: Callable[[BaseException], None]) -> None:
        """`on_crash` is called on the loop after `crash`, when every stream has got Failed."""
        self._on_crash = on_crash
        self._streams = EventStreams()
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """From now on events are delivered on the running event loop."""
        self._loop = asyncio.get_running_loop()

    def open(self, request: Request, on_event: Callable[[Event], None] | None) -> EventStream:
        """Begin a request's stream."""
        return self._streams.open(request, on_event)

    def drop(self, request: Request) -> None:
        """Its reader is gone; the stream gets nothing more."""
        self._streams.drop(request)

    def fail(self) -> None:
        """Nothing follows: every stream gets Failed with EngineStopped."""
        self._streams.fail_all(EngineStopped())

    def deliver(self, events: Iterable[tuple[Request, Event]]) -> None:
        """Hand events over with one call, so that the loop wakes once however many requests they are of."""
        self._call(self._streams.deliver, events)

    def crash(self, error: BaseException) -> None:
        """The thread has ended by itself."""
        self._call(self._crash, error)

    def _call(self, callback: Callable[[Any], None], argument: object) -> None:
        assert self._loop is not None, "start() comes first"  # noqa: S101
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to hear it
            self._loop.call_soon_threadsafe(callback, argument)

    def _crash(self, error: BaseException) -> None:
        self.fail()
        self._on_crash(error)
