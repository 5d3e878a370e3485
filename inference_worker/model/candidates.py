"""Draws on a CPU from rows that keep few tokens, without sorting a row and, where it can be, without weighing it.

A row is cut into groups. Of the greatest logits of its groups, the k-th greatest is a lower bound of the row's k-th
greatest logit, and few other tokens lie above it: those are the candidates. Whether the survivors of top-k, top-p and
min-p are all among them is certain or the row is left open; either follows from that row alone, and the draw from the
survivors alone, so that a row draws the same in any batch.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from inference_worker.model.scans import NUM_GROUPS, Scans, Wanted
from inference_worker.model.truncation import Truncation

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

# Candidates of a row without top-k; most distributions put nearly all their mass on fewer.
_FIRST = 128
# A row with more candidates than this is left open: it would make the arrays of all rows as wide.
_MOST = 1024


def draw_from_candidates(
    logits: Floats, temperatures: Floats, truncation: Truncation, u: Doubles, scans: Scans
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_], Floats]:
    """Token ids [rows]; for which rows they are certain [rows], the others' mean nothing; and the rows' greatest
    logits [rows], not finite where a row is no distribution.

    `logits` is [rows, vocabulary]; `temperatures` [rows] are above 0; `u` [rows] are uniform numbers in [0, 1). Equal
    tokens at the end of the survivors all survive, as in `truncation`.
    """
    wanted = _wanted(logits.shape[1], temperatures, truncation)
    found = scans.survey(logits, temperatures, wanted, _MOST)
    is_open = (found.counts > _MOST) | (found.counts == 0)
    if is_open.all():
        return np.zeros(len(logits), dtype=np.int64), ~is_open, found.peaks
    width = found.counts[~is_open].max()
    # an overflow is one of a logit far below the greatest, at a temperature near 0; an open row's peak may be anything
    with np.errstate(over="ignore", invalid="ignore"):
        scores = (found.logits[:, :width] - found.peaks[:, None]) / temperatures[:, None]
    scores[is_open] = -np.inf
    needs_mass = ~is_open & (wanted.share > 0)
    least, is_certain = _last_survivors(scores, found.masses, truncation, needs_mass)
    tokens = _pick(scores, found.ids[:, :width], least, u)
    return tokens, ~is_open & (is_certain | found.is_floor), found.peaks


def _wanted(vocabulary: int, temperatures: Floats, truncation: Truncation) -> Wanted:
    """Candidates that all survivors are among, as far as parameters tell; none of rows that are better left open."""
    has_top_k = truncation.top_k < vocabulary
    first = np.where(has_top_k, truncation.top_k, np.where(truncation.top_p < 1, _FIRST, 0))
    # top-p after top-k is a share of what top-k leaves, also of what min-p then cuts: all of that must be at hand
    has_floor = (truncation.min_p > 0) & ~(has_top_k & (truncation.top_p < 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        depth = np.where(has_floor, temperatures * -np.log(truncation.min_p), np.inf)
    first[(first > NUM_GROUPS // 2) | ((first == 0) & ~has_floor)] = -1
    needs_mass = (first >= 0) & ~has_top_k & (truncation.top_p < 1)
    return Wanted(first, depth, np.where(needs_mass, truncation.top_p, 0.0))


def _last_survivors(
    scores: Floats, mass: Doubles, truncation: Truncation, needs_mass: npt.NDArray[np.bool_]
) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """The least scores [rows] that survive among the candidates, and whether these sufficed [rows]."""
    descending = -np.sort(-scores, axis=1)
    weights = np.exp(descending, dtype=np.float64)
    in_top_k = np.arange(scores.shape[1]) < truncation.top_k[:, None]
    weights[~in_top_k] = 0
    cumulative = weights.cumsum(axis=1)
    total = np.where(needs_mass, mass, cumulative[:, -1])
    # at 1 nothing may be cut, not even for the rounding of the sums
    wanted = np.where(truncation.top_p < 1, truncation.top_p * total, np.inf)
    survives = in_top_k & (cumulative - weights < wanted[:, None])
    last = np.maximum(survives.sum(axis=1) - 1, 0)
    least = descending[np.arange(len(scores)), last]
    with np.errstate(divide="ignore"):
        least = np.maximum(least, np.log(truncation.min_p)).astype(np.float32)
    return least, ~needs_mass | (cumulative[:, -1] >= wanted)


def _pick(
    scores: Floats, ids: npt.NDArray[np.int64], least: Floats, u: Doubles
) -> npt.NDArray[np.int64]:
    """Inverse of each row's cumulative distribution, in the order of token ids, over the scores from `least` on."""
    weights = np.exp(scores, dtype=np.float64)
    weights[scores < least[:, None]] = 0
    cumulative = weights.cumsum(axis=1)
    total = cumulative[:, -1]
    target = np.minimum(u * total, np.nextafter(total, 0))
    place = (cumulative <= target[:, None]).sum(axis=1)
    drawn: npt.NDArray[np.int64] = ids[np.arange(len(ids)), np.minimum(place, ids.shape[1] - 1)]
    return drawn
