"""Who is told what the engine does besides its events: the metrics."""

from __future__ import annotations

from enum import Enum
from typing import Protocol


class Phase(Enum):
    """How far a request came; the values are those of the metrics' label."""

    QUEUED = "queued"  # it holds no blocks
    PREFILL = "prefill"
    DECODE = "decode"  # its first token was drawn


class Observer(Protocol):
    """Hears of steps and cancels, on the thread of whoever generates: it must be quick, and must not raise."""

    def stepped(self, seconds: float) -> None:
        """A step was computed; a step that runs ahead of its predecessor's end counts from that end."""
        ...

    def cancelled(self, phase: Phase, seconds: float, num_tokens: int) -> None:
        """A request that its caller gave up is gone, `seconds` after its cancel came, and its blocks are free.

        `num_tokens` were drawn for it in that time, those of steps still in flight included.
        """
        ...


class NoObserver:
    """Hears nothing."""

    def stepped(self, seconds: float) -> None:
        """Nothing."""

    def cancelled(self, phase: Phase, seconds: float, num_tokens: int) -> None:
        """Nothing."""
