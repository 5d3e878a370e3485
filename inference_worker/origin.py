"""Where a kept stream comes from: what another worker needs to go on with it, for who resumes it to have at hand."""

from __future__ import annotations

import asyncio
import time
from typing import Final

from inference_worker.deadline import write_timeout
from inference_worker.delivered_choices import DeliveredChoices
from inference_worker.errors import StreamGone
from inference_worker.replay import Replay
from protos.sluice.v1 import generation_pb2 as pb

# What only the caller may say, what is said anew, and what is kept elsewhere.
_LEFT_OUT: Final = ("caller", "request_id", "continuation", "timeout", "annotation")
# Messages that are added up before others have their turn.
_SUM_AT_ONCE: Final = 100


class Origin:
    """The request, the header, and the sum of the messages that are no longer kept. Used from the event loop only.

    When it has become too large it is let go, and with it that another worker could go on with the stream.
    """

    def __init__(self, message: pb.GenerateRequest, deadline: float | None) -> None:
        """`deadline`, in time.monotonic's seconds, is when the generation ends in any case."""
        request = pb.GenerateRequest()
        request.CopyFrom(message)
        for name in _LEFT_OUT:
            request.ClearField(name)
        self._request = request.SerializeToString()
        self._deadline = deadline
        self._started = b""
        self._dropped = DeliveredChoices(message.continuation.choices)
        self._max_bytes: int | None = None
        self._is_let_go = False

    @property
    def num_bytes(self) -> int:
        """What it takes."""
        if self._is_let_go:
            return 0
        return len(self._request) + len(self._started) + self._dropped.num_bytes

    def limit(self, max_bytes: int) -> None:
        """Take no more than this."""
        self._max_bytes = max_bytes
        self._check_size()

    def begin(self, started: pb.Started) -> None:
        """Add the header."""
        self._started = started.SerializeToString()
        self._check_size()

    def drop(self, message: bytes) -> None:
        """Add a message that is no longer kept; they come in order."""
        if not self._is_let_go:
            self._dropped.add(pb.GenerateResponse.FromString(message))
            self._check_size()

    async def tell(
        self, resumed: pb.Resumed, replay: Replay, number: int, seconds_left: float | None
    ) -> None:
        """What a caller needs who has what comes before this number; nothing if it was let go.

        `seconds_left` are those of a generation whose clock may stand still. Raises: StreamGone.
        """
        delivered = None
        while delivered is None:
            delivered = await self._add_up(replay, number)
            if replay.first > number:
                raise StreamGone(replay.first)
            if self._is_let_go:
                return
        resumed.request.MergeFromString(self._request)
        if seconds_left is None and self._deadline is not None:
            seconds_left = self._deadline - time.monotonic()
        if seconds_left is not None:
            write_timeout(resumed.request, seconds_left)
        resumed.started.MergeFromString(self._started)
        resumed.choices.extend(delivered)

    async def _add_up(self, replay: Replay, end: int) -> DeliveredChoices | None:
        """All messages before this number; None if any of them was dropped meanwhile."""
        delivered = self._dropped.copy()
        for number in range(replay.first, end):
            if number % _SUM_AT_ONCE == 0:
                await asyncio.sleep(0)
            if number < replay.first or (message := replay.read(number)) is None:
                return None
            delivered.add(message)
        return delivered

    def _check_size(self) -> None:
        if self._max_bytes is not None and self.num_bytes > self._max_bytes:
            self._is_let_go = True
            self._request, self._started, self._dropped = b"", b"", DeliveredChoices()
