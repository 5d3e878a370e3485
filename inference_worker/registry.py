"""The requests inside the worker by id, and the ids of those that ended lately."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Protocol

from inference_worker.engine.event import FinishReason
from inference_worker.errors import RequestExists
from protos.sluice.v1 import generation_pb2 as pb

_MAX_ENDED: Final = 4096


class Endable(Protocol):
    """A request that can be told to end."""

    def end(self, reason: FinishReason) -> bool:
        """End it now; its reader is told the reason. False: it has ended, and its reader still reads."""
        ...


class Registry:
    """Who is inside, and who was here. Used from the event loop only."""

    def __init__(self) -> None:
        self._inside: dict[str, tuple[Endable, str]] = {}  # and whose it is, by key_id
        self._parked: dict[str, tuple[Endable, str]] = {}  # not inside, and may come back
        self._ended: OrderedDict[str, str] = OrderedDict()  # whose it was
        self._is_empty = asyncio.Event()
        self._is_empty.set()

    def __len__(self) -> int:
        return len(self._inside)

    def check_free(self, request_id: str, parked: Endable | None = None) -> None:
        """Check that no request has this id but, if that comes back, the parked one. Raises: RequestExists."""
        other, _ = self._parked.get(request_id, (parked, ""))
        if request_id in self._inside or other is not parked:
            raise RequestExists(request_id)

    @contextmanager
    def hold(self, request_id: str, request: Endable, key_id: str = "") -> Iterator[None]:
        """Keep a key's request inside for the length of the block. Its id must be free, or its own."""
        self._parked.pop(request_id, None)
        self._inside[request_id] = (request, key_id)
        self._ended.pop(request_id, None)
        self._is_empty.clear()
        try:
            yield
        finally:
            del self._inside[request_id]
            self._ended[request_id] = key_id
            if len(self._ended) > _MAX_ENDED:
                self._ended.popitem(last=False)
            if not self._inside:
                self._is_empty.set()

    def park(self, request_id: str, request: Endable, key_id: str) -> None:
        """Keep the id of a key's request that leaves now and may come back."""
        self._parked[request_id] = (request, key_id)

    def forget_parked(self, request_id: str, request: Endable) -> None:
        """It does not come back."""
        if self._parked.get(request_id, (None, ""))[0] is request:
            del self._parked[request_id]

    def abort(self, request_id: str, key_id: str | None = None) -> pb.AbortOutcome.ValueType:
        """End a request, and say what was found. With a `key_id`, that of another key is unknown."""
        known = self._parked.get(request_id) or self._inside.get(request_id)
        request, owner = known or (None, self._ended.get(request_id))
        if key_id is not None and owner != key_id:
            return pb.ABORT_OUTCOME_UNKNOWN
        if request is not None:
            has_effect = request.end(FinishReason.CANCELLED)
            return pb.ABORT_OUTCOME_ABORTED if has_effect else pb.ABORT_OUTCOME_ALREADY_FINISHED
        if request_id in self._ended:
            return pb.ABORT_OUTCOME_ALREADY_FINISHED
        return pb.ABORT_OUTCOME_UNKNOWN

    def end_all(self, reason: FinishReason) -> None:
        """End every request."""
        for request, _ in list(self._inside.values()):
            request.end(reason)

    async def wait_empty(self, seconds: float) -> bool:
        """Wait until the last request has left; False if that takes longer."""
        try:
            async with asyncio.timeout(seconds):
                await self._is_empty.wait()
        except TimeoutError:
            return False
        return True
