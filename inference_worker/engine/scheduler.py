"""Decides who takes part in the next step, and who gives its blocks back when memory is short."""

from __future__ import annotations

from collections.abc import Iterable

from inference_worker.engine.block_pool import BlockPool
from inference_worker.engine.fair_queue import FairQueue
from inference_worker.engine.runner import Row
from inference_worker.engine.sequence import Sequence, State


class Scheduler:
    """What had tokens already, then each key its share, and in it by priority and arrival; decode before prefill;
    preemption of the youngest, by recompute.

    Invariants: a sequence is in exactly one of `waiting` and `running`, or finished; only running ones hold blocks;
    `running` is in order of admission, oldest first, so the oldest always makes progress.
    """

    def __init__(self, pool: BlockPool, *, max_running: int, max_batch_tokens: int) -> None:
        """`max_batch_tokens` must be at least `max_running`, or decoding sequences would starve."""
        if max_batch_tokens < max_running:
            raise ValueError(
                f"max_batch_tokens {max_batch_tokens} is below max_running {max_running}"
            )
        self._pool = pool
        self._max_running = max_running
        self._max_batch_tokens = max_batch_tokens
        self.waiting: FairQueue[Sequence] = FairQueue()
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Put a new sequence into the queue; one that another engine brought to its tokens behind those preempted."""
        if sequence.num_completion_tokens:
            self.waiting.put_behind_returned(sequence)
        else:
            self.waiting.add(sequence, sequence.request.share)

    def add_siblings(self, sequences: list[Sequence]) -> None:
        """Put further choices of a running request at the head of the queue, in order."""
        for sequence in reversed(sequences):
            self.waiting.put_back(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free its blocks."""
        if sequence.state is State.RUNNING:
            self.running.remove(sequence)
            self._pool.release(sequence)
        elif sequence.state is State.WAITING:
            self.waiting.remove(sequence)
        sequence.state = State.FINISHED

    def schedule(self) -> list[Row]:
        """The rows of the next step: decode rows first, then prefill chunks, within the token budget.

        Blocks for every row are reserved. Empty only if nothing is waiting, and nothing running but what is ending.
        """
        decoding = self._decoding()
        prefilling = [s for s in self.running if s.num_uncomputed_tokens > 1]
        rows: dict[Sequence, int] = {}
        budget = self._grow(decoding, rows, self._max_batch_tokens)
        budget = self._grow(prefilling, rows, budget)
        self._admit(rows, budget)
        self._charge(rows)
        ordered = [Row(sequence, num_tokens) for sequence, num_tokens in rows.items()]
        ordered.sort(key=lambda row: row.num_tokens > 1 or row.start == 0)  # stable
        return ordered

    @property
    def must_preempt(self) -> bool:
        """Whether the next step lacks blocks, which the end of a step in flight may still give."""
        missing = (self._pool.count_missing(s, s.num_computed_tokens + 1) for s in self._decoding())
        return sum(max(0, count) for count in missing) > self._pool.num_free

    def _decoding(self) -> list[Sequence]:
        return [s for s in self.running if s.num_uncomputed_tokens == 1 and not s.is_ending]

    def _grow(self, sequences: Iterable[Sequence], rows: dict[Sequence, int], budget: int) -> int:
        """Schedule running sequences, preempting the youngest while blocks are short. Returns what is left."""
        for sequence in sequences:
            if budget == 0:
                break
            if sequence.state is not State.RUNNING:  # preempted for an older one just now
                continue
            num_tokens = min(sequence.num_uncomputed_tokens, sequence.most_tokens_of_step, budget)
            while not self._pool.reserve(sequence, sequence.num_computed_tokens + num_tokens):
                victim = self.running[-1]
                budget += rows.pop(victim, 0)
                self.preempt(victim)
                if victim is sequence:
                    break
            else:
                rows[sequence] = num_tokens
                budget -= num_tokens
        return budget

    def _admit(self, rows: dict[Sequence, int], budget: int) -> None:
        """Take sequences from the queue while slots, blocks and budget last. Nobody overtakes the first."""
        while self.waiting and budget and len(self.running) < self._max_running:
            sequence = self.waiting.first()
            # blocks for all its tokens at once, so that a prompt that is begun can be completed, and a block to
            # spare for each running sequence, so that the newcomer is not preempted by their very next tokens
            if not self._pool.fits(sequence, num_spare=len(self.running)):
                break
            self.waiting.remove(sequence)
            self._pool.attach_prefix(sequence)
            self._pool.reserve(sequence, len(sequence.token_ids))
            self.running.append(sequence)
            sequence.state = State.RUNNING
            rows[sequence] = min(
                sequence.num_uncomputed_tokens, sequence.most_tokens_of_step, budget
            )
            budget -= rows[sequence]

    def _charge(self, rows: dict[Sequence, int]) -> None:
        """Count the step's tokens as served to the rows' keys; what was cached or is computed again is free."""
        for sequence, num_tokens in rows.items():
            start, stop = sequence.num_computed_tokens, sequence.num_computed_tokens + num_tokens
            new = stop - max(start, sequence.num_charged_tokens)
            if new > 0:
                sequence.num_charged_tokens = stop
                self.waiting.charge(sequence.request.share, new)

    def preempt(self, victim: Sequence) -> None:
        """Take a running sequence's blocks back, and put it at the head of the queue. It must not be in flight."""
        self.running.remove(victim)
        self._pool.release(victim)
        victim.state = State.WAITING
        self.waiting.put_back(victim)
        self.num_preemptions += 1
