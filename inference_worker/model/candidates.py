"""Draws on a CPU from rows that keep few tokens, without sorting a row and, where it can be, without weighing it.

A row is cut into groups. Of the greatest logits of its groups, the k-th greatest is a lower bound of the row's k-th
greatest logit, and few other tokens lie above it: those are the candidates. Whether the survivors of top-k, top-p and
min-p are all among them is certain or the row is left open; either follows from that row alone, and the draw from the
survivors alone, so that a row draws the same in any batch.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from inference_worker.model.truncation import Truncation
from inference_worker.model.whole_rows import masses

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

# Candidates of a row without top-k; most distributions put nearly all their mass on fewer.
_FIRST = 128
# A row with more candidates than this is left open: it would make the arrays of all rows as wide.
_MOST = 1024
_NUM_GROUPS = 512
_GROUP_MULTIPLE = 8
# How far below the floor of min-p candidates are taken, relative to the logits: their scores are rounded.
_SLACK = 1e-5


def draw_from_candidates(
    logits: Floats, peaks: Floats, temperatures: Floats, truncation: Truncation, u: Doubles
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Token ids [rows], and for which rows they are certain [rows]; the others' mean nothing.

    `logits` [rows, vocabulary], of which `peaks` [rows] are the greatest; `temperatures` [rows] are above 0; `u` [rows]
    are uniform numbers in [0, 1). Equal tokens at the end of the survivors all survive, as in `truncation`.
    """
    bounds, is_open, is_floor = _bounds(logits, peaks, temperatures, truncation)
    found = np.flatnonzero(logits >= bounds[:, None])
    row, token_id = np.divmod(found, logits.shape[1])
    counts = np.bincount(row, minlength=len(logits))
    is_open |= (counts > _MOST) | (counts == 0)
    if is_open.all():
        return np.zeros(len(logits), dtype=np.int64), ~is_open
    kept = ~is_open[row]
    row, token_id = row[kept], token_id[kept]
    counts[is_open] = 0
    place = np.arange(len(row)) - (np.cumsum(counts) - counts)[row]
    scores = np.full((len(logits), counts.max()), -np.inf, dtype=np.float32)
    with np.errstate(over="ignore"):  # far below the greatest at a temperature near 0
        scores[row, place] = (logits[row, token_id] - peaks[row]) / temperatures[row]
    ids = np.zeros(scores.shape, dtype=np.int64)
    ids[row, place] = token_id
    needs_mass = ~is_open & (truncation.top_p < 1) & (truncation.top_k >= logits.shape[1])
    mass = masses(logits, peaks, temperatures, needs_mass)
    least, is_certain = _last_survivors(scores, mass, truncation, needs_mass)
    return _pick(scores, ids, least, u), ~is_open & (is_certain | is_floor)


def _bounds(
    logits: Floats, peaks: Floats, temperatures: Floats, truncation: Truncation
) -> tuple[Floats, npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """The logit [rows] at which a row's candidates begin, infinite for open rows; which these are; and for which rows
    it is the floor of min-p, so that nothing below survives anyway."""
    rows, vocabulary = logits.shape
    greatest = np.sort(_group_maxima(logits), axis=1)
    num_groups = greatest.shape[1]
    has_top_k = truncation.top_k < vocabulary
    first = np.where(has_top_k, truncation.top_k, np.where(truncation.top_p < 1, _FIRST, 0))
    # top-p after top-k is a share of what top-k leaves, also of what min-p then cuts: all of that must be at hand
    has_floor = (truncation.min_p > 0) & ~(has_top_k & (truncation.top_p < 1))
    is_open = (first > num_groups // 2) | ((first == 0) & ~has_floor) | ~np.isfinite(peaks)
    index = num_groups - np.clip(first, 1, num_groups)
    bounds = np.where(first > 0, greatest[np.arange(rows), index], -np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        depth = temperatures * np.log(truncation.min_p)  # not positive
        floor = np.where(has_floor, peaks + depth - _SLACK * (np.abs(peaks) - depth), -np.inf)
    is_floor = has_floor & (floor >= bounds)
    # a forbidden token, at minus infinity, is no candidate
    bounds = np.maximum(np.maximum(bounds, floor), np.finfo(np.float32).min)
    bounds[is_open] = np.inf
    return bounds.astype(np.float32), is_open, is_floor


def _group_maxima(logits: Floats) -> Floats:
    rows, vocabulary = logits.shape
    size = -(-vocabulary // (_NUM_GROUPS * _GROUP_MULTIPLE)) * _GROUP_MULTIPLE
    whole = vocabulary // size * size
    # the groups run across the row, token i belonging to group i modulo their number: numpy's fast direction
    maxima: Floats = logits[:, :whole].reshape(rows, size, -1).max(axis=1)
    if whole < vocabulary:
        maxima = np.concatenate([maxima, logits[:, whole:].max(axis=1, keepdims=True)], axis=1)
    return maxima


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
