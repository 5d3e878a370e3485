"""Draws on a CPU from rows that may keep many tokens: a weight for every token, one row or a few after the other.

Their arrays stay in the processor's cache that way, which matters more than the calls saved by taking all together.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from inference_worker.model.truncation import Truncation

Floats = npt.NDArray[np.float32]

# Tokens whose weights are summed together before the one that is drawn is sought inside its group.
_GROUP = 256
# Rows whose masses are summed together.
_ROWS_AT_ONCE = 4
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
    scores = np.empty(vocabulary, dtype=np.float32)
    [groups] = _empty_groups(vocabulary, 1)
    weights = groups.reshape(-1)[:vocabulary]
    with np.errstate(over="ignore"):  # see _weigh
        for row in np.flatnonzero(wanted & np.isfinite(peaks)).tolist():
            _weigh(logits[row], peaks[row], temperatures[row], scores, weights)
            if (least := _last_survivor(scores, weights, truncation, row)) > -math.inf:
                weights[scores < least] = 0
            tokens[row] = _invert(groups, float(u[row]))
    return tokens


def masses(
    logits: Floats, peaks: Floats, temperatures: Floats, wanted: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float64]:
    """The sum of the weights [rows] of each wanted row, whose peak is finite; 0 of the others."""
    found = np.zeros(len(logits))
    vocabulary = logits.shape[1]
    groups = _empty_groups(vocabulary, _ROWS_AT_ONCE)
    weights = groups.reshape(_ROWS_AT_ONCE, -1)[:, :vocabulary]
    numbers = np.flatnonzero(wanted)
    for first in range(0, len(numbers), _ROWS_AT_ONCE):
        rows = numbers[first : first + _ROWS_AT_ONCE]
        _weigh_rows(logits, peaks, temperatures, rows, weights[: len(rows)])
        sums = _sums(groups[: len(rows)].reshape(-1, _GROUP))
        found[rows] = sums.reshape(len(rows), -1).sum(axis=1, dtype=np.float64)
    return found


def _empty_groups(vocabulary: int, rows: int) -> Floats:
    """Room for the weights of rows, [rows, groups, _GROUP], with zeros past the end of each."""
    return np.zeros((rows, -(-vocabulary // _GROUP), _GROUP), dtype=np.float32)


def _sums(groups: Floats) -> Floats:
    """Sums of a row's groups of weights, [groups]."""
    sums: Floats = np.einsum("ij->i", groups)  # half the time of sum(axis=1)
    return sums


def _weigh(
    logits: Floats, peak: np.float32, temperature: np.float32, scores: Floats, weights: Floats
) -> None:
    """Fill scores and weights [vocabulary] of a row.

    With the greatest score at 0 an overflow does no harm: the others go towards minus infinity.
    """
    np.subtract(logits, peak, out=scores)
    if temperature != 1:
        np.divide(scores, temperature, out=scores)
    np.exp(scores, out=weights)


def _weigh_rows(
    logits: Floats,
    peaks: Floats,
    temperatures: Floats,
    rows: npt.NDArray[np.int64],
    weights: Floats,
) -> None:
    """Fill the weights [n, vocabulary] of the rows with these numbers [n], to the bit as `_weigh` does."""
    for row, scores in zip(rows.tolist(), weights, strict=True):
        np.subtract(logits[row], peaks[row], out=scores)
    divisors = temperatures[rows]
    if (divisors != 1).any():
        with np.errstate(over="ignore"):
            np.divide(weights, divisors[:, None], out=weights)
    np.exp(weights, out=weights)


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


def _invert(groups: Floats, u: float) -> int:
    """Inverse of the cumulative distribution at `u`, in the order of token ids; see `sampler.invert`."""
    ends = _sums(groups).cumsum(dtype=np.float64)
    total = float(ends[-1])
    target = min(u * total, math.nextafter(total, 0))
    group = int(ends.searchsorted(target, side="right"))
    before = float(ends[group - 1]) if group else 0.0
    inside = groups[group].cumsum(dtype=np.float64)
    # the group's sum was taken in another order: a rounding error must not lead past its last weight
    rest = min(max(0.0, target - before), math.nextafter(float(inside[-1]), 0))
    return group * _GROUP + int(inside.searchsorted(rest, side="right"))
