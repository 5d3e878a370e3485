"""When the requests inside have to end."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator
from typing import Final

from inference_worker.engine.request import Request

SPARE: Final = 64  # of requests that ended before theirs, besides as many as are alive


class Deadlines:
    """The deadlines of requests, the earliest first. Bounded: those of requests that have ended are dropped in time."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int]] = []  # with keys of requests that may have ended

    def __len__(self) -> int:
        """How many are kept, those of ended requests among them."""
        return len(self._heap)

    def add(self, request: Request, live: Collection[int]) -> None:
        """Note a request's deadline, if it has one. `live`: the keys of all that have not ended, its own among them."""
        if request.deadline is None:
            return
        if len(self._heap) > 2 * len(live) + SPARE:
            self._heap = [entry for entry in self._heap if entry[1] in live]
            heapq.heapify(self._heap)
        heapq.heappush(self._heap, (request.deadline, request.key))

    def pop_passed(self, now: float) -> Iterator[int]:
        """Give and forget the keys of requests whose deadline has passed; some may have ended."""
        while self._heap and self._heap[0][0] <= now:
            yield heapq.heappop(self._heap)[1]
