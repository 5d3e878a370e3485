"""The places of an engine that a user brought: so many at once, and those who wait get them in fair order."""

from __future__ import annotations

import asyncio

from inference_worker.engine.fair_queue import FairQueue, Share


class FairSlots:
    """Used on the engine's own loop. Invariant: nobody waits while a place is free."""

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
            if turn.done() and not turn.cancelled():  # it came at this very moment
                self.release()
            else:
                self._queue.remove(turn)
            raise

    def release(self) -> None:
        """Give a place back."""
        if not self._queue:
            self._num_free += 1
            return
        turn = self._queue.first()
        self._queue.remove(turn)
        turn.set_result(None)

    def charge(self, share: Share, tokens: int) -> None:
        """Tokens were served."""
        self._queue.charge(share, tokens)
