"""Decides at once whether a request may come in: slots, queue and token budget. Books alone: it touches no engine,
no prompt and no stream, and its refusals are errors that others turn into statuses.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from inference_worker.errors import Draining, QueueFull, TokenBudgetFull

MIN_RETRY_SECONDS: Final = 1.0
MAX_RETRY_SECONDS: Final = 5.0
_SMOOTHING: Final = 0.2  # weight of the newest interval in the drain rate


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """How much work may be inside."""

    max_running: int  # sequences
    max_waiting: int  # requests
    max_waiting_tokens: int  # prompt tokens of the waiting requests


class Admission:
    """Counts the requests inside. Used from the event loop only.

    A request comes in running if nobody is inside or its sequences find free slots beside everyone who is, else
    waiting if the queue and its token budget have room; else it is refused. Invariants: waiting requests and waiting
    tokens never exceed their limits, and nothing is counted once every ticket is released.
    """

    def __init__(
        self, limits: AdmissionLimits, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.limits = limits
        self.is_draining = False
        self.waiting_requests = 0
        self.waiting_tokens = 0
        self.sequences = 0  # unfinished ones, running and waiting
        self.requests = 0
        self._drain_rate = _DrainRate(clock)

    def admit(self, sequences: int, prompt_tokens: int) -> Ticket:
        """Let a request in, or refuse it. `prompt_tokens` may be an estimate; `Ticket.set_prompt_tokens` replaces it.

        Raises: Draining, QueueFull, TokenBudgetFull.
        """
        if self.is_draining:
            raise Draining
        # Alone it waits for nobody, however many sequences it has.
        is_waiting = self.sequences > 0 and self.sequences + sequences > self.limits.max_running
        if is_waiting:
            self._check_queue(prompt_tokens)
            if self.waiting_requests == 0:
                self._drain_rate.restart()
            self.waiting_requests += 1
            self.waiting_tokens += prompt_tokens
        self.sequences += sequences
        self.requests += 1
        return Ticket(self, sequences, prompt_tokens, is_waiting)

    def stop_admitting(self) -> None:
        """Refuse everything from now on."""
        self.is_draining = True

    def retry_after(self) -> float:
        """Seconds until the present queue is likely to be gone, within 1 and 5."""
        seconds = self._drain_rate.seconds_per_request * (self.waiting_requests + 1)
        return min(max(seconds, MIN_RETRY_SECONDS), MAX_RETRY_SECONDS)

    def _check_queue(self, prompt_tokens: int) -> None:
        if self.waiting_requests >= self.limits.max_waiting:
            raise QueueFull(self.limits.max_waiting, self.retry_after())
        self._check_tokens(prompt_tokens, self.waiting_tokens)

    def _check_tokens(self, prompt_tokens: int, others: int) -> None:
        limit = self.limits.max_waiting_tokens
        if others + prompt_tokens > limit:
            raise TokenBudgetFull(prompt_tokens, others, limit, self.retry_after())

    def _note_request_left(self) -> None:
        if self.waiting_requests:
            self._drain_rate.note_request_left()


class Ticket:
    """One request's place. A context manager: leaving it releases whatever is still held."""

    def __init__(
        self, admission: Admission, sequences: int, prompt_tokens: int, is_waiting: bool
    ) -> None:
        self._admission = admission
        self._sequences = sequences
        self._prompt_tokens = prompt_tokens
        self._is_released = False
        self.is_waiting = is_waiting

    def __enter__(self) -> Ticket:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def set_prompt_tokens(self, prompt_tokens: int) -> None:
        """Replace the estimate once the prompt is tokenized.

        Raises: TokenBudgetFull, if the request waits and its true size does not fit beside the others.
        """
        if self.is_waiting:
            others = self._admission.waiting_tokens - self._prompt_tokens
            self._admission._check_tokens(prompt_tokens, others)
            self._admission.waiting_tokens = others + prompt_tokens
        self._prompt_tokens = prompt_tokens

    def leave_queue(self) -> None:
        """The engine began with the request."""
        if self.is_waiting:
            self.is_waiting = False
            self._admission.waiting_requests -= 1
            self._admission.waiting_tokens -= self._prompt_tokens

    def finish_sequence(self) -> None:
        """One of the request's sequences ended and its slot is free."""
        if self._sequences:
            self._sequences -= 1
            self._admission.sequences -= 1

    def finish_sequences(self) -> None:
        """All of the request's sequences have ended, though its reader may still be here."""
        self._admission.sequences -= self._sequences
        self._sequences = 0

    def release(self) -> None:
        """The request is gone. Calling it again does nothing."""
        if self._is_released:
            return
        self._is_released = True
        self._admission._note_request_left()
        self.leave_queue()
        self.finish_sequences()
        self._admission.requests -= 1


class _DrainRate:
    """How long it takes until one more request has left, while others wait: a moving average."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._since = clock()
        self.seconds_per_request = 0.0  # unknown yet

    def restart(self) -> None:
        """The queue was empty until now: what passed before says nothing."""
        self._since = self._clock()

    def note_request_left(self) -> None:
        now = self._clock()
        interval, self._since = now - self._since, now
        if self.seconds_per_request == 0.0:
            self.seconds_per_request = interval
        else:
            self.seconds_per_request += _SMOOTHING * (interval - self.seconds_per_request)
