"""Draws on a CPU from rows that may keep many tokens: a weight for every token, one row after the other.

A row's arrays stay in the processor's cache that way, which matters more than the calls saved by taking rows together.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from inference_worker.model.truncation import Truncation

Floats = npt.NDArray[np.float32]

# Tokens whose weights are summed together before the one that is drawn is sought inside its group.
_GROUP = 256
# Bins of the scores in which top-p's last survivor is sought, by equal steps of the logarithm; the last bin takes the
# rest, whose weights are below exp(-32).
_NUM_BINS = 2048
_BINS_PER_UNIT = 64


def draw_from_whole_rows(
    logits: Floats,
    peaks: Floats,
    temperatures: Floats,
    truncation: Truncation,
    u: npt.NDArray[np.float64],
    wanted: npt.NDArray[np.bool_],
) -> npt.NDArray[np.int64]:
    """Token ids [rows] of the wanted rows [rows]; 0 of the others, and of those whose peak is not finite.

    `logits` [rows, vocabulary], of which `peaks` [rows] are the greatest; `temperatures` [rows] are above 0; `u` [rows]
    are uniform numbers in [0, 1).
    """
    vocabulary = logits.shape[1]
    tokens = np.zeros(len(logits), dtype=np.int64)
    scores, weights = np.empty((2, vocabulary), dtype=np.float32)
    is_narrow = truncation.is_narrow(vocabulary)
    for row in np.flatnonzero(wanted & np.isfinite(peaks)).tolist():
        _weigh(logits[row], peaks[row], temperatures[row], scores, weights)
        if is_narrow[row]:
            weights[scores < _last_survivor(scores, weights, truncation, row)] = 0
        tokens[row] = _invert(weights, u[row])
    return tokens


def masses(
    logits: Floats, peaks: Floats, temperatures: Floats, wanted: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float64]:
    """The sum of the weights [rows] of each wanted row, whose peak is finite; 0 of the others."""
    scores = np.empty(logits.shape[1], dtype=np.float32)
    found = np.zeros(len(logits))
    for row in np.flatnonzero(wanted).tolist():
        _weigh(logits[row], peaks[row], temperatures[row], scores, scores)
        found[row] = scores.sum()
    return found


def _weigh(
    logits: Floats, peak: np.float32, temperature: np.float32, scores: Floats, weights: Floats
) -> None:
    """Fill scores and weights [vocabulary] of a row."""
    # with the greatest score at 0 no temperature can overflow: the others go towards minus infinity
    np.subtract(logits, peak, out=scores)
    with np.errstate(over="ignore"):
        np.divide(scores, temperature, out=scores)
    np.exp(scores, out=weights)


def _last_survivor(scores: Floats, weights: Floats, truncation: Truncation, row: int) -> float:
    """The least score that survives; the rules are those of `truncation.thresholds`."""
    top_k, top_p = int(truncation.top_k[row]), float(truncation.top_p[row])
    least = -math.inf
    if top_k < len(scores):
        greatest = np.partition(scores, len(scores) - top_k)[-top_k:]
        least = float(greatest.min())
        if top_p < 1:
            total = np.exp(greatest, dtype=np.float64).sum()
            least = _edge(greatest, 0.0, top_p * total)
    elif top_p < 1:
        least = _edge_of_row(scores, weights, top_p)
    if (min_p := float(truncation.min_p[row])) > 0:
        least = max(least, float(np.float32(math.log(min_p))))
    return least


def _edge_of_row(scores: Floats, weights: Floats, top_p: float) -> float:
    """The least score of top-p: found by bins, of which only one is sorted."""
    lowest = -(_NUM_BINS - 1) / _BINS_PER_UNIT
    bins = (np.maximum(scores, lowest) * -_BINS_PER_UNIT).astype(np.intp)
    cumulative = np.bincount(bins, weights=weights, minlength=_NUM_BINS).cumsum()
    wanted = top_p * cumulative[-1]
    last = int(np.searchsorted(cumulative, wanted))
    before = float(cumulative[last - 1]) if last else 0.0
    return _edge(scores[bins == last], before, wanted)


def _edge(scores: Floats, before: float, wanted: float) -> float:
    """The last score, from the greatest on, before which the weights, with those before them all, are below a mass."""
    descending = -np.sort(-scores)
    weights = np.exp(descending, dtype=np.float64)
    is_below = before + weights.cumsum() - weights < wanted
    return float(descending[max(0, int(is_below.sum()) - 1)])


def _invert(weights: Floats, u: float) -> int:
    """Inverse of the cumulative distribution at `u`, in the order of token ids; see `sampler.invert`."""
    starts = np.arange(0, len(weights), _GROUP)
    ends = np.add.reduceat(weights, starts, dtype=np.float64).cumsum()
    target = min(u * ends[-1], np.nextafter(ends[-1], 0))
    group = int(ends.searchsorted(target, side="right"))
    before = ends[group - 1] if group else 0.0
    first = group * _GROUP
    inside = weights[first : first + _GROUP].cumsum(dtype=np.float64)
    # the group's sum was taken in another order: a rounding error must not lead past its last weight
    rest = min(max(0.0, target - before), np.nextafter(inside[-1], 0))
    return first + int(inside.searchsorted(rest, side="right"))
