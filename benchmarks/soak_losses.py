"""When a worker of the soak was lost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf


class Losses:
    """The times, in time.monotonic's seconds, from the signal to the process's end."""

    def __init__(self) -> None:
        self._spans: list[tuple[float, float]] = []

    @contextmanager
    def one(self) -> Iterator[None]:
        """A worker ends during the block."""
        begin = time.monotonic()
        self._spans.append((begin, inf))
        try:
            yield
        finally:
            self._spans[-1] = begin, time.monotonic()

    def was_one_since(self, moment: float) -> bool:
        """Whether a worker ended, or was ending, between then and now."""
        return any(end >= moment for _, end in self._spans)

    def age(self) -> str:
        """How long ago the last one began, for a report."""
        if not self._spans:
            return "before any kill"
        return f"{time.monotonic() - self._spans[-1][0]:.1f} s after a kill"
