"""What each key has inside and has used: concurrency, and a bucket of tokens that fills in a minute."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from inference_worker.caller import Caller
from inference_worker.errors import KeyLimit

_BUCKET_SECONDS: Final = 60.0
# Keys without a request inside that are remembered; the least recently used is forgotten first.
MAX_IDLE_KEYS: Final = 4096
MIN_RETRY_SECONDS: Final = 1.0  # that anybody who is refused for now is told


class KeyLimits:
    """The keys' books. Used from the event loop only.

    Invariants: a key has never more requests inside than its caller allowed when the last one came, but for those that
    another worker began; nothing is counted as inside once every `KeyTicket` has left; a bucket is never fuller than a
    minute's tokens.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._inside: dict[str, _Key] = {}
        self._idle: OrderedDict[str, _Key] = OrderedDict()  # with a bucket that was not full

    def __len__(self) -> int:
        """Keys that are remembered."""
        return len(self._inside) + len(self._idle)

    def enter(self, caller: Caller, prompt_tokens: int, seconds_per_request: float) -> KeyTicket:
        """Count a request, and take its prompt's tokens.

        `seconds_per_request`: how long one takes to leave, as far as known. Raises: KeyLimit.
        """
        key = self._key(caller)
        self._check_concurrency(caller, key, seconds_per_request)
        key.set_rate(caller.tokens_per_minute)
        if (wait := key.seconds_until(prompt_tokens)) > 0:
            what = f"{caller.tokens_per_minute} tokens in a minute"
            raise KeyLimit(what, max(MIN_RETRY_SECONDS, wait))
        ticket = self._count(caller, key, is_paid=False)
        ticket.set_prompt_tokens(prompt_tokens)
        return ticket

    def enter_continued(self, caller: Caller) -> KeyTicket:
        """Count a request that another worker began, and took the tokens for: only those to come are taken here."""
        key = self._key(caller)
        key.set_rate(caller.tokens_per_minute)
        return self._count(caller, key, is_paid=True)

    def enter_again(self, caller: Caller, seconds_per_request: float) -> KeyTicket:
        """Count a request that was begun here, and left: its tokens are paid for, but not its place, and not what has
        to be computed again.

        Raises: KeyLimit.
        """
        key = self._key(caller)
        self._check_concurrency(caller, key, seconds_per_request)
        key.set_rate(caller.tokens_per_minute)
        return self._count(caller, key, is_paid=True, is_again=True)

    def _check_concurrency(self, caller: Caller, key: _Key, seconds_per_request: float) -> None:
        limit = caller.max_concurrent
        if limit is not None and key.inside >= limit:
            wait = max(MIN_RETRY_SECONDS, seconds_per_request)
            raise KeyLimit(f"{limit} of its requests are inside already", wait)

    def _key(self, caller: Caller) -> _Key:
        key = self._inside.get(caller.key_id) or self._idle.get(caller.key_id)
        return _Key(self._clock) if key is None else key

    def _count(
        self, caller: Caller, key: _Key, *, is_paid: bool, is_again: bool = False
    ) -> KeyTicket:
        self._idle.pop(caller.key_id, None)
        self._inside[caller.key_id] = key
        key.inside += 1
        return KeyTicket(self, caller.key_id, key, is_paid=is_paid, is_again=is_again)

    def _leave(self, key_id: str, key: _Key) -> None:
        key.inside -= 1
        if key.inside:
            return
        del self._inside[key_id]
        if key.is_full:
            return  # as good as one never seen
        self._idle[key_id] = key
        if len(self._idle) > MAX_IDLE_KEYS:
            self._idle.popitem(last=False)


class KeyTicket:
    """One request's place among those of its key."""

    def __init__(
        self, limits: KeyLimits, key_id: str, key: _Key, *, is_paid: bool, is_again: bool
    ) -> None:
        """`is_paid`: the prompt's tokens were taken before; `is_again`: here."""
        self._limits = limits
        self._key_id = key_id
        self._key = key
        self._is_paid = is_paid
        self._is_again = is_again
        self._prompt_tokens = 0
        self._is_served = False
        self._has_left = False

    def set_prompt_tokens(self, prompt_tokens: int) -> None:
        """Take the prompt's tokens, in place of those that an estimate took."""
        if self._is_paid:
            return
        self._key.take(prompt_tokens - self._prompt_tokens)
        self._prompt_tokens = prompt_tokens

    def serve(self, num_uncached: int = 0) -> None:
        """The model begins with it: the prompt's tokens are used.

        One that was begun here pays for what has to be computed again, since it was its caller who left.
        """
        self._is_served = True
        if self._is_again:
            self._key.take(num_uncached)

    def use(self, completion_tokens: int) -> None:
        """Tokens were generated."""
        self._key.take(completion_tokens)

    def leave(self) -> None:
        """The request is gone; one that never reached the model gives its prompt's tokens back. Once."""
        if self._has_left:
            return
        self._has_left = True
        if not self._is_served:
            self._key.take(-self._prompt_tokens)
        self._limits._leave(self._key_id, self._key)


class _Key:
    """One key's books."""

    __slots__ = ("_at", "_clock", "_missing", "_rate", "inside")

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.inside = 0
        self._rate: float | None = None  # tokens a second
        self._missing = (
            0.0  # tokens that the bucket lacks to be full; more than all of them is a debt
        )
        self._at = clock()  # when that was so

    def set_rate(self, tokens_per_minute: int | None) -> None:
        """The limit that holds from now on."""
        self._fill()
        self._rate = None if tokens_per_minute is None else tokens_per_minute / _BUCKET_SECONDS

    def seconds_until(self, tokens: int) -> float:
        """Until the bucket has so many, or is full."""
        self._fill()
        if self._rate is None:
            return 0.0
        most_missing = max(0.0, self._rate * _BUCKET_SECONDS - tokens)
        return (self._missing - most_missing) / self._rate

    def take(self, tokens: int) -> None:
        """Take tokens out, or give back with a negative number."""
        self._fill()
        if self._rate is not None:
            self._missing = max(0.0, self._missing + tokens)

    @property
    def is_full(self) -> bool:
        self._fill()
        return self._missing == 0.0

    def _fill(self) -> None:
        now = self._clock()
        if self._rate is None:
            self._missing = 0.0
        else:
            self._missing = max(0.0, self._missing - (now - self._at) * self._rate)
        self._at = now
