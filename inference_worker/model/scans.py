"""The passes over whole rows of logits that drawing takes on a CPU: by numpy, or in C (`native.scans`).

How a row fares follows from that row alone. Two implementations differ in the rounding of sums, so in the seventh
digit, and in how many candidates they find below the last that survives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from inference_worker.model.truncation import Truncation
from inference_worker.model.whole_rows import draw_from_whole_rows, masses

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]

NUM_GROUPS: Final = 512  # that a row is cut into, about
_GROUP_MULTIPLE: Final = 8
# How far below the floor candidates begin, relative to the logits: their scores are rounded.
_SLACK: Final = 1e-5


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be found of each row [rows]. Candidates are the logits from a bound on, the greater of two."""

    first: Integers  # that of the greatest logits of groups, first-th from above; 0 for none, -1 for no candidates
    depth: Doubles  # how far below the row's greatest logit the floor lies, infinite for none
    share: Doubles  # of the sum of all weights that the candidates must have; 0 where that sum is not needed


@dataclass(frozen=True, slots=True)
class Survey:
    """What was found of each row [rows]."""

    peaks: Floats  # the greatest logits; not finite where a row is no distribution, of which nothing else is found
    is_floor: Booleans  # whether candidates begin at the floor
    counts: Integers  # of all candidates; 0 where they surely lack their share; of more than asked for none may be kept
    ids: Integers  # [rows, width] of candidates, ascending, and behind them what is none
    logits: Floats  # [rows, width] of candidates, and minus infinity behind them
    masses: Doubles  # sums of e to the (logit - peak) / temperature; 0 where not wanted


class Scans(Protocol):
    """Passes over logits [rows, vocabulary], float32."""

    def survey(self, logits: Floats, temperatures: Floats, wanted: Wanted, most: int) -> Survey:
        """Find what is wanted of each row, and candidates of those that have no more than `most`."""
        ...

    def draw_from_rows(
        self,
        logits: Floats,
        peaks: Floats,
        temperatures: Floats,
        truncation: Truncation,
        u: Doubles,
        wanted: Booleans,
    ) -> Integers:
        """Token ids [rows] of the wanted rows [rows] that have a finite peak, all tokens weighed; 0 of others."""
        ...


class _NumpyScans:
    def survey(self, logits: Floats, temperatures: Floats, wanted: Wanted, most: int) -> Survey:
        rows = len(logits)
        if (wanted.first < 0).all():
            none = np.empty((rows, 0), dtype=np.int64)
            peaks: Floats = logits.max(axis=1)
            never, zeros = np.zeros(rows, dtype=np.bool_), np.zeros(rows, dtype=np.int64)
            return Survey(peaks, never, zeros, none, none.astype(np.float32), np.zeros(rows))
        maxima = _group_maxima(logits)
        peaks = maxima.max(axis=1)
        bounds, is_floor = _bounds(maxima, peaks, wanted)
        found = np.flatnonzero(logits >= bounds[:, None])
        row, token_id = np.divmod(found, logits.shape[1])
        counts = np.bincount(row, minlength=rows)
        kept = counts[row] <= most
        place = np.arange(len(row)) - (np.cumsum(counts) - counts)[row]
        row, token_id, place = row[kept], token_id[kept], place[kept]
        ids = np.zeros((rows, counts[counts <= most].max(initial=0)), dtype=np.int64)
        ids[row, place] = token_id
        values = np.full(ids.shape, -np.inf, dtype=np.float32)
        values[row, place] = logits[row, token_id]
        has_mass = (wanted.share > 0) & np.isfinite(bounds)
        mass = masses(logits, peaks, temperatures, has_mass)
        return Survey(peaks, is_floor, counts, ids, values, mass)

    def draw_from_rows(
        self,
        logits: Floats,
        peaks: Floats,
        temperatures: Floats,
        truncation: Truncation,
        u: Doubles,
        wanted: Booleans,
    ) -> Integers:
        return draw_from_whole_rows(logits, peaks, temperatures, truncation, u, wanted)


NUMPY: Final[Scans] = _NumpyScans()


def _bounds(maxima: Floats, peaks: Floats, wanted: Wanted) -> tuple[Floats, Booleans]:
    """The logit [rows] at which a row's candidates begin, NaN where none are wanted or can be found; and for which
    rows it is the floor."""
    rows, num_groups = maxima.shape
    greatest = np.sort(maxima, axis=1)
    index = num_groups - wanted.first.clip(1, num_groups)
    has_first = (wanted.first > 0) & (wanted.first <= num_groups)
    bounds = np.where(has_first, greatest[np.arange(rows), index], -np.inf)
    with np.errstate(invalid="ignore"):
        floor = peaks - wanted.depth - _SLACK * (np.abs(peaks) + wanted.depth)
    is_floor = np.isfinite(wanted.depth) & (floor >= bounds)
    # a forbidden token, at minus infinity, is no candidate
    bounds = np.maximum(np.where(is_floor, floor, bounds), np.finfo(np.float32).min)
    bounds[(wanted.first < 0) | ~np.isfinite(peaks)] = np.nan  # nothing is as great
    return bounds.astype(np.float32), is_floor


def _group_maxima(logits: Floats) -> Floats:
    rows, vocabulary = logits.shape
    size = -(-vocabulary // (NUM_GROUPS * _GROUP_MULTIPLE)) * _GROUP_MULTIPLE
    whole = vocabulary // size * size
    # the groups run across the row, token i belonging to group i modulo their number: numpy's fast direction
    maxima: Floats = logits[:, :whole].reshape(rows, size, -1).max(axis=1)
    if whole < vocabulary:
        maxima = np.concatenate([maxima, logits[:, whole:].max(axis=1, keepdims=True)], axis=1)
    return maxima
