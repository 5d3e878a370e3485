"""Passes over rows of logits in C: each row is read from memory once, and nothing of its size is written."""

from __future__ import annotations

from typing import Final

import numpy as np

from inference_worker.model.native.library import NativeLibrary
from inference_worker.model.scans import Booleans, Doubles, Floats, Integers, Survey, Wanted

_SUMMED: Final = 256  # as in scans.c


class NativeScans:
    """See Scans. One thread at a time may use it."""

    def __init__(self, library: NativeLibrary) -> None:
        self._library = library
        # room for candidates, kept: getting it from the system takes longer than finding them
        self._ids = np.empty((0, 0), dtype=np.int64)
        self._logits = np.empty((0, 0), dtype=np.float32)

    def survey(self, logits: Floats, temperatures: Floats, wanted: Wanted, most: int) -> Survey:
        """See Scans."""
        rows, vocabulary = logits.shape
        if self._ids.shape[0] < rows or self._ids.shape[1] != most:
            self._ids = np.empty((rows, most), dtype=np.int64)
            self._logits = np.empty((rows, most), dtype=np.float32)
        peaks, masses = np.empty(rows, dtype=np.float32), np.empty(rows)
        counts, is_floor = np.empty(rows, dtype=np.int64), np.empty(rows, dtype=np.bool_)
        given = (logits, wanted.first, wanted.depth, temperatures, wanted.has_mass)
        arrays = [np.ascontiguousarray(array) for array in given]
        arrays += [peaks, self._ids, self._logits, counts, masses, is_floor]
        width: int = self._library.survey(
            rows, vocabulary, most, *(array.ctypes.data for array in arrays)
        )
        ids, found = self._ids[:rows, :width].copy(), self._logits[:rows, :width].copy()
        return Survey(peaks, is_floor, counts, ids, found, masses)

    def draw_untruncated(
        self, logits: Floats, peaks: Floats, temperatures: Floats, u: Doubles, wanted: Booleans
    ) -> Integers:
        """See Scans."""
        vocabulary = logits.shape[1]
        numbers = np.flatnonzero(wanted & np.isfinite(peaks))
        tokens = np.zeros(len(logits), dtype=np.int64)
        ends = np.empty(-(-vocabulary // _SUMMED) + 1)
        given = (logits, numbers, peaks, temperatures, u)
        arrays = [*map(np.ascontiguousarray, given), ends, tokens]
        self._library.draw_untruncated(
            vocabulary, len(numbers), *(array.ctypes.data for array in arrays)
        )
        return tokens
