"""Decides at once whether a request may come in: slots, queue, token budget, KV blocks, deadline and its key's limits.
Books alone: it touches no engine, no prompt and no stream, and its refusals are errors that others turn into statuses.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from inference_worker.caller import ANYBODY, Caller
from inference_worker.engine.load import Load
from inference_worker.errors import (
    DeadlinePassed,
    Draining,
    QueueFull,
    QueueShareFull,
    TokenBudgetFull,
    WouldMissDeadline,
)
from inference_worker.forecast import Forecast
from inference_worker.key_limits import MIN_RETRY_SECONDS, KeyLimits, KeyTicket
from inference_worker.settings import WorkerSettings

MAX_RETRY_SECONDS: Final = 5.0
MAX_HOLD_SECONDS: Final = 0.05
# A key that has some waiting may add to them while they are at most so many times what stays free (the dynamic
# threshold of Choudhury and Hahne, 1998). So one key alone fills eight ninths of the queue, and another finds room.
_KEY_SHARE: Final = 8


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """How much work may be inside."""

    max_running: int  # sequences
    max_waiting: int  # requests
    max_waiting_tokens: int  # prompt tokens of the waiting requests
    total_blocks: int = 0  # of the KV cache; 0: nothing is known of any
    block_size: int = 1  # tokens
    max_waiting_kv: float = 4.0  # prompts of the waiting requests, in caches full

    @classmethod
    def of(cls, settings: WorkerSettings, load: Load) -> AdmissionLimits:
        """Those of the settings, for an engine that says this of its KV cache."""
        return cls(
            settings.max_running,
            settings.max_waiting,
            settings.max_waiting_tokens,
            load.total_blocks,
            load.block_size,
            settings.max_waiting_kv,
        )

    @property
    def max_waiting_blocks(self) -> int:
        """Blocks that the waiting requests' prompts may need."""
        return int(self.total_blocks * self.max_waiting_kv)

    def count_blocks(self, tokens: int) -> int:
        """Blocks that a prompt needs."""
        return -(-tokens // self.block_size) if self.total_blocks else 0


class Admission:
    """Counts the requests inside. Used from the event loop only.

    A request comes in running if nobody is inside, or if its sequences find free slots and its prompt free blocks
    beside everyone who is; else waiting, if the queue, its tokens and its blocks have room, and its key leaves some to
    others; else it is refused. What a request will generate takes blocks too, but nobody knows how many: the engine
    preempts where they were too many.

    What was begun before, here or on another worker, is not as free to be refused: its reader has the beginning. It
    finds room beyond the queue's, in which as many requests may wait as such a worker has inside; and its key's tokens
    let it pass, since the key has paid for all that was delivered; it pays for what is computed again here. Its key's
    concurrency does too where another worker lost it; what left here of its own accord finds its place as any other.

    Invariants: waiting requests, tokens and blocks exceed their limits by continuations alone, and nothing is counted
    once every ticket is released.
    """

    def __init__(
        self, limits: AdmissionLimits, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.limits = limits
        self.forecast = Forecast(clock)
        self.is_draining = False
        self.waiting_requests = 0
        self.waiting_tokens = 0
        self.waiting_blocks = 0
        self.blocks = 0  # of all prompts inside, running and waiting
        self.sequences = 0  # unfinished ones, running and waiting
        self.requests = 0
        self._clock = clock
        self._keys = KeyLimits(clock)
        self._queues: dict[str, _Queue] = {}  # by key, of those that have any

    def admit(
        self,
        sequences: int,
        prompt_tokens: int,
        caller: Caller = ANYBODY,
        priority: int = 0,
        seconds_left: float | None = None,
        *,
        is_continued: bool = False,
        is_ours: bool = False,
    ) -> Ticket:
        """Let a request in, or refuse it. `prompt_tokens` may be an estimate; `Ticket.set_prompt_tokens` replaces it.

        `seconds_left`: until its deadline. `is_continued`: it was begun before, here (`is_ours`) or elsewhere. Raises:
        Draining, KeyLimit, QueueFull, QueueShareFull, TokenBudgetFull, WouldMissDeadline, DeadlinePassed.
        """
        if self.is_draining and not is_ours:
            raise Draining
        if seconds_left is not None and seconds_left <= 0:
            raise DeadlinePassed
        blocks = self.limits.count_blocks(prompt_tokens)
        # Alone it waits for nobody, however many sequences it has.
        is_waiting = self.sequences > 0 and (
            self.sequences + sequences > self.limits.max_running
            or self.blocks + blocks > self.limits.total_blocks > 0
        )
        if is_continued:
            if is_waiting:
                self._check_room_for_continued()
            if is_ours:
                key = self._keys.enter_again(caller, self.forecast.seconds_per_request)
            else:
                key = self._keys.enter_continued(caller)
        else:
            if is_waiting:
                self._check_queue(prompt_tokens)
                self._check_share(prompt_tokens, caller)
            if seconds_left is not None and self.requests:
                self._check_deadline(seconds_left, prompt_tokens, caller, priority, is_waiting)
            # last, since it is the only check that takes something
            key = self._keys.enter(caller, prompt_tokens, self.forecast.seconds_per_request)
        ticket = Ticket(self, sequences, prompt_tokens, key, caller, priority, is_continued)
        if is_waiting:
            if self.waiting_requests == 0:
                self.forecast.restart()
            ticket.join_queue()
        self.blocks += blocks
        self.sequences += sequences
        self.requests += 1
        return ticket

    def stop_admitting(self) -> None:
        """Refuse everything from now on."""
        self.is_draining = True

    def retry_after(self) -> float:
        """Seconds until the present queue is likely to be gone, within 1 and 5."""
        seconds = self.forecast.seconds_per_request * (self.waiting_requests + 1)
        return min(max(seconds, MIN_RETRY_SECONDS), MAX_RETRY_SECONDS)

    def _hold(self) -> float:
        """Seconds for which a refusal by the queue's length may stand for those of all requests of the same key.

        0 if a smaller request may yet find a slot and blocks, which it need not wait for. Otherwise until the next
        request is expected to leave: at most one place is left open meanwhile. Where none wait that would be a slot.
        """
        limits = self.limits
        has_slot = self.sequences < limits.max_running
        has_blocks = limits.total_blocks == 0 or self.blocks < limits.total_blocks
        if not self.waiting_requests or (has_slot and has_blocks):
            return 0.0
        return min(self.forecast.seconds_per_request or MAX_HOLD_SECONDS, MAX_HOLD_SECONDS)

    def _check_room_for_continued(self) -> None:
        limit = 2 * self.limits.max_waiting + self.limits.max_running
        if self.waiting_requests >= limit:
            raise QueueFull(limit, self.retry_after())

    def _check_queue(self, prompt_tokens: int) -> None:
        if self.waiting_requests >= self.limits.max_waiting:
            raise QueueFull(self.limits.max_waiting, self.retry_after(), self._hold())
        self._check_tokens(prompt_tokens, self.waiting_tokens, self.waiting_blocks)

    def _check_share(self, prompt_tokens: int, caller: Caller) -> None:
        if not caller.key_id or (queue := self._queues.get(caller.key_id)) is None:
            return
        limits = self.limits
        blocks = limits.count_blocks(prompt_tokens)
        if _is_beyond_share(queue.length, 1, self.waiting_requests, limits.max_waiting):
            raise QueueShareFull(caller.key_id, self.retry_after(), self._hold())
        for own, size, total, limit in (
            (queue.waiting_tokens, prompt_tokens, self.waiting_tokens, limits.max_waiting_tokens),
            (queue.waiting_blocks, blocks, self.waiting_blocks, limits.max_waiting_blocks),
        ):
            if size and _is_beyond_share(own, size, total, limit):
                raise QueueShareFull(caller.key_id, self.retry_after())

    def _check_tokens(self, prompt_tokens: int, other_tokens: int, other_blocks: int) -> None:
        limits = self.limits
        blocks = limits.count_blocks(prompt_tokens)
        for size, others, limit, unit in (
            (prompt_tokens, other_tokens, limits.max_waiting_tokens, "tokens"),
            (blocks, other_blocks, limits.max_waiting_blocks, "KV blocks"),
        ):
            if others + size > limit:
                raise TokenBudgetFull(size, others, limit, unit, self.retry_after())

    def _check_deadline(
        self,
        seconds_left: float,
        prompt_tokens: int,
        caller: Caller,
        priority: int,
        is_waiting: bool,
    ) -> None:
        forecast = self.forecast
        if is_waiting:
            before = self._count_before(caller, priority)
            expected = forecast.seconds_to_first_token(before, prompt_tokens)
        else:
            expected = forecast.prefill_seconds(prompt_tokens)
        if expected > seconds_left:
            raise WouldMissDeadline(expected, seconds_left, self.retry_after())

    def _count_before(self, caller: Caller, priority: int) -> float:
        """Waiting requests that are likely to begin before one that comes now, each key having its share."""
        own = self._queues.get(caller.key_id)
        ahead = 0 if own is None else sum(n for p, n in own.priorities.items() if p >= priority)
        others = (
            min(queue.length, (ahead + 1) * queue.weight / caller.weight)
            for key_id, queue in self._queues.items()
            if key_id != caller.key_id
        )
        return ahead + sum(others)

    def _note_request_left(self) -> None:
        if self.waiting_requests:
            self.forecast.note_request_left()


class Ticket:
    """One request's place. A context manager: leaving it releases whatever is still held."""

    def __init__(
        self,
        admission: Admission,
        sequences: int,
        prompt_tokens: int,
        key: KeyTicket,
        caller: Caller,
        priority: int,
        is_continued: bool,
    ) -> None:
        self._admission = admission
        self._sequences = sequences
        self._prompt_tokens = prompt_tokens
        self._key = key
        self._caller = caller
        self._priority = priority
        self._is_continued = is_continued
        self._scheduled_at: float | None = None
        self._has_token = False
        self._has_blocks = True
        self._is_released = False
        self.is_waiting = False

    def __enter__(self) -> Ticket:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    @property
    def _blocks(self) -> int:
        return self._admission.limits.count_blocks(self._prompt_tokens)

    def set_prompt_tokens(self, prompt_tokens: int) -> None:
        """Replace the estimate once the prompt is tokenized.

        Raises: TokenBudgetFull, if the request waits and its true size does not fit beside the others.
        """
        admission = self._admission
        before = self._prompt_tokens, self._blocks
        if self.is_waiting and not self._is_continued:
            others = admission.waiting_tokens - before[0], admission.waiting_blocks - before[1]
            admission._check_tokens(prompt_tokens, *others)
        admission.blocks -= self._blocks
        self._prompt_tokens = prompt_tokens
        admission.blocks += self._blocks
        if self.is_waiting:
            self._count(-1, *before)
            self._count(1, prompt_tokens, self._blocks)
        self._key.set_prompt_tokens(prompt_tokens)

    def join_queue(self) -> None:
        """The request has to wait. Once, before anything else."""
        admission = self._admission
        self.is_waiting = True
        admission.waiting_requests += 1
        queue = admission._queues.setdefault(self._caller.key_id, _Queue())
        queue.weight = self._caller.weight
        queue.length += 1
        queue.priorities[self._priority] += 1
        self._count(1, self._prompt_tokens, self._blocks)

    def leave_queue(self) -> None:
        """The engine has done with its waiting."""
        if not self.is_waiting:
            return
        admission = self._admission
        self.is_waiting = False
        admission.waiting_requests -= 1
        self._count(-1, self._prompt_tokens, self._blocks)
        queue = admission._queues[self._caller.key_id]
        queue.length -= 1
        queue.priorities[self._priority] -= 1
        if not queue.priorities[self._priority]:
            del queue.priorities[self._priority]
        if not queue.length:
            del admission._queues[self._caller.key_id]

    def _count(self, sign: int, tokens: int, blocks: int) -> None:
        """Count them as waiting, or no longer."""
        admission = self._admission
        queue = admission._queues[self._caller.key_id]
        for books in (admission, queue):
            books.waiting_tokens += sign * tokens
            books.waiting_blocks += sign * blocks

    def serve(self, num_uncached: int = 0) -> None:
        """The engine began with the request, and computes so many tokens before the first that is new."""
        self.leave_queue()
        self._scheduled_at = self._admission._clock()
        self._key.serve(num_uncached)

    def use(self, completion_tokens: int) -> None:
        """The engine gave so many more tokens."""
        self._key.use(completion_tokens)
        if self._scheduled_at is not None and not self._has_token:
            self._has_token = True
            seconds = self._admission._clock() - self._scheduled_at
            self._admission.forecast.note_prefill(self._prompt_tokens, seconds)

    def finish_sequence(self) -> None:
        """One of the request's sequences ended and its slot is free."""
        if self._sequences:
            self._sequences -= 1
            self._admission.sequences -= 1

    def finish_sequences(self) -> None:
        """All of the request's sequences have ended, though its reader may still be here."""
        self._admission.sequences -= self._sequences
        self._sequences = 0
        if self._has_blocks:
            self._has_blocks = False
            self._admission.blocks -= self._blocks

    def release(self) -> None:
        """The request is gone. Calling it again does nothing."""
        if self._is_released:
            return
        self._is_released = True
        self._admission._note_request_left()
        self.leave_queue()
        self.finish_sequences()
        self._key.leave()
        self._admission.requests -= 1


def _is_beyond_share(own: int, size: int, total: int, limit: int) -> bool:
    """Whether a key that has `own` of the `total` that wait would take too much of the `limit` with `size` more."""
    return own + size > _KEY_SHARE * (limit - total - size)


@dataclass(slots=True)
class _Queue:
    """Waiting requests of one key."""

    weight: float = 1.0
    length: int = 0
    waiting_tokens: int = 0
    waiting_blocks: int = 0
    priorities: Counter[int] = field(default_factory=Counter)
