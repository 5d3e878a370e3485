"""What each key has of the kept streams, and which of them make way where there is no room."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from inference_worker.kept_stream import KeptStream
    from inference_worker.resume_terms import ResumeTerms


@dataclass(slots=True)
class Share:
    """One key's."""

    num_streams: int = 0
    num_bytes: int = 0
    ended: dict[KeptStream, None] = field(default_factory=dict)  # longest ended first
    parked: dict[KeptStream, None] = field(default_factory=dict)  # longest parked first

    def making_way(self) -> Iterator[KeptStream]:
        """Those that nobody reads and that do not run, in the order in which they go."""
        return chain((stream for stream in self.ended if not stream.is_read), self.parked)


class KeptShares:
    """The books of all keys. Used from the event loop only, but for `num_parked`.

    The key that has most makes way first, as in a queue from whose longest flow packets are dropped (longest queue
    drop: Suter, Lakshman, Stiliadis and Choudhury, 1998), and no key does for one that has more: so each is left what
    it has up to an equal share, whatever the others do. What runs, or is read, makes way for nobody.
    """

    def __init__(self) -> None:
        self._shares: dict[str, Share] = {}  # by key id
        self.num_parked = 0

    def add(self, terms: ResumeTerms) -> None:
        """Count one more."""
        share = self._shares.setdefault(terms.key_id, Share())
        share.num_streams += 1
        share.num_bytes += terms.num_bytes

    def grow(self, key_id: str, size: int) -> None:
        """One of this key's takes so many bytes more."""
        if share := self._shares.get(key_id):
            share.num_bytes += size

    def note_end(self, stream: KeptStream) -> None:
        """It may go once nobody reads it."""
        self._shares[stream.terms.key_id].ended[stream] = None

    def note_parked(self, stream: KeptStream) -> None:
        """It was parked: it may go. Or it no longer is."""
        parked = self._shares[stream.terms.key_id].parked
        before = len(parked)
        if stream.is_parked:
            parked[stream] = None
        else:
            parked.pop(stream, None)
        self.num_parked += len(parked) - before

    def remove(self, stream: KeptStream) -> None:
        """It is gone, and has no messages any longer."""
        key_id = stream.terms.key_id
        share = self._shares[key_id]
        self.num_parked -= stream in share.parked
        share.parked.pop(stream, None)
        share.ended.pop(stream, None)
        share.num_streams -= 1
        share.num_bytes -= stream.terms.num_bytes
        if not share.num_streams:
            del self._shares[key_id]

    def ended(self) -> list[KeptStream]:
        """All that have ended."""
        return [stream for share in self._shares.values() for stream in share.ended]

    def making_way(self, key_id: str, *, more: int = 0) -> Iterator[KeptStream]:
        """Those that may go for streams of this key, which is to have so many `more`; none of them goes meanwhile."""
        return self._largest_first(key_id, more, lambda share: share.num_streams, lambda _: 1)

    def making_room(self, key_id: str, *, more: int = 0) -> Iterator[KeptStream]:
        """As `making_way`, by bytes."""
        return self._largest_first(
            key_id, more, lambda share: share.num_bytes, lambda stream: stream.num_bytes
        )

    def _largest_first(
        self,
        key_id: str,
        more: int,
        amount_of: Callable[[Share], int],
        size_of: Callable[[KeptStream], int],
    ) -> Iterator[KeptStream]:
        own = amount_of(self._shares.get(key_id, Share())) + more
        # Of keys that have as much its own is first; no two entries have the same key, so that no more is compared.
        heap = [
            (-(own if key == key_id else amount_of(share)), key != key_id, key, share.making_way())
            for key, share in self._shares.items()
            if share.ended or share.parked
        ]
        heapify(heap)
        while heap:
            amount, is_other, key, streams = heappop(heap)
            if is_other and -amount < own:
                return
            if (stream := next(streams, None)) is None:
                continue
            yield stream
            size = size_of(stream)
            if not is_other:
                own -= size
            heappush(heap, (amount + size, is_other, key, streams))
