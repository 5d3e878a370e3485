"""All streams that may be resumed, by their names and within the limits of what is kept."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Final

from inference_worker.errors import InvalidField, StreamNotFound
from inference_worker.field_rules import refuse_unknown_fields
from inference_worker.kept_shares import KeptShares
from inference_worker.kept_stream import KeptStream
from inference_worker.origin import Origin
from inference_worker.replay import MESSAGE_OVERHEAD, Replay
from inference_worker.resume_terms import ResumeTerms
from inference_worker.settings import WorkerSettings
from protos.sluice.v1 import generation_pb2 as pb

# What another worker would need to go on with a stream takes no more than this part of the stream's bytes.
_MAX_ORIGIN_SHARE: Final = 4


@dataclass(frozen=True, slots=True)
class ReplayLimits:
    """How much is kept."""

    max_seconds: float  # after a stream's end, or without a reader
    max_messages: int  # of one stream
    max_bytes: int  # of one stream
    max_streams: int
    max_total_bytes: int

    @classmethod
    def of(cls, settings: WorkerSettings) -> ReplayLimits:
        """Those that are set."""
        return cls(
            settings.max_resume_seconds,
            settings.replay_messages,
            settings.replay_bytes,
            settings.replay_streams,
            settings.replay_total_bytes,
        )


class KeptStreams:
    """Used from the event loop only.

    Invariant: `num_bytes` is at most `max_total_bytes` and, of each stream, one message; those streams that have not
    begun left aside, with what they bring, since they make room only once they do: a request that is refused takes
    nothing from anybody. Streams of the key that has most make way first, `KeptShares` says how: of one key those that
    have ended, longest ended first, then those that are parked, longest parked first. Where that is not enough a new
    stream is not kept, and one that grows loses its oldest messages.
    """

    def __init__(self, limits: ReplayLimits) -> None:
        self._limits = limits
        self._streams: dict[str, KeptStream] = {}  # by resume id
        self._tagged: dict[
            tuple[str, str], KeptStream
        ] = {}  # by key id and tag; the latest of each
        self._shares = KeptShares()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._streams)

    @property
    def num_parked(self) -> int:
        """How many of them wait for a reader to go on. Any thread may ask."""
        return self._shares.num_parked

    def open(self, terms: ResumeTerms, origin: Origin | None = None) -> KeptStream | None:
        """Begin to keep a stream; None if there is no room for it. With an origin another worker may go on with it."""
        limits = self._limits
        terms = replace(terms, window=min(terms.window, limits.max_seconds))
        room = limits.max_bytes - len(terms.annotation)
        if terms.window == 0 or room <= MESSAGE_OVERHEAD:
            return None
        if origin is not None:
            origin.limit(room // _MAX_ORIGIN_SHARE)
        size = terms.num_bytes + (0 if origin is None else origin.num_bytes)
        if not self._could_hold(terms.key_id, size):
            return None
        if terms.resume_id in self._streams:
            terms = replace(terms, resume_id=None)
        first = terms.header_number or 0
        self._shares.add(terms)
        self.num_bytes += terms.num_bytes
        grow = partial(self._grow, terms.key_id)
        replay = Replay(limits.max_messages, room, grow, first)
        stream = KeptStream(terms, replay, self, origin)
        self._streams[stream.resume_id] = stream
        return stream

    def find(self, resume: pb.Resume, key_id: str) -> KeptStream:
        """The stream that a caller means. Raises: StreamNotFound, also if it is another key's; InvalidField."""
        refuse_unknown_fields(resume, "resume")
        if bool(resume.resume_id) == bool(resume.resume_tag):
            raise InvalidField("resume.resume_id", "give either resume_id or resume_tag")
        if resume.is_continuable and resume.snapshot:
            raise InvalidField("resume.is_continuable", "not together with snapshot")
        if resume.resume_tag:
            stream = self._tagged.get((key_id, resume.resume_tag))
        else:
            stream = self.get(resume.resume_id, key_id)
        if stream is None or stream.is_forgotten:
            raise StreamNotFound
        return stream

    def get(self, resume_id: str, key_id: str | None) -> KeptStream | None:
        """The stream of this name, if it is the key's; None means anybody's."""
        stream = self._streams.get(resume_id)
        if stream is None or stream.is_forgotten or not (key_id is None or stream.is_of(key_id)):
            return None
        return stream

    async def wait_unread(self, seconds: float) -> None:
        """Wait until the readers of streams that have ended have read all, but not longer than this."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                for stream in self._shares.ended():
                    await stream.wait_unread()

    def close(self) -> None:
        """Keep nothing any longer."""
        for stream in list(self._streams.values()):
            stream.cancel()

    def note_begin(self, stream: KeptStream) -> None:
        """It has its place now, and its tag means it; a request that is refused takes no other's."""
        surplus = max(0, len(self._streams) - self._limits.max_streams)
        for other in list(islice(self._shares.making_way(stream.terms.key_id), surplus)):
            other.cancel()
        if stream.terms.tag is not None:
            self._tagged[stream.terms.key_id, stream.terms.tag] = stream

    def has_room(self, stream: KeptStream) -> bool:
        """Whether there is room for a message more of it, once others have made way."""
        while self.num_bytes >= self._limits.max_total_bytes:
            other = next(self._shares.making_room(stream.terms.key_id), None)
            if other is None or other is stream:  # which has messages of its own to drop
                return False
            other.cancel()
        return True

    def note_end(self, stream: KeptStream) -> None:
        """It may go when there is no room for others."""
        if self._has(stream):
            self._shares.note_end(stream)

    def note_parked(self, stream: KeptStream) -> None:
        """It may go when there is no room for others; or it goes on."""
        if self._has(stream):
            self._shares.note_parked(stream)

    def note_forgotten(self, stream: KeptStream) -> None:
        """Its names mean nothing any longer."""
        stream.replay.clear()
        self._shares.remove(stream)
        self.num_bytes -= stream.terms.num_bytes
        del self._streams[stream.resume_id]
        tag = (stream.terms.key_id, stream.terms.tag or "")
        if self._tagged.get(tag) is stream:
            del self._tagged[tag]

    def _has(self, stream: KeptStream) -> bool:
        return self._streams.get(stream.resume_id) is stream

    def _could_hold(self, key_id: str, size: int) -> bool:
        """Whether one more stream of the key and of so many bytes has a place, if all that may go made way."""
        surplus = len(self._streams) + 1 - self._limits.max_streams
        excess = self.num_bytes + size + 1 - self._limits.max_total_bytes
        going: set[KeptStream] = set()
        if surplus > 0:
            going.update(islice(self._shares.making_way(key_id, more=1), surplus))
            surplus -= len(going)
            excess -= sum(stream.num_bytes for stream in going)
        if surplus > 0:
            return False
        for stream in self._shares.making_room(key_id, more=size) if excess > 0 else ():
            if stream not in going:
                excess -= stream.num_bytes
            if excess <= 0:
                break
        return excess <= 0

    def _grow(self, key_id: str, size: int) -> None:
        self.num_bytes += size
        self._shares.grow(key_id, size)
