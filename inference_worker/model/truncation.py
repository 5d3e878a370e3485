"""Top-k, top-p and min-p, as one threshold for each row."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

from inference_worker.model.transfer import upload

# Candidates that a row without top-k sorts at first; most distributions put nearly all their mass on fewer.
_FIRST_CANDIDATES = 128
_GROWTH = 16
# On a CPU, sorting a whole row with numpy costs less than torch's selection of more than one in this many of it.
_WHOLE_SORT = 32


def thresholds(
    scores: torch.Tensor,
    weights: torch.Tensor,
    *,
    top_k: npt.NDArray[np.int64],
    top_p: npt.NDArray[np.float64],
    min_p: npt.NDArray[np.float64],
) -> torch.Tensor | None:
    """The least score that survives, [rows, 1]; None if everything does in every row.

    `scores` [rows, vocabulary] are relative to each row's greatest, which is 0, and `weights` are
    their exponentials. `top_k` [rows] is at least the vocabulary's size where off, `top_p` [rows]
    is 1 and `min_p` [rows] is 0.

    In the order of transformers' warpers: top-k keeps the k greatest (Fan et al., arXiv
    1805.04833); top-p the fewest of these that have a share of at least p of their mass, one at
    least (Holtzman et al., arXiv 1904.09751); min-p those at least p times as likely as the
    likeliest (Nguyen et al., arXiv 2407.01082). A token that ties with the last survivor survives
    too, so the outcome depends on the values alone and never on how a sort orders equal ones.
    """
    narrow = np.flatnonzero((top_k < scores.shape[1]) | (top_p < 1))
    has_min_p = bool((min_p > 0).any())
    if not len(narrow) and not has_min_p:
        return None
    least = torch.full_like(scores[:, :1], -math.inf)
    if len(narrow):
        rows = upload(narrow, scores.device)
        least[rows] = _search(scores[rows], weights[rows], top_k[narrow], top_p[narrow])
    if has_min_p:
        with np.errstate(divide="ignore"):
            floor = upload(np.log(min_p), scores.device)
        least = least.maximum(floor.to(scores.dtype)[:, None])
    return least


def _search(
    scores: torch.Tensor,
    weights: torch.Tensor,
    top_k: npt.NDArray[np.int64],
    top_p: npt.NDArray[np.float64],
) -> torch.Tensor:
    """The least scores [rows, 1] that survive top-k and top-p, sorting no more than it takes."""
    vocabulary = scores.shape[1]
    device = scores.device
    k, p = upload(top_k, device), upload(top_p, device)
    limited = top_k[top_k < vocabulary]
    count = min(vocabulary, int(limited.max(initial=0)) or _FIRST_CANDIDATES)
    if len(limited) == len(top_k):
        return _last_survivors(scores, weights, k, p, count)[0]
    count = _affordable(max(count, _FIRST_CANDIDATES), scores)
    least, is_certain = _last_survivors(scores, weights, k, p, count)
    while count < vocabulary and len(open_rows := (~is_certain).nonzero()[:, 0]):
        count = _affordable(count * _GROWTH, scores)
        least[open_rows], is_certain[open_rows] = _last_survivors(
            scores[open_rows], weights[open_rows], k[open_rows], p[open_rows], count
        )
    return least


def _affordable(count: int, scores: torch.Tensor) -> int:
    """As many candidates as cost no more than `count` of them; on a GPU all, since to learn whether fewer suffice the
    host would have to wait for it.
    """
    vocabulary = scores.shape[1]
    is_sorted_whole = scores.device.type != "cpu" or count * _WHOLE_SORT >= vocabulary
    return vocabulary if is_sorted_whole else min(vocabulary, count)


def _last_survivors(
    scores: torch.Tensor,
    weights: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    count: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The least scores [rows, 1] that survive among the `count` greatest, and whether these sufficed [rows]."""
    values = _greatest(scores, count)
    in_top_k = torch.arange(count, device=scores.device) < top_k[:, None]
    mass = values.exp().double().masked_fill_(~in_top_k, 0)
    cumulative = mass.cumsum(1)
    has_all = top_k <= count
    total = torch.where(has_all, cumulative[:, -1], weights.sum(1, dtype=torch.float64))
    # at 1 nothing may be cut, not even for the rounding of the sums
    wanted = torch.where(top_p < 1, top_p * total, math.inf)
    survives = in_top_k & (cumulative - mass < wanted[:, None])
    last = survives.sum(1, keepdim=True).sub_(1).clamp_min_(0)
    return values.gather(1, last), has_all | (cumulative[:, -1] >= wanted)


def _greatest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` greatest scores of each row, descending."""
    if scores.device.type == "cpu" and count * _WHOLE_SORT >= scores.shape[1]:
        descending = np.sort(scores.numpy(), axis=1)[:, ::-1]
        return torch.from_numpy(descending[:, :count].copy())
    return scores.topk(count).values
