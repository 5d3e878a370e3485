"""How long those who come now are likely to wait, from what was seen of late."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

_SMOOTHING: Final = 0.2  # weight of the newest sample
# What was seen longer ago says nothing. Without this a slow sample could refuse everybody who would prove it wrong.
_MAX_AGE_SECONDS: Final = 30.0


class Forecast:
    """Moving averages of two paces: of requests that leave while others wait, and of prefill.

    What was not seen of late counts as nothing, so that it refuses nobody.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since = clock()  # when the latest request left, or others began to wait
        self._request = _Average(clock)
        self._prefill_token = _Average(clock)

    @property
    def seconds_per_request(self) -> float:
        """From one's leaving to the next one's, while others wait; 0: not seen of late."""
        return self._request.seconds

    def seconds_to_first_token(self, requests_before: float, prompt_tokens: int) -> float:
        """For a prompt that waits until so many others have begun and one more has left."""
        return self.seconds_per_request * (requests_before + 1) + self.prefill_seconds(
            prompt_tokens
        )

    def prefill_seconds(self, prompt_tokens: int) -> float:
        """From the first step of a prompt to its first token."""
        return self._prefill_token.seconds * prompt_tokens

    def restart(self) -> None:
        """Others wait from now on: what passed before says nothing."""
        self._since = self._clock()

    def note_request_left(self) -> None:
        """A request left while others wait."""
        now = self._clock()
        interval, self._since = now - self._since, now
        self._request.note(interval)

    def note_prefill(self, prompt_tokens: int, seconds: float) -> None:
        """A prompt had its first token so long after its first step began."""
        self._prefill_token.note(seconds / max(1, prompt_tokens))


class _Average:
    """Of seconds, as long as they keep coming."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._seconds = 0.0
        self._noted_at = clock()

    @property
    def seconds(self) -> float:
        """0: not seen of late."""
        # samples that come rarely, because each is long, count until the next one is due
        lasts = max(_MAX_AGE_SECONDS, 2 * self._seconds)
        return self._seconds if self._clock() - self._noted_at <= lasts else 0.0

    def note(self, sample: float) -> None:
        """Add one."""
        average = self._seconds
        self._seconds = average + _SMOOTHING * (sample - average) if average else sample
        self._noted_at = self._clock()
