"""A thread on which keys take turns."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Final, TypeVar

from inference_worker.engine.fair_queue import Share
from inference_worker.engine.fair_slots import FairSlots

T = TypeVar("T")

# llguidance compiles by recursion, and a stack that is too small ends the process. A thread's own one depends on
# `ulimit -s`, and is small where that says unlimited. Twice of what the trial has.
STACK_BYTES: Final = 8 * 1024 * 1024


class Lane:
    """Does one thing after the other; who waits gets on by what its key has taken so far, divided by its weight.

    Used on one event loop. The queue is as long as admission lets it become.
    """

    def __init__(self, name: str) -> None:
        """`name` is the thread's."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        before = threading.stack_size(STACK_BYTES)
        self._thread.submit(int).result()  # begins the thread
        threading.stack_size(before)
        self._turns = FairSlots(1)

    async def run(self, share: Share, work: Callable[[], T]) -> T:
        """Wait for a turn, and for the work.

        Who is cancelled leaves what has begun to end by itself, and pays for it.
        """
        await self._turns.acquire(share)
        loop, began_at = asyncio.get_running_loop(), time.monotonic()
        try:
            done = self._thread.submit(work)
        except RuntimeError:  # closed
            self._turns.release()
            raise

        def end(_: object) -> None:
            with suppress(RuntimeError):  # the loop has ended, too
                loop.call_soon_threadsafe(self._end_turn, share, began_at)

        # before whoever waits for it is told, so that the turn is over then
        done.add_done_callback(end)
        return await asyncio.wrap_future(done)

    def close(self) -> None:
        """End the thread, without waiting for what has begun."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _end_turn(self, share: Share, began_at: float) -> None:
        milliseconds = 1e3 * (time.monotonic() - began_at)
        self._turns.charge(share, 1 + int(milliseconds))
        self._turns.release()
