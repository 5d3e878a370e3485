"""Places for work that not everybody can do at once: those who wait get them in fair order."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from inference_worker.engine.fair_queue import FairQueue, Share


class FairSlots:
    """Used on one event loop. Invariant: nobody waits while a place is free."""

    def __init__(self, number: int) -> None:
        self._num_free = number
        self._queue: FairQueue[asyncio.Future[None]] = FairQueue()

    def position(self, share: Share) -> int:
        """How many are likely to get a place before one that comes now."""
        return 0 if self._num_free else self._queue.position(share)

    async def acquire(self, share: Share) -> None:
        """Take a place, or wait for one."""
        if self._num_free:
            self._num_free -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._queue.add(turn, share)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                with suppress(ValueError):  # if nobody has passed it over meanwhile
                    self._queue.remove(turn)
            else:  # it came at this very moment
                self.release()
            raise

    def release(self) -> None:
        """Give a place back."""
        while self._queue:
            turn = self._queue.first()
            self._queue.remove(turn)
            if not turn.cancelled():
                turn.set_result(None)
                return
        self._num_free += 1

    def charge(self, share: Share, amount: int) -> None:
        """So much was served: tokens, or whatever else is counted."""
        self._queue.charge(share, amount)
