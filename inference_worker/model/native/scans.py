"""Passes over rows of logits in C: each row is read from memory once, and what is written of its size stays in the
processor's cache."""

from __future__ import annotations

from typing import Final

import numpy as np

from inference_worker.model.native.library import NativeLibrary
from inference_worker.model.scans import (
    Booleans,
    Doubles,
    Floats,
    Integers,
    Survey,
    Wanted,
)
from inference_worker.model.truncation import Truncation
from inference_worker.model.whole_rows import draw_from_whole_rows

# As in numbers.h and scans.c.
_LANES: Final = 16
_GROUPS: Final = 512
_SUMMED: Final = 256


class NativeScans:
    """See Scans. One thread at a time may use it."""

    def __init__(self, library: NativeLibrary) -> None:
        self._library = library
        # room, kept: getting it from the system takes longer than finding candidates
        self._ids = np.empty((0, 0), dtype=np.int64)
        self._logits = np.empty((0, 0), dtype=np.float32)
        self._room = np.empty((4, 0), dtype=np.float32)

    def survey(self, logits: Floats, temperatures: Floats, wanted: Wanted, most: int) -> Survey:
        """See Scans."""
        rows, vocabulary = logits.shape
        if self._ids.shape[0] < rows or self._ids.shape[1] != most:
            self._ids = np.empty((rows, most), dtype=np.int64)
            self._logits = np.empty((rows, most), dtype=np.float32)
        scores, weights, _rest = self._room_for(max(vocabulary, most, _GROUPS))
        peaks, masses = np.empty(rows, dtype=np.float32), np.empty(rows)
        counts, is_floor = np.empty(rows, dtype=np.int64), np.empty(rows, dtype=np.bool_)
        given = (logits, wanted.first, wanted.depth, temperatures, wanted.share)
        arrays = [np.ascontiguousarray(array) for array in given]
        arrays += [scores, weights, peaks, self._ids, self._logits, counts, masses, is_floor]
        width: int = self._library.survey(
            rows, vocabulary, most, *(array.ctypes.data for array in arrays)
        )
        ids, found = self._ids[:rows, :width].copy(), self._logits[:rows, :width].copy()
        return Survey(peaks, is_floor, counts, ids, found, masses)

    def draw_from_rows(
        self,
        logits: Floats,
        peaks: Floats,
        temperatures: Floats,
        truncation: Truncation,
        u: Doubles,
        wanted: Booleans,
    ) -> Integers:
        """See Scans."""
        vocabulary = logits.shape[1]
        has_top_k = truncation.top_k < vocabulary
        # top-k of more tokens than candidates are sought of is rare, and left to numpy
        tokens = draw_from_whole_rows(
            logits, peaks, temperatures, truncation, u, wanted & has_top_k
        )
        numbers = np.flatnonzero(wanted & ~has_top_k & np.isfinite(peaks))
        with np.errstate(divide="ignore"):
            floors = np.log(truncation.min_p).astype(np.float32)
        ends = np.empty(-(-vocabulary // _SUMMED) + 1)
        given = (logits, numbers, peaks, temperatures, truncation.top_p, floors, u)
        arrays = [*map(np.ascontiguousarray, given), *self._room_for(vocabulary), ends, tokens]
        self._library.draw_from_rows(
            vocabulary, len(numbers), *(array.ctypes.data for array in arrays)
        )
        return tokens

    def _room_for(self, count: int) -> tuple[Floats, Floats, Floats]:
        """Three arrays: two of at least so many numbers, and one of twice as many."""
        if self._room.shape[1] < count:
            self._room = np.empty((4, -(-count // _LANES) * _LANES), dtype=np.float32)
        return self._room[0], self._room[1], self._room[2:]
