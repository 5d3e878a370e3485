"""How fast tokens come: a number in memory that the benchmark shares with the processes it measures."""

from __future__ import annotations

import mmap
import struct
import time
from pathlib import Path

_NUMBER = struct.Struct("d")


class Pace:
    """Seconds between two ticks; 0 means as fast as possible. Whoever maps the file sees a change at once.

    Ticks lie on multiples of the period on the clock of time.monotonic(), which all processes of a machine share.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(_NUMBER.pack(0.0))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), _NUMBER.size)
        self._due = 0.0

    @property
    def seconds(self) -> float:
        """The period."""
        seconds: float = _NUMBER.unpack_from(self._memory)[0]
        return seconds

    @seconds.setter
    def seconds(self, value: float) -> None:
        _NUMBER.pack_into(self._memory, 0, value)

    def delay(self) -> float:
        """Seconds until the next tick. Ticks that were missed are left out."""
        period = self.seconds
        if period == 0:
            return 0.0
        now = time.monotonic()
        due = (now // period + 1) * period
        if abs(due - self._due) < period / 2:  # a timer fired early: that tick was already given
            due += period
        self._due = due
        return due - now
