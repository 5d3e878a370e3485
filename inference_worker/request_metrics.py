"""The times of one request, as the metrics want them."""

from __future__ import annotations

import time

from inference_worker.engine.event import FinishReason
from inference_worker.metrics import WorkerMetrics

# What the status of a call says of its request, where its finish reason does not; any other status is a refusal.
_OUTCOMES = {
    "CANCELLED": "disconnected",
    "DEADLINE_EXCEEDED": "deadline",
    "ABORTED": "slow_reader",
    "INTERNAL": "failed",
}
# The reasons of UNAVAILABLE that are no refusals.
_REASONS = {"ENGINE_LOST": "failed", "SHUTDOWN": "shutdown"}


class RequestMetrics:
    """Measures from now on. Used on the event loop only."""

    def __init__(self, metrics: WorkerMetrics) -> None:
        self._metrics = metrics
        self._began_at = time.monotonic()
        self._last_at: dict[int, float] = {}  # by choice

    def scheduled(self) -> None:
        """Its first step begins."""
        self._metrics.queue_time.observe(time.monotonic() - self._began_at)

    def delta(self, choice_index: int) -> None:
        """More text came, or tokens that make none yet."""
        now = time.monotonic()
        if (last_at := self._last_at.get(choice_index)) is not None:
            self._metrics.gaps.observe(now - last_at)
        elif not self._last_at:
            self._metrics.first_token_time.observe(now - self._began_at)
        self._last_at[choice_index] = now

    def ended(self, status: str, reason: str | None, finish: FinishReason | None) -> None:
        """The call ended with a gRPC status, the reason of an error, or the reason of its last choice's end."""
        outcome = _OUTCOMES.get(status, "refused")
        if status == "OK":
            outcome = "aborted"
            if finish is not None and finish is not FinishReason.CANCELLED:
                outcome = finish.name.lower()
        elif reason in _REASONS:
            outcome = _REASONS[reason]
        self._metrics.ended(outcome, time.monotonic() - self._began_at)
        if outcome == "refused" and reason is not None:
            self._metrics.refused(reason.lower())
