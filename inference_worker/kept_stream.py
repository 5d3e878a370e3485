"""A stream that outlives its call: a task writes its messages into a ring, and calls read them from there."""

from __future__ import annotations

import asyncio
import hmac
import secrets
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final, Protocol

from inference_worker.engine.event import FinishReason
from inference_worker.errors import (
    DeadlinePassed,
    InternalError,
    InvalidField,
    SluiceError,
    StreamGone,
)
from inference_worker.parkable import Messages, Parkable
from inference_worker.replay import Replay
from inference_worker.request_log import get_logger
from inference_worker.stream_reader import StreamReader
from protos.sluice.v1 import generation_pb2 as pb

_ID_BYTES: Final = 24  # 192 random bits


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
    is_continuable: bool = False  # whether the one that began it may continue it
    parked_bytes: int = 0  # that its request takes, if it is kept to be parked
    # Of a stream that another worker began:
    resume_id: str | None = None  # its name there
    header_number: int | None = None  # of the header here; there it was another message's

    @property
    def num_bytes(self) -> int:
        """What is kept besides the messages."""
        return len(self.annotation) + self.parked_bytes


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

    It runs to its end whoever reads, but for one that is parked while nobody does. When its reader goes away its window
    begins, and when that has passed the generation is cancelled; after its end it is kept for one window. There is one
    reader at a time: the newest.
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
        self._reader: StreamReader | None = None
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()  # of the tasks, which write one after the other
        self._parkable: Parkable | None = None
        self.is_parked = False
        self._is_left = False  # its reader has gone away
        self._is_waking = False  # somebody has come back, and it has no place yet
        self._arm()  # should nobody ever read

    @property
    def is_read(self) -> bool:
        """Whether somebody reads it now."""
        return self._reader is not None

    @property
    def num_bytes(self) -> int:
        """What it takes."""
        return self.replay.num_bytes + self.terms.num_bytes

    def is_of(self, key_id: str) -> bool:
        """Whether the key is the one that began it."""
        return hmac.compare_digest(self.terms.key_id.encode(), key_id.encode())

    def start(self, messages: Messages | Parkable) -> None:
        """Begin to write the messages into the ring."""
        if isinstance(messages, Parkable):
            self._parkable = messages
            self._parkable.on_end = self._end_parked
            messages = messages.messages()
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
            while self._is_waking:
                reader.news.clear()
                await reader.news.wait()
                reader.check()
            while True:
                reader.news.clear()
                while (message := self.replay.read(number)) is not None:
                    self._is_begun = True
                    number += 1
                    reader.move(number)
                    yield self._shown(message, is_resumed=is_resumed)
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
            yield self._shown(message, is_resumed=True)
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

    def _shown(self, message: pb.GenerateResponse, *, is_resumed: bool) -> pb.GenerateResponse:
        """A message as its reader gets it."""
        terms = self.terms
        if message.HasField("delta"):
            if not (terms.sends_token_ids or (terms.is_continuable and not is_resumed)):
                message.delta.ClearField("token_ids")
        elif is_resumed and message.HasField("started") and terms.annotation:
            message.started.annotation = terms.annotation
        return message

    async def _fill(self, messages: Messages) -> None:
        async with self._turn:
            await self._write(messages)

    async def _write(self, messages: Messages) -> None:
        try:
            async with aclosing(messages):
                async for message in messages:
                    if message.HasField("started") and not self._begin(message.started):
                        continue
                    await self._make_room()
                    self.replay.append(message)
                    if self._parkable is not None:
                        self._parkable.take(message)
                    self._tell_reader()
                    if self._is_left:  # since before it had begun
                        self._park()
        except SluiceError as error:
            if self._is_waking:
                self._stay_parked(error)
            else:
                self._end(error)
        except asyncio.CancelledError:
            is_last = asyncio.current_task() is self._task and not self.is_parked
            if self._is_kept and is_last:  # not by us: whoever reads must not wait for ever
                self._end(InternalError(self.request_id))
            raise
        except Exception as error:
            get_logger().error("bug", request_id=self.request_id, exc_info=error)
            self._end(InternalError(self.request_id))
        else:
            self._end(None)

    def _is_full(self) -> bool:
        return self.replay.is_full or not self._keeper.has_room()

    async def _make_room(self) -> None:
        """Drop the oldest messages where there is no room for one more.

        What a reader has yet to read stays: this waits for it, and what the engine does meanwhile is joined to one
        delta a choice, as for any slow reader.
        """
        while self._is_full():
            reader = self._reader
            if reader is not None and reader.number <= self.replay.first < self.replay.end:
                reader.moved.clear()
                await reader.moved.wait()
            elif not self.replay.drop_oldest():
                return

    def _begin(self, started: pb.Started) -> bool:
        """It was admitted. False: again, which nobody need be told."""
        if self.request_id is not None:
            self._is_waking = False
            self._tell_reader()
            return False
        self.request_id = started.request_id
        started.resume_id = self.resume_id
        started.resume_window.FromNanoseconds(round(self.terms.window * 1e9))
        is_parkable = self._parkable is not None
        started.while_unread = pb.WHILE_UNREAD_PARK if is_parkable else pb.WHILE_UNREAD_CONTINUE
        self._keeper.note_begin(self)
        return True

    def _park(self) -> None:
        """Nobody reads: have the generation leave the engine, if it can come back."""
        parkable = self._parkable
        if parkable is None or not parkable.is_begun or parkable.is_whole or self._task is None:
            return
        self.is_parked = True
        self._is_waking = False
        parkable.park()
        self._task.cancel()

    def _wake(self, parkable: Parkable) -> None:
        """Somebody reads again."""
        if parkable.is_late:
            self._end_parked(FinishReason.DEADLINE)
            return
        self.is_parked = False
        self._is_waking = True
        self._task = asyncio.create_task(self._fill(parkable.messages()), name="kept stream")

    def _stay_parked(self, error: SluiceError) -> None:
        """It found no place again."""
        if self._parkable is None:
            return
        self._is_waking = False
        self.is_parked = True
        self._parkable.park()
        if isinstance(error, DeadlinePassed):
            self._end_parked(FinishReason.DEADLINE)
        elif error.retry_after is None:  # nor will it
            self._end_parked(FinishReason.CANCELLED, error)
        elif self._reader is not None:
            self._reader.refuse(error)

    def _end_parked(self, reason: FinishReason, error: SluiceError | None = None) -> bool:
        """Its last messages, or the error in their place. False: it has its place."""
        if not (self.is_parked or self._is_waking) or self._parkable is None:
            return False
        self.is_parked = False
        if self._task is not None:
            self._task.cancel()
            self._task = None
        for message in () if error else self._parkable.footers(reason):
            while self._is_full() and self.replay.drop_oldest():
                pass
            self.replay.append(message)
        self._parkable.forget()
        self._end(error)
        return True

    def _end(self, error: SluiceError | None) -> None:
        self.is_over = True
        self._is_waking = False
        self._error = error
        self._tell_reader()
        if self.request_id is None:  # it was refused, and its caller is told
            self._forget()
            return
        self._keeper.note_end(self)
        self._arm()

    def _attach(self, number: int) -> StreamReader:
        if self._reader is not None:
            self._reader.replace()
        elif not self.is_over:
            self._disarm()
        self._reader = StreamReader(number)
        self._is_left = False
        if self.is_parked and self._parkable is not None:
            self._wake(self._parkable)
        return self._reader

    def _detach(self, reader: StreamReader) -> None:
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
            self._is_left = True
            self._park()
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
            if self._parkable is not None:
                self._parkable.forget()
            self._keeper.note_forgotten(self)
