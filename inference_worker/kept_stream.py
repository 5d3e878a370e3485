"""A stream that outlives its call: a task writes its messages into a ring, and calls read them from there."""

from __future__ import annotations

import asyncio
import hmac
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final, Protocol

from inference_worker.errors import InternalError, InvalidField, SluiceError, StreamGone, TakenOver
from inference_worker.replay import Replay
from inference_worker.request_log import get_logger
from protos.sluice.v1 import generation_pb2 as pb

_ID_BYTES: Final = 24  # 192 random bits

Messages = AsyncGenerator[pb.GenerateResponse, None]


@dataclass(frozen=True, slots=True)
class ResumeTerms:
    """What a request asked for besides its stream."""

    window: float  # seconds
    key_id: str  # empty where there are no keys
    tag: str | None
    annotation: bytes
    sends_token_ids: bool = (
        True  # also to those who resume it; else only a caller that may continue it gets them
    )
    # Of a stream that another worker began:
    resume_id: str | None = None  # its name there
    header_number: int | None = None  # of the header here; there it was another message's


class Keeper(Protocol):
    """Who keeps streams, and is told what becomes of them."""

    def note_begin(self, stream: KeptStream) -> None:
        """It was admitted."""
        ...

    def has_room(self) -> bool:
        """Whether a message more may be kept."""
        ...

    def note_end(self, stream: KeptStream) -> None:
        """All of its messages are there."""
        ...

    def note_forgotten(self, stream: KeptStream) -> None:
        """Nothing of it is to be kept any longer."""
        ...


