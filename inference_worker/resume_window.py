"""The time for which a stream is kept without a reader."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class ResumeWindow:
    """A timer that begins anew each time. Used from the event loop only."""

    def __init__(self, seconds: float, on_end: Callable[[], None]) -> None:
        """`on_end` is called when it has passed."""
        self._seconds = seconds
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Begin now, also if it has begun."""
        self.stop()
        self._timer = self._loop.call_later(self._seconds, self._on_end)

    def stop(self) -> None:
        """Never pass."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
