"""Notices when one await of a stream takes too long, without a timer for each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Watchdog:
    """Calls back when what began has not ended for some seconds, and again for every such time.

    A stream awaits thousands of messages: beginning and ending cost an assignment each, and one timer, that looks and
    arms itself again, serves them all. A context manager: the timer runs within the block. Used on the event loop only.
    """

    def __init__(self, seconds: float, on_overdue: Callable[[], None]) -> None:
        self._seconds = seconds
        self._on_overdue = on_overdue
        self._loop = asyncio.get_running_loop()
        self._began_at: float | None = None

    def __enter__(self) -> Watchdog:
        self._timer = self._loop.call_later(self._seconds, self._look)
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def begin(self) -> None:
        """What is watched begins, or begins anew."""
        self._began_at = self._loop.time()

    def end(self) -> None:
        """It ended in time."""
        self._began_at = None

    def _look(self) -> None:
        now = self._loop.time()
        if self._began_at is not None and now - self._began_at >= self._seconds:
            self._began_at = now
            self._on_overdue()
        # What begins later than now is not overdue before the timer has looked again.
        due_at = (now if self._began_at is None else self._began_at) + self._seconds
        self._timer = self._loop.call_at(due_at, self._look)
