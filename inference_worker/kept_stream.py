"""A stream that outlives its call: a task writes its messages into a ring, and calls read them from there."""

from __future__ import annotations

import asyncio
import hmac
import secrets
from contextlib import aclosing
from typing import Final

from google.protobuf import timestamp_pb2

from inference_worker.engine.event import FinishReason
from inference_worker.errors import (
    DeadlinePassed,
    InternalError,
    InvalidField,
    SluiceError,
    StreamGone,
)
from inference_worker.keeper import Keeper
from inference_worker.origin import Origin
from inference_worker.parkable import Messages, Parkable
from inference_worker.replay import Replay
from inference_worker.request_log import get_logger
from inference_worker.resume_terms import ResumeTerms
from inference_worker.resume_window import ResumeWindow
from inference_worker.stream_reader import StreamReader
from protos.sluice.v1 import generation_pb2 as pb

_ID_BYTES: Final = 24  # 192 random bits


class KeptStream:
    """One stream. Used from the event loop only.

    It runs to its end whoever reads, but for one that is parked while nobody does. When its reader goes away its window
    begins, and when that has passed the generation is cancelled; after its end it is kept for one window. There is one
    reader at a time: the newest.
    """

    def __init__(
        self, terms: ResumeTerms, replay: Replay, keeper: Keeper, origin: Origin | None = None
    ) -> None:
        self.resume_id = terms.resume_id or f"rs_{secrets.token_hex(_ID_BYTES)}"
        self.terms = terms
        self.replay = replay
        self.request_id: str | None = None  # known once it has begun
        self.is_over = False  # all of its messages are there
        self._keeper = keeper
        self._created_at = timestamp_pb2.Timestamp()
        self._origin = origin
        self._is_kept = True
        self.is_forgotten = False  # but for its reader
        self._is_expired = False  # and kept for its reader alone
        self._error: SluiceError | None = None  # what it ended with, if it failed
        self._is_begun = False  # somebody has read of it
        self._reader: StreamReader | None = None
        self._window = ResumeWindow(terms.window, self._expire)
        self._task: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()  # of the tasks, which write one after the other
        self._parkable: Parkable | None = None
        self._count_beside()
        self.is_parked = False
        self._is_left = False  # its reader has gone away
        self._is_waking = False  # somebody has come back, and it has no place yet
        self._window.begin()  # should nobody ever read

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

    def resume(self, number: int, *, is_snapshot: bool, is_continuable: bool) -> Messages:
        """The messages from this number on: to the stream's end, or those that there are now.

        With `is_continuable` its reader may go on with it at another worker, and is first told how.

        Raises: InvalidField, if the number before has not been read by anybody; StreamGone, if this one is no longer
        kept, or another worker had it; once iterated, as `read`. Who is refused takes the stream from nobody.
        """
        if number < (first := self._first):
            raise StreamGone(first)
        if number > self.replay.next_unread:
            raise InvalidField(
                "resume.after_sequence_number", f"there is no message {number - 1} yet"
            )
        if is_snapshot:
            return self._read_snapshot(number)
        return self._read_again(number, is_continuable=is_continuable)

    def read(self) -> Messages:
        """All messages, for who began it. Raises, once iterated: as `resume`'s."""
        return self._read(
            self.terms.header_number or 0,
            is_resumed=False,
            has_token_ids=self.terms.sends_token_ids or self.terms.is_continuable,
        )

    async def _read_again(self, number: int, *, is_continuable: bool) -> Messages:
        if is_continuable:
            resumed = pb.Resumed(created_at=self._created_at)
            if self._origin is not None:
                left = None if self._parkable is None else self._parkable.seconds_left
                await self._origin.tell(resumed, self.replay, number, left)
            if is_continuable := resumed.HasField("request"):
                resumed.request.annotation = self.terms.annotation
            yield pb.GenerateResponse(resumed=resumed)
        has_token_ids = self.terms.sends_token_ids or is_continuable
        messages = self._read(number, is_resumed=True, has_token_ids=has_token_ids)
        async with aclosing(messages):
            async for message in messages:
                yield message

    async def _read(self, number: int, *, is_resumed: bool, has_token_ids: bool) -> Messages:
        """The messages from this number on, to the stream's end. Takes it over from whoever reads it.

        Raises: SluiceError, which may be TakenOver, StreamGone, or what the stream failed with.
        """
        if not self._is_kept or number < self.replay.first:  # any longer, since it was found
            raise StreamGone(self._first)
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
                    yield self.terms.shown(
                        message, is_resumed=is_resumed, has_token_ids=has_token_ids
                    )
                    reader.check()
                if self.is_over:
                    break
                await reader.news.wait()
                reader.check()
        finally:
            self._detach(reader)
        if self._error is not None:
            raise self._error.alike()

    async def _read_snapshot(self, number: int) -> Messages:
        is_over = self.is_over
        for there in range(number, self.replay.end):
            if (message := self.replay.read(there)) is None:  # joined meanwhile
                break
            yield self.terms.shown(
                message, is_resumed=True, has_token_ids=self.terms.sends_token_ids
            )
        if is_over and self._error is not None:
            raise self._error.alike()

    @property
    def _first(self) -> int:
        """Number of the first message that can be read again. A header in place of another worker's message cannot."""
        header = self.terms.header_number
        return max(self.replay.first, header + 1) if header else self.replay.first

    async def wait_unread(self) -> None:
        """Wait until its present reader has gone."""
        if self._reader is not None:
            await self._reader.left.wait()

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
                    self._count_beside()
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
        return self.replay.is_full or not self._keeper.has_room(self)

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
            elif not self._drop_oldest():
                return

    def _drop_oldest(self) -> bool:
        """Drop the oldest message. False: there is none."""
        if (dropped := self.replay.drop_oldest()) is None:
            return False
        if self._origin is not None:
            self._origin.drop(dropped)
            self._count_beside()
        return True

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
        self._created_at.CopyFrom(started.created_at)
        if self._origin is not None:
            self._origin.begin(started)
        self._keeper.note_begin(self)
        return True

    def _count_beside(self) -> None:
        """Count what is kept besides the messages, so that another worker or this one can go on after them."""
        kept = (self._origin, self._parkable)
        self.replay.count_beside(sum(each.num_bytes for each in kept if each is not None))

    def _park(self) -> None:
        """Nobody reads: have the generation leave the engine, if it can come back."""
        parkable = self._parkable
        if parkable is None or not parkable.can_park or self._task is None:
            return
        self._set_parked(True)
        self._is_waking = False
        parkable.park()
        self._task.cancel()
        # One that was cancelled holds on to what its code had at hand: all of the part.
        self._task = None

    def _set_parked(self, is_parked: bool) -> None:
        if is_parked is not self.is_parked:
            self.is_parked = is_parked
            self._keeper.note_parked(self)

    def _wake(self, parkable: Parkable) -> None:
        """Somebody reads again."""
        if parkable.is_late:
            self._stay_parked(DeadlinePassed())
            return
        self._set_parked(False)
        self._is_waking = True
        self._task = asyncio.create_task(self._fill(parkable.messages()), name="kept stream")

    def _stay_parked(self, error: SluiceError) -> None:
        """It found no place again."""
        if self._parkable is None:
            return
        self._is_waking = False
        self._set_parked(True)
        self._parkable.park()
        if isinstance(error, DeadlinePassed) and self._parkable.has_tokens:
            self._end_parked(FinishReason.DEADLINE)
        elif error.retry_after is None:  # nor will it
            self._end_parked(FinishReason.CANCELLED, error)
        elif self._reader is not None:
            self._reader.refuse(error)

    def _end_parked(self, reason: FinishReason, error: SluiceError | None = None) -> bool:
        """Its last messages, or the error in their place. False: it has its place."""
        if not (self.is_parked or self._is_waking) or self._parkable is None:
            return False
        self._set_parked(False)
        if self._task is not None:
            self._task.cancel()
            self._task = None
        for message in () if error else self._parkable.footers(reason):
            while self._is_full() and self._drop_oldest():
                pass
            self.replay.append(message)
        self._end(error)
        return True

    def _end(self, error: SluiceError | None) -> None:
        self.is_over = True
        self._set_parked(False)
        self._is_waking = False
        if self._parkable is not None:
            self._parkable.forget()
            self._count_beside()
        self._error = None if error is None else error.alike()
        self._task = None
        self._tell_reader()
        if self.request_id is None:  # it was refused, and its caller is told
            self._forget()
            return
        self._keeper.note_end(self)
        self._window.begin()

    def _attach(self, number: int) -> StreamReader:
        if self._reader is not None:
            self._reader.replace()
        elif not self.is_over:
            self._window.stop()
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
            self._window.begin()
            self._is_left = True
            self._park()
        else:  # nobody knows the name to come back with
            self.cancel()

    def _tell_reader(self) -> None:
        if self._reader is not None:
            self._reader.news.set()

    def _expire(self) -> None:
        if self.is_read:  # it is over: its reader may read on
            self._is_expired = True
        else:
            self.cancel()

    def _forget(self) -> None:
        self._window.stop()
        if self._is_kept:
            self._is_kept = False
            if self._parkable is not None:
                self._parkable.forget()
            self._keeper.note_forgotten(self)
