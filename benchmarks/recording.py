"""What a stream received, taken apart after the run."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from benchmarks.load_client import Receipt, StreamFailed
from benchmarks.stamp import PATTERN, nanoseconds

_END_OF_EVENT: Final = b"\n\n"
_OK: Final = b"HTTP/1.1 200 "


@dataclass(frozen=True, slots=True)
class Write:
    """What the server sent at once: a chunk of the body, one event or a few."""

    data: bytes
    received_at: int  # ns: when its last byte came

    @property
    def events(self) -> int:
        """Number of events in it."""
        return self.data.count(_END_OF_EVENT)

    def stamps(self) -> list[int]:
        """The times at which its tokens were made, in ns."""
        return [nanoseconds(found) for found in PATTERN.findall(self.data)]


def read_writes(receipts: Sequence[Receipt]) -> list[Write]:
    """The writes of one answer. Raises: StreamFailed, if it is not a whole 200."""
    raw = b"".join(data for _, data in receipts)
    if not raw.startswith(_OK) or not raw.endswith(b"0\r\n\r\n"):
        raise StreamFailed(f"not a whole answer: {raw[:300]!r} … {raw[-300:]!r}")
    offsets = list(accumulate(len(data) for _, data in receipts))
    return [
        Write(raw[start:stop], receipts[bisect_left(offsets, stop)][0])
        for start, stop in _chunks(raw)
    ]


def _chunks(raw: bytes) -> Iterator[tuple[int, int]]:
    """Where the chunks of a chunked body lie."""
    position = raw.index(b"\r\n\r\n") + 4
    while True:
        line_end = raw.index(b"\r\n", position)
        size = int(raw[position:line_end], 16)
        if size == 0:
            return
        start = line_end + 2
        yield start, start + size
        position = start + size + 2
