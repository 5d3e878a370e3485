"""Notices an engine that does not get on: a step that hangs, and code that never gives the interpreter back."""

from __future__ import annotations

import asyncio
import faulthandler
import sys
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Final

from inference_worker.engine.serving import ServingEngine

_LOOKS: Final = 8
# Beyond the step's own limit, before the whole process is given up: the loop may only be slow.
_GUARD_SECONDS: Final = 30.0


class EngineHangs(Exception):
    """A step took longer than it may."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"a step of the engine has not ended for {seconds:g} seconds")


class StepWatchdog:
    """Looks at the engine, on the event loop, as long as its block lasts. A context manager.

    A step hangs when that many looks in a row find the same one: time alone would also tell so of a process that was
    stopped and goes on. If the loop itself gets no turn, because some C code keeps the interpreter for good, Python's
    faulthandler writes every thread's stack to stderr and ends the process with exit code 1. That one goes by time
    alone, since no Python runs then: it also ends a process that goes on after it was stopped for as long.
    """

    def __init__(
        self,
        engine: ServingEngine,
        seconds: float,
        on_hang: Callable[[EngineHangs, str], None],
        guard_seconds: float = _GUARD_SECONDS,
    ) -> None:
        """`on_hang` is called once, with the stack of the engine's thread."""
        self._engine = engine
        self._seconds = seconds
        self._on_hang = on_hang
        self._guard_seconds = guard_seconds
        self._progress: int | None = None
        self._num_same = 0  # looks that found it

    def __enter__(self) -> StepWatchdog:
        self._loop = asyncio.get_running_loop()
        self._look()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._timer.cancel()
        faulthandler.cancel_dump_traceback_later()

    def _look(self) -> None:
        faulthandler.dump_traceback_later(self._seconds + self._guard_seconds, exit=True)
        self._timer = self._loop.call_later(self._seconds / _LOOKS, self._look)
        progress = self._engine.progress()
        if progress is None or progress != self._progress:
            self._progress = progress
            self._num_same = 0
            return
        self._num_same += 1
        if self._num_same == _LOOKS:
            self._on_hang(EngineHangs(self._seconds), stack_of(self._engine.thread_id))


def stack_of(thread_id: int | None) -> str:
    """Where a thread is now."""
    frame = sys._current_frames().get(thread_id or 0)
    return "".join(traceback.format_stack(frame)) if frame is not None else "the thread has ended"
