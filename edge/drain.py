"""Which generations run, and how they end when the edge stops."""

import asyncio
import contextlib
from collections.abc import Iterator

from edge.errors import unavailable
from edge.generation import Generation

_FAREWELL_SECONDS = 1.0


class Drain:
    """Counts running generations, refuses new ones once the edge stops, and ends those that stay."""

    def __init__(self) -> None:
        self._running: set[Generation] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self.is_stopping = False
        self._refusing = asyncio.Event()

    async def refusing(self) -> None:
        """Returns when new generations are refused."""
        await self._refusing.wait()

    def require_open(self) -> None:
        """Raises a 503 when new generations are refused."""
        if self._refusing.is_set():
            raise unavailable("The server is shutting down.")

    def count(self) -> int:
        """Generations that run."""
        return len(self._running)

    @contextlib.contextmanager
    def running(self, generation: Generation) -> Iterator[None]:
        """Holds the shutdown back while a generation runs; raises a 503 when it has begun."""
        self.require_open()
        self._running.add(generation)
        self._idle.clear()
        try:
            yield
        finally:
            self._running.discard(generation)
            if not self._running:
                self._idle.set()

    async def run(self, unready_seconds: float, drain_seconds: float) -> int:
        """Not ready, then refusing, then waiting, then a final error to the rest. Returns how many those were."""
        self.is_stopping = True
        await asyncio.sleep(unready_seconds)
        self._refusing.set()
        if await self._is_idle_within(drain_seconds):
            return 0
        ended = len(self._running)
        for generation in list(self._running):
            reason = unavailable("The server shut down before the end of the generation.")
            reason.is_resumable = True
            generation.stop(reason)
        await self._is_idle_within(_FAREWELL_SECONDS)
        return ended

    async def _is_idle_within(self, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)
        return self._idle.is_set()