class KeptStream:
    """One stream. Used from the event loop only.

    It runs to its end whoever reads. When its reader goes away its window begins, and when that has passed the
    generation is cancelled; after its end it is kept for one window. There is one reader at a time: the newest.
    """

    def __init__(self, terms: ResumeTerms, replay: Replay, keeper: Keeper) -> None:
        self.resume_id = terms.resume_id or f"rs_{secrets.token_hex(_ID_BYTES)}"
        self.terms = terms
        self.replay = replay
        self.request_id: str | None = None  # known once it has begun
        self.is_over = False  # all of its messages are there
        self._keeper = keeper
        self._is_kept = True
        self.is_forgotten = False  # but for its reader
        self._is_expired = False  # and kept for its reader alone
        self._error: SluiceError | None = None  # what it ended with, if it failed
        self._is_begun = False  # somebody has read of it
        self._reader: _Reader | None = None
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._arm()  # should nobody ever read

    @property
    def is_read(self) -> bool:
        """Whether somebody reads it now."""
        return self._reader is not None

    @property
    def num_bytes(self) -> int:
        """What it takes."""
        return self.replay.num_bytes + len(self.terms.annotation)

    def is_of(self, key_id: str) -> bool:
        """Whether the key is the one that began it."""
        return hmac.compare_digest(self.terms.key_id.encode(), key_id.encode())

    def start(self, messages: Messages) -> None:
        """Begin to write the messages into the ring."""
        self._task = asyncio.create_task(self._fill(messages), name="kept stream")

    def cancel(self) -> None:
        """End the generation and keep nothing."""
        if self._task is not None:
            self._task.cancel()
        self._forget()

    def forget(self) -> None:
        """Keep nothing but what its present reader, if there is one, has yet to read."""
        self.is_forgotten = True
        if not self.is_read:
            self.cancel()

    def resume(self, number: int, *, is_snapshot: bool) -> Messages:
        """The messages from this number on: to the stream's end, or those that there are now.

        Raises: InvalidField, if the number before has not been read by anybody; StreamGone, if this one is no longer
        kept, or another worker had it; once iterated, as `read`. Who is refused takes the stream from nobody.
        """
        if number < (first := self._first):
            raise StreamGone(first)
        if number > self.replay.next_unread:
            raise InvalidField(
                "resume.after_sequence_number", f"there is no message {number - 1} yet"
            )
        return self._read_snapshot(number) if is_snapshot else self.read(number, is_resumed=True)

    async def read(self, number: int | None = None, *, is_resumed: bool = False) -> Messages:
        """The messages from this number or the first on, to the stream's end. Takes it over from whoever reads it.

        Raises: SluiceError, which may be TakenOver, StreamGone, or what the stream failed with.
        """
        if number is None:
            number = self.terms.header_number or 0
        reader = self._attach(number)
        try:
            while True:
                reader.news.clear()
                while (message := self.replay.read(number)) is not None:
                    self._is_begun = True
                    number += 1
                    reader.move(number)
                    yield self._resumed(message) if is_resumed else message
                    reader.check()
                if self.is_over:
                    break
                await reader.news.wait()
                reader.check()
        finally:
            self._detach(reader)
        if self._error is not None:
            raise self._error

    async def _read_snapshot(self, number: int) -> Messages:
        is_over = self.is_over
        for there in range(number, self.replay.end):
            if (message := self.replay.read(there)) is None:  # joined meanwhile
                break
            yield self._resumed(message)
        if is_over and self._error is not None:
            raise self._error

    @property
    def _first(self) -> int:
        """Number of the first message that can be read again. A header in place of another worker's message cannot."""
        header = self.terms.header_number
        return max(self.replay.first, header + 1) if header else self.replay.first

    async def wait_unread(self) -> None:
        """Wait until its present reader has gone."""
        if self._reader is not None:
            await self._reader.left.wait()

    def _resumed(self, message: pb.GenerateResponse) -> pb.GenerateResponse:
        """A message as one who resumes it gets it."""
        if message.HasField("delta") and not self.terms.sends_token_ids:
            message.delta.ClearField("token_ids")
        if message.HasField("started") and self.terms.annotation:
            message.started.annotation = self.terms.annotation
        return message

    async def _fill(self, messages: Messages) -> None:
        try:
            async with aclosing(messages):
                async for message in messages:
                    if message.HasField("started"):
                        self._begin(message.started)
                    await self._make_room()
                    self.replay.append(message)
                    self._tell_reader()
        except SluiceError as error:
            self._end(error)
        except asyncio.CancelledError:
            if self._is_kept:  # not by us: whoever reads must not wait for ever
                self._end(InternalError(self.request_id))
            raise
        except Exception as error:
            get_logger().error("bug", request_id=self.request_id, exc_info=error)
            self._end(InternalError(self.request_id))
        else:
            self._end(None)

    async def _make_room(self) -> None:
        """Drop the oldest messages where there is no room for one more.

        What a reader has yet to read stays: this waits for it, and what the engine does meanwhile is joined to one
        delta a choice, as for any slow reader.
        """
        while self.replay.is_full or not self._keeper.has_room():
            reader = self._reader
            if reader is not None and reader.number <= self.replay.first < self.replay.end:
                reader.moved.clear()
                await reader.moved.wait()
            elif not self.replay.drop_oldest():
                return

    def _begin(self, started: pb.Started) -> None:
        self.request_id = started.request_id
        started.resume_id = self.resume_id
        started.resume_window.FromNanoseconds(round(self.terms.window * 1e9))
        self._keeper.note_begin(self)

    def _end(self, error: SluiceError | None) -> None:
        self.is_over = True
        self._error = error
        self._tell_reader()
        if self.request_id is None:  # it was refused, and its caller is told
            self._forget()
            return
        self._keeper.note_end(self)
        self._arm()

    def _attach(self, number: int) -> _Reader:
        if self._reader is not None:
            self._reader.replace()
        elif not self.is_over:
            self._disarm()
        self._reader = _Reader(number)
        return self._reader

    def _detach(self, reader: _Reader) -> None:
        reader.leave()
        if reader is not self._reader:  # another one reads on
            return
        self._reader = None
        if not self._is_kept:
            return
        if self.is_forgotten:
            self.cancel()
        elif self.is_over:
            if self._is_expired:
                self._forget()
        elif self._is_begun or self.terms.tag is not None:
            self._arm()
        else:  # nobody knows the name to come back with
            self.cancel()

    def _tell_reader(self) -> None:
        if self._reader is not None:
            self._reader.news.set()

    def _arm(self) -> None:
        self._disarm()
        self._timer = self._loop.call_later(self.terms.window, self._expire)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self) -> None:
        if self.is_read:  # it is over: its reader may read on
            self._is_expired = True
        else:
            self.cancel()

    def _forget(self) -> None:
        self._disarm()
        if self._is_kept:
            self._is_kept = False
            self._keeper.note_forgotten(self)


class _Reader:
    """One call that reads."""

    def __init__(self, number: int) -> None:
        self.number = number  # of the message that it reads next
        self.news = asyncio.Event()
        self.moved = asyncio.Event()
        self.left = asyncio.Event()
        self._is_replaced = False

    def move(self, number: int) -> None:
        """It has read what comes before this."""
        self.number = number
        self.moved.set()

    def leave(self) -> None:
        """It reads no more."""
        self.left.set()
        self.moved.set()

    def replace(self) -> None:
        """Another call has taken the stream over."""
        self._is_replaced = True
        self.news.set()
        self.moved.set()

    def check(self) -> None:
        """Raises: TakenOver."""
        if self._is_replaced:
            raise TakenOver
