"""Paged attention for any Hugging Face decoder, entered through transformers' `AttentionInterface`.

A model whose attention is set to `PAGED` calls `paged_attention` in every layer and hands it the keyword argument
`batch` that the forward call was given. The name has no entry in transformers' mask interface on purpose: models then
make no mask at all, and what a token sees is decided here, by the batch and the layer's window.
"""

from __future__ import annotations

import torch
from torch.nn import functional
from transformers import AttentionInterface

from inference_worker.model import varlen
from inference_worker.model.batch import Batch, Chunk, DecodeRows
from inference_worker.model.kv_cache import KVCache
from inference_worker.model.row_attention import attend_by_row

PAGED = "sluice_paged"


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    batch: Batch,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **_unused: object,
) -> tuple[torch.Tensor, None]:
    """Write a layer's new keys and values to the cache and attend to what each token may see.

    Shapes: query [1, heads, tokens, key dim], key [1, kv heads, tokens, key dim], value [1, kv heads, tokens, value
    dim]; the result is [1, tokens, heads, value dim]. `softcap` bounds the scores as in Gemma 2 (arXiv 2408.00118),
    `s_aux` [heads] are attention sinks as in gpt-oss (arXiv 2508.10925). The window comes from the batch's cache, not
    from a keyword, since models agree on it only in the mask that they ask for.

    Raises: ValueError for a mask or position bias, which cannot be honoured.
    """
    if attention_mask is not None or position_bias is not None:
        raise ValueError("paged attention takes neither a mask nor a position bias")
    layer: int = module.layer_idx  # type: ignore[assignment]
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    return attend(batch, layer, query, key, value, scaling, softcap, s_aux)[None], None


def attend(
    batch: Batch,
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same for packed tokens: query [tokens, heads, key dim], key [tokens, kv heads, key dim], value [tokens, kv
    heads, value dim]; the result is [tokens, heads, value dim].
    """
    batch.cache.write(layer, batch.slots, key, value)
    return attend_cached(batch, layer, query, scaling, softcap, sinks, fresh=(key, value))


def attend_cached(
    batch: Batch,
    layer: int,
    query: torch.Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    *,
    fresh: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """The same when the cache holds the batch's keys and values; `fresh` are those, where they are at hand as well."""
    if batch.rows is not None:
        return attend_by_row(batch.cache, batch.rows, layer, query, scaling, softcap, sinks)
    cache, rule = batch.cache, _Rule(scaling, softcap, sinks)
    decode = _attend_decode_by_kernel if cache.uses_kernels else _attend_decode
    parts = [decode(cache, layer, rows, query, rule) for rows in batch.decode]
    parts += [_attend_chunk(cache, layer, chunk, query, fresh, rule) for chunk in batch.chunks]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Rule:
    """How scores become weights in one layer."""

    __slots__ = ("scaling", "sinks", "softcap")

    def __init__(
        self, scaling: float | None, softcap: float | None, sinks: torch.Tensor | None
    ) -> None:
        self.scaling = scaling
        self.softcap = softcap
        self.sinks = sinks

    @property
    def is_plain(self) -> bool:
        """Whether the weights are the softmax of the scaled scores."""
        return self.softcap is None and self.sinks is None

    def scale_of(self, query: torch.Tensor) -> float:
        """The factor of the scores, by default what transformers takes."""
        return query.shape[-1] ** -0.5 if self.scaling is None else self.scaling

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        *,
        is_causal: bool = False,
    ) -> torch.Tensor:
        """Attention over [rows, kv heads or heads, n, dim]; an additive mask broadcasts over the scores."""
        if self.is_plain:
            return functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=is_causal, scale=self.scaling
            )
        scores = (query @ key.transpose(-1, -2)) * self.scale_of(query)
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if is_causal:
            mask = torch.full_like(scores[0, 0], -torch.inf).triu_(1)
        if mask is not None:
            scores = scores + mask
        return self._weights(scores) @ value

    def _weights(self, scores: torch.Tensor) -> torch.Tensor:
        if self.sinks is None:
            return scores.softmax(-1, dtype=torch.float32).to(scores.dtype)
        # a sink is one more score of each head that takes weight and gives no value
        sinks = self.sinks.reshape(1, *_sink_shape(scores, self.sinks), 1).expand(
            *scores.shape[:-1], 1
        )
        weights = torch.cat([scores, sinks.to(scores.dtype)], -1).softmax(-1, dtype=torch.float32)
        return weights[..., :-1].to(scores.dtype)


