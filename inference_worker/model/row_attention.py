"""Attention of single tokens, each in a way that depends on nothing but its own sequence and position."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from inference_worker.model.batch import PieceOfKeys, TokenRows
from inference_worker.model.kv_cache import KVCache


def attend_by_row(
    cache: KVCache,
    rows: TokenRows,
    layer: int,
    query: torch.Tensor,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of tokens [tokens, heads, dim] to their cached keys, in float32: [tokens, heads, value dim].

    Online softmax (Milakov and Gimelshein, arXiv 1805.02867) over pieces of keys: a piece that a token does not see
    leaves its sums as they are.
    """
    shape = cache.layers[layer]
    tokens, heads, dim = query.shape
    kv_heads, group = shape.num_kv_heads, heads // shape.num_kv_heads
    scaling = dim**-0.5 if scaling is None else scaling
    queries = (query.float() * scaling).reshape(tokens * kv_heads, group, dim)
    # a peak that is below any score and yet finite: minus infinity has no difference with itself
    peak = queries.new_full((tokens * kv_heads, group, 1), -1e30)
    total = torch.zeros_like(peak)
    if (
        sinks is not None
    ):  # a sink is one more score of each head that takes weight and gives no value
        peak = sinks.float().view(kv_heads, group, 1).repeat(tokens, 1, 1)
        total = torch.ones_like(peak)
    sums = queries.new_zeros(tokens * kv_heads, group, shape.value_dim)
    for keys, values, mask in _pieces(cache, rows, layer):
        scores = torch.bmm(queries, keys.transpose(1, 2))
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores.view(tokens, -1, mask.shape[1]) + mask[:, None]
        scores = scores.view(tokens * kv_heads, group, -1)
        new_peak = torch.maximum(peak, scores.amax(-1, keepdim=True))
        weights = torch.exp(scores - new_peak)
        kept = torch.exp(peak - new_peak)
        total = total * kept + weights.sum(-1, keepdim=True)
        sums = sums * kept + torch.bmm(weights, values)
        peak = new_peak
    return (sums / total).to(query.dtype).view(tokens, heads, shape.value_dim)


def _pieces(
    cache: KVCache, rows: TokenRows, layer: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Keys and values [tokens * kv heads, keys, dim] in float32 and the additive mask [tokens, keys] of each piece."""
    keys, values = (x[layer].flatten(0, 1) for x in (cache.keys, cache.values))
    for piece in rows.pieces(cache.layers[layer].window):
        yield _gather(keys, piece), _gather(values, piece), piece.mask


def _gather(cached: torch.Tensor, piece: PieceOfKeys) -> torch.Tensor:
    tokens, num_keys = piece.mask.shape
    heads, dim = cached.shape[1:]
    taken = cached.index_select(0, piece.slots).view(tokens, num_keys, heads, dim)
    return taken.transpose(1, 2).float().reshape(tokens * heads, num_keys, dim)
