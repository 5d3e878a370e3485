"""Top-k, top-p and min-p, as one threshold for each row, all rows together, on any device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from inference_worker.model.transfer import upload


@dataclass(frozen=True, slots=True)
class Truncation:
    """What each row keeps."""

    top_k: npt.NDArray[np.int64]  # at least the vocabulary's size where off
    top_p: npt.NDArray[np.float64]  # 1 where off
    min_p: npt.NDArray[np.float64]  # 0 where off


def thresholds(
    scores: torch.Tensor, weights: torch.Tensor, truncation: Truncation
) -> torch.Tensor | None:
    """The least score that survives, [rows, 1]; None if everything does in every row.

    `scores` [rows, vocabulary] are relative to each row's greatest, which is 0, and `weights` are
    their exponentials.

    In the order of transformers' warpers: top-k keeps the k greatest (Fan et al., arXiv
    1805.04833); top-p the fewest of these that have a share of at least p of their mass, one at
    least (Holtzman et al., arXiv 1904.09751); min-p those at least p times as likely as the
    likeliest (Nguyen et al., arXiv 2407.01082). A token that ties with the last survivor survives
    too, so the outcome depends on the values alone and never on how a sort orders equal ones.
    """
    top_k, top_p, min_p = truncation.top_k, truncation.top_p, truncation.min_p
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
    """The least scores [rows, 1] that survive top-k and top-p.

    A row of top-p alone may keep any number of tokens. To learn whether fewer suffice the host would have to wait for
    the device, so all are sorted then.
    """
    vocabulary, device = scores.shape[1], scores.device
    is_limited = top_k < vocabulary
    count = int(top_k.max()) if is_limited.all() else vocabulary
    k, p, limited = upload(top_k, device), upload(top_p, device), upload(is_limited, device)
    values = scores.topk(count).values
    in_top_k = torch.arange(count, device=device) < k[:, None]
    mass = values.exp().double().masked_fill_(~in_top_k, 0)
    cumulative = mass.cumsum(1)
    total = torch.where(limited, cumulative[:, -1], weights.sum(1, dtype=torch.float64))
    # at 1 nothing may be cut, not even for the rounding of the sums
    wanted = torch.where(p < 1, p * total, math.inf)
    survives = in_top_k & (cumulative - mass < wanted[:, None])
    last = survives.sum(1, keepdim=True).sub_(1).clamp_min_(0)
    return values.gather(1, last)
