"""How long those who come now are likely to wait, from what was seen of late."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

_SMOOTHING: Final = 0.2  # weight of the newest sample
# A prefill of longer ago says nothing. Without this a slow one could refuse everybody who would prove it wrong.
_PREFILL_SECONDS: Final = 30.0


class Forecast:
    """Moving averages of two paces: of requests that leave while others wait, and of prefill.

    What was never seen counts as nothing, so that it refuses nobody.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since = clock()  # when the latest request left, or others began to wait
        self.seconds_per_request = (
            0.0  # from one's leaving to the next one's, while others wait; 0: not seen yet
        )
        self._seconds_per_token = 0.0  # the same
        self._prefill_at = clock()

    def seconds_to_first_token(self, requests_before: float, prompt_tokens: int) -> float:
        """For a prompt that waits until so many others have begun and one more has left."""
        return self.seconds_per_request * (requests_before + 1) + self.prefill_seconds(
            prompt_tokens
        )

    def prefill_seconds(self, prompt_tokens: int) -> float:
        """From the first step of a prompt to its first token."""
        if self._clock() - self._prefill_at > _PREFILL_SECONDS:
            return 0.0
        return self._seconds_per_token * prompt_tokens

    def restart(self) -> None:
        """Others wait from now on: what passed before says nothing."""
        self._since = self._clock()

    def note_request_left(self) -> None:
        """A request left while others wait."""
        now = self._clock()
        interval, self._since = now - self._since, now
        self.seconds_per_request = _average(self.seconds_per_request, interval)

    def note_prefill(self, prompt_tokens: int, seconds: float) -> None:
        """A prompt had its first token so long after its first step began."""
        self._seconds_per_token = _average(self._seconds_per_token, seconds / max(1, prompt_tokens))
        self._prefill_at = self._clock()


def _average(average: float, sample: float) -> float:
    return sample if average == 0.0 else average + _SMOOTHING * (sample - average)
