"""Computes the masks of a step's rows: together and in parallel while they are cheap, else each on its own account."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from llguidance import LLExecutor, LLMatcher

from inference_worker.grammar.budget import Budget
from inference_worker.grammar.vocabulary import Words

_MOST_THREADS: Final = 8


class Row(Protocol):
    """What a mask is made from."""

    @property
    def matcher(self) -> LLMatcher: ...
    @property
    def budget(self) -> Budget: ...


@dataclass(frozen=True, slots=True)
class Clocks:
    """In seconds. Tests have their own."""

    thread: Callable[[], float] = time.thread_time  # processor time of the calling thread
    wall: Callable[[], float] = time.perf_counter


class MaskMaker:
    """Makes the masks of one model's grammars.

    Rows that are computed together are computed in parallel and without the interpreter's lock, but nothing tells what
    each of them took. So a call that took longer than its rows may take is followed by one that computes row after row
    on this thread, whose own processor time is exactly the row's, however busy the machine is; and so on until the
    rows are cheap again, or those that are not have failed.
    """

    def __init__(self, clocks: Clocks | None = None) -> None:
        self.clocks = clocks or Clocks()
        self._threads = min(_MOST_THREADS, _usable_cores())
        self._executor = LLExecutor(num_threads=self._threads)
        self._is_slow = False

    def fill(self, bits: Words, rows: Sequence[Row]) -> None:
        """Write a mask into each row of `bits` [rows, words]. For the engine's thread only."""
        seconds = self._fill_each(bits, rows) if self._is_slow else self.fill_together(bits, rows)
        self._is_slow = seconds > sum(row.budget.seconds_per_token for row in rows)

    def fill_together(self, bits: Words, rows: Sequence[Row]) -> float:
        """Write the masks and charge nobody: an upper bound of the processor time, in seconds. For any thread."""
        began_at = self.clocks.wall()
        matchers = [(row.matcher, index) for index, row in enumerate(rows)]
        self._executor.unsafe_compute_mask_ptr(
            matchers, bits.ctypes.data, bits.strides[0], len(rows)
        )
        return (self.clocks.wall() - began_at) * min(self._threads, len(rows))

    def _fill_each(self, bits: Words, rows: Sequence[Row]) -> float:
        total = 0.0
        for mask, row in zip(bits, rows, strict=True):
            began_at = self.clocks.thread()
            row.matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            seconds = self.clocks.thread() - began_at
            row.budget.spend(seconds)
            total += seconds
        return total


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
