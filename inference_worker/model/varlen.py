"""Prefill attention on a GPU by torch's `varlen_attn`, which is Flash Attention (arXiv 2307.08691).

It makes no mask and repeats no keys for the heads that share them.

It reads the cache through the block table where blocks are of a multiple of 256 tokens, which the Flash Attention in
torch 2.13 asks for; otherwise the keys and values are gathered first.

What no CPU can run: `varlen_attn` itself. In tests something that does what its documentation says takes its place, so
what remains to be seen on a GPU is that it does so: that causal attention is aligned at the last query and the last
key, that a window of (n, 0) shows n keys before the querying one, and that it takes these layouts.
"""

from __future__ import annotations

import inspect
from functools import cache as remember

import torch

from inference_worker.model.batch import Chunk
from inference_worker.model.kv_cache import KVCache

_DTYPES = (torch.float16, torch.bfloat16)
_MOST_DIM, _DIM_STEP, _BLOCK_STEP = 256, 8, 256
_LEAST_CAPABILITY = (8, 0)


def can_attend(cache: KVCache, layer: int) -> bool:
    """Whether a layer's attention, if it has neither softcap nor sinks, can be computed here."""
    shape = cache.layers[layer]
    return (
        cache.device.type == "cuda"
        and cache.dtype in _DTYPES
        and shape.key_dim == shape.value_dim <= _MOST_DIM
        and shape.key_dim % _DIM_STEP == 0
        and _is_here(cache.device)
    )


def attend_chunk(
    cache: KVCache, layer: int, chunk: Chunk, query: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention of one prefill chunk [tokens, heads, dim], whose keys and values are in the cache: the same shape."""
    from torch.nn.attention.varlen import varlen_attn

    window = cache.layers[layer].window
    first, keys, values = 0, cache.keys[layer], cache.values[layer]
    table = lengths = None
    if cache.block_size % _BLOCK_STEP == 0:
        table, lengths = chunk.block_ids[None].int(), chunk.cumulative_keys(0)[1:]
    else:
        first = chunk.first_key(window)
        count = chunk.stop - first
        blocks = chunk.block_ids[first // cache.block_size :]
        keys, values = (x[:count] for x in cache.read(layer, blocks))
    attended = varlen_attn(
        query,
        keys,
        values,
        chunk.cumulative_queries,
        chunk.cumulative_keys(first),
        chunk.stop - chunk.start,
        chunk.stop - first,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != keys.shape[-2],
        seqused_k=lengths,
        block_table=table,
    )
    assert isinstance(attended, torch.Tensor)  # noqa: S101 - a tuple comes only where asked for
    return attended


@remember
def _is_here(device: torch.device) -> bool:
    """Whether the installed torch and the device have it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    wanted = {"scale", "window_size", "enable_gqa", "seqused_k", "block_table"}
    return (
        wanted <= set(inspect.signature(varlen_attn).parameters)
        and torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY
    )
