"""Uses of the tokenizer that have no place in admission."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from inference_worker.caller import ANYBODY, Caller
from inference_worker.errors import KeyLimit, QueueFull

_RETRY_SECONDS: Final = 1.0  # they are short


class SideCalls:
    """Those under way. Used from the event loop only.

    Invariants: never more than requests may wait, and one; of a key never more than half of them, nor than its
    `max_concurrent`, so that one key leaves room for the others.
    """

    def __init__(self, max_waiting: int, retry_after: Callable[[], float]) -> None:
        """`retry_after`: seconds until there may be room."""
        self._max_waiting = max_waiting
        self._retry_after = retry_after
        self._of_key: Counter[str] = Counter()

    @contextmanager
    def enter(self, caller: Caller = ANYBODY) -> Iterator[None]:
        """Be one of them. Raises: QueueFull, KeyLimit."""
        if self._of_key.total() > self._max_waiting:
            raise QueueFull(self._max_waiting, self._retry_after())
        limit = self._limit_of(caller)
        if self._of_key[caller.key_id] >= limit:
            raise KeyLimit(f"{limit} of its calls of the tokenizer are under way", _RETRY_SECONDS)
        self._of_key[caller.key_id] += 1
        try:
            yield
        finally:
            self._of_key[caller.key_id] -= 1
            self._of_key += Counter()  # forgets keys that have none left

    def _limit_of(self, caller: Caller) -> int:
        places = self._max_waiting + 1
        if not caller.key_id:
            return places
        share = max(1, places // 2)
        return share if caller.max_concurrent is None else min(share, caller.max_concurrent)