def _sink_shape(scores: torch.Tensor, sinks: torch.Tensor) -> tuple[int, int]:
    """(heads, 1) for scores by head; (kv heads, heads of a group) for decode rows, whose group is the query axis."""
    if scores.shape[1] == sinks.numel():
        return scores.shape[1], 1
    return scores.shape[1], sinks.numel() // scores.shape[1]


def _attend_decode(
    cache: KVCache, layer: int, rows: DecodeRows, query: torch.Tensor, rule: _Rule
) -> torch.Tensor:
    """Attention of decode rows: [rows, heads, value dim]."""
    shape = cache.layers[layer]
    view = rows.view(shape.window)
    keys, values = cache.read(layer, view.block_ids)
    num_rows, num_heads, heads = rows.last - rows.first, query.shape[1], shape.num_kv_heads
    # the query heads that share a key head stand side by side as the query axis: no copy of keys for each
    grouped = query[rows.first : rows.last]
    grouped = grouped.reshape(num_rows, heads, num_heads // heads, shape.key_dim)
    keys = keys.view(num_rows, view.num_keys, heads, shape.key_dim).transpose(1, 2)
    values = values.view(num_rows, view.num_keys, heads, shape.value_dim).transpose(1, 2)
    attended = rule.attend(grouped, keys, values, view.mask)
    return attended.reshape(num_rows, num_heads, shape.value_dim)


def _attend_decode_by_kernel(
    cache: KVCache, layer: int, rows: DecodeRows, query: torch.Tensor, rule: _Rule
) -> torch.Tensor:
    """Attention of decode rows: [rows, heads, value dim]."""
    # triton need not be installed where there is no GPU
    from inference_worker.model.kernels.paged_attention import decode_attention

    return decode_attention(
        query[rows.first : rows.last].contiguous(),
        cache.keys[layer],
        cache.values[layer],
        rows.block_table,
        rows.lengths,
        scale=rule.scale_of(query),
        window=cache.layers[layer].window,
        softcap=rule.softcap,
        sinks=None if rule.sinks is None else rule.sinks.to(query.dtype),
    )


def _attend_chunk(
    cache: KVCache,
    layer: int,
    chunk: Chunk,
    query: torch.Tensor,
    fresh: tuple[torch.Tensor, torch.Tensor] | None,
    rule: _Rule,
) -> torch.Tensor:
    """Attention of one prefill chunk: [tokens, heads, value dim]."""
    window = cache.layers[layer].window
    tokens = slice(chunk.first, chunk.last)
    if rule.is_plain and varlen.can_attend(cache, layer):
        return varlen.attend_chunk(cache, layer, chunk, query[tokens], rule.scale_of(query))
    mask = None
    if chunk.sees_itself_only(window):
        if fresh is None:
            keys, values = (x[: chunk.stop] for x in cache.read(layer, chunk.block_ids))
        else:
            keys, values = (x[tokens] for x in fresh)
    else:
        view = chunk.view(window)
        keys, values = (x[: view.num_keys] for x in cache.read(layer, view.block_ids))
        mask = view.mask
    group = query.shape[1] // keys.shape[1]
    if group > 1:
        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    query, keys, values = (x.transpose(0, 1)[None] for x in (query[tokens], keys, values))
    attended = rule.attend(query, keys, values, mask, is_causal=mask is None)
    return attended[0].transpose(0, 1)


AttentionInterface.register(PAGED, paged_attention)
