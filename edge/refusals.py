"""What a worker lately refused for want of room.

Under overload nearly every request is refused for the same reason as the one before it, and to ask the worker each time
takes its time from the requests that run. So a worker says with some refusals for how long (some tens of milliseconds)
they hold for all requests of the same key, and until then those get the same answer from here. A key's refusal is never
another key's: their shares of the queue are the worker's to decide.
"""

import time
from collections.abc import Callable
from dataclasses import replace

from edge.errors import EdgeError

# How long a worker that refused counts as full when another one may be asked.
_FULL_SECONDS = 1.0
# Keys whose refusals are remembered; beyond it all are forgotten, which costs each of them one question.
_MAX_KEYS = 1024


class Refusals:
    """Those of one worker. Invariant: none is repeated for longer than the worker said, nor after `forget`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._full_until = 0.0
        self._held: dict[str, tuple[float, EdgeError]] = {}  # by key, with the end of its time

    @property
    def is_full(self) -> bool:
        """Whether it lately refused a request: fewest outstanding here may be most elsewhere."""
        return self._clock() < self._full_until

    def note(self, key_id: str, error: EdgeError) -> None:
        """The worker refused a request of this key."""
        now = self._clock()
        self._full_until = now + _FULL_SECONDS
        if error.hold_ms:
            if len(self._held) >= _MAX_KEYS:
                self._held.clear()
            self._held[key_id] = now + error.hold_ms / 1000, _copy(error)

    def repeated(self, key_id: str) -> EdgeError | None:
        """What the worker would say to one more request of this key, if that is known."""
        held = self._held.get(key_id)
        if held is None:
            return None
        until, error = held
        if self._clock() < until:
            return _copy(error)
        del self._held[key_id]
        return None

    def forget(self) -> None:
        """There may be room now."""
        self._held.clear()


def _copy(error: EdgeError) -> EdgeError:
    """Another exception that says the same: who answers with one may change it."""
    return replace(error, headers=dict(error.headers))
