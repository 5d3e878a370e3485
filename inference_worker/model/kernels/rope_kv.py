"""What stands between the QKV projection and attention: norms of queries and keys, rotary embedding, the cache's write.

Rotary embedding (arXiv 2104.09864) in transformers' `rotate_half` convention: elements i and i + dim / 2 of a head are
turned by the angle of position and i. The norms are those of Qwen3: RMS over each head. Both are rounded where
transformers rounds, so that the result is the same as its own up to the last bits of a float32 sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Elements of heads that one program holds.
_TILE = 1024


def rope_and_write(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    *,
    query_norm: torch.Tensor | None = None,
    key_norm: torch.Tensor | None = None,
    epsilon: float = 0.0,
) -> torch.Tensor:
    """Rotate queries and keys, write keys and values to the cache, and give the queries [tokens, heads, dim].

    `qkv` [tokens, (heads + 2 * kv heads) * dim] holds a token's query heads, then its key heads, then its value heads;
    `positions` [tokens] and `slots` [tokens] are int64, a slot being block * block size + offset, or -1: no write.
    `cos` and `sin` [positions, dim / 2] hold the angles of one half of a head: the halves of transformers' tables are
    the same. The caches are [blocks, block size, kv heads, dim]. With norms [dim], which come together, queries and
    keys are normalised first, with `epsilon`.

    Raises: ValueError for shapes, dtypes or layouts that do not fit together.
    """
    _, _, num_kv_heads, dim = key_cache.shape
    num_heads = qkv.shape[-1] // dim - 2 * num_kv_heads
    dtype = qkv.dtype
    tokens = len(qkv)
    if dim % 2 or num_heads < 1 or (query_norm is None) != (key_norm is None):
        raise ValueError(
            f"{num_heads} query heads of {dim} elements: an even number and both norms or none are wanted"
        )
    angles = [len(cos), dim // 2]
    for name, tensor, wanted, shape in (
        ("qkv", qkv, dtype, [tokens, (num_heads + 2 * num_kv_heads) * dim]),
        ("positions", positions, torch.int64, [tokens]),
        ("slots", slots, torch.int64, [tokens]),
        ("cos", cos, dtype, angles),
        ("sin", sin, dtype, angles),
        ("key_cache", key_cache, dtype, list(key_cache.shape)),
        ("value_cache", value_cache, dtype, list(key_cache.shape)),
        ("query_norm", query_norm, dtype, [dim]),
        ("key_norm", key_norm, dtype, [dim]),
    ):
        _check(name, tensor, wanted, shape)
    query = qkv.new_empty(tokens, num_heads, dim)
    if not tokens:
        return query
    num_rows = num_heads + 2 * num_kv_heads
    half = triton.next_power_of_2(dim // 2)
    rows = min(triton.next_power_of_2(num_rows), max(1, _TILE // (2 * half)))
    _rope_and_write[(tokens, triton.cdiv(num_rows, rows))](
        qkv,
        positions,
        slots,
        cos,
        sin,
        query,
        key_cache,
        value_cache,
        qkv if query_norm is None else query_norm,
        qkv if key_norm is None else key_norm,
        epsilon,
        HEADS=num_heads,
        KV_HEADS=num_kv_heads,
        DIM=dim,
        HALF=half,
        ROWS=rows,
        NORMS=query_norm is not None,
        num_warps=4,
    )
    return query


def _check(name: str, tensor: torch.Tensor | None, dtype: torch.dtype, shape: list[int]) -> None:
    if tensor is None:
        return
    if tensor.dtype != dtype or list(tensor.shape) != shape or not tensor.is_contiguous():
        raise ValueError(
            f"{name} is {tensor.dtype}{list(tensor.shape)}; a contiguous {dtype}{shape} is wanted"
        )


@triton.jit
def _rope_and_write(
    qkv,
    positions,
    slots,
    cos,
    sin,
    query,
    key_cache,
    value_cache,
    query_norm,
    key_norm,
    epsilon,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    NORMS: tl.constexpr,
):
    """One program a token and `ROWS` of its heads, whatever they are; the halves of a head are two tiles."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, HALF)
    inside = (head < HEADS + 2 * KV_HEADS)[:, None] & (column < DIM // 2)[None, :]
    is_query = head < HEADS
    is_value = head >= HEADS + KV_HEADS
    dtype = query.dtype.element_ty

    source = qkv + token * (HEADS + 2 * KV_HEADS) * DIM + head[:, None] * DIM + column[None, :]
    left_in = tl.load(source, mask=inside, other=0.0)
    right_in = tl.load(source + DIM // 2, mask=inside, other=0.0)
    left = left_in.to(tl.float32)
    right = right_in.to(tl.float32)
    if NORMS:
        mean = (tl.sum(left * left, 1) + tl.sum(right * right, 1)) / DIM
        factor = tl.rsqrt(mean + epsilon)[:, None]
        left = (left * factor).to(dtype).to(tl.float32)
        right = (right * factor).to(dtype).to(tl.float32)
        left = (left * _weight(query_norm, key_norm, is_query, column, DIM)).to(dtype)
        left = left.to(tl.float32)
        right_column = column + DIM // 2
        right = (right * _weight(query_norm, key_norm, is_query, right_column, DIM)).to(dtype)
        right = right.to(tl.float32)

    angle = tl.load(positions + token) * (DIM // 2) + column
    c = tl.load(cos + angle, mask=column < DIM // 2, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + angle, mask=column < DIM // 2, other=0.0).to(tl.float32)[None, :]
    # each product is rounded before the sum, as by separate operations
    left_out = (left * c).to(dtype).to(tl.float32) - (right * s).to(dtype).to(tl.float32)
    right_out = (right * c).to(dtype).to(tl.float32) + (left * s).to(dtype).to(tl.float32)
    left_out = tl.where(is_value[:, None], left_in, left_out.to(dtype))
    right_out = tl.where(is_value[:, None], right_in, right_out.to(dtype))

    to_query = query + (token * HEADS + head)[:, None] * DIM + column[None, :]
    tl.store(to_query, left_out, mask=inside & is_query[:, None])
    tl.store(to_query + DIM // 2, right_out, mask=inside & is_query[:, None])
    slot = tl.load(slots + token)
    kv_head = slot * KV_HEADS + (head - HEADS) % KV_HEADS
    offset = kv_head[:, None] * DIM + column[None, :]
    written = inside & (slot >= 0)
    is_key = ~(is_query | is_value)
    tl.store(key_cache + offset, left_out, mask=written & is_key[:, None])
    tl.store(key_cache + offset + DIM // 2, right_out, mask=written & is_key[:, None])
    tl.store(value_cache + offset, left_out, mask=written & is_value[:, None])
    tl.store(value_cache + offset + DIM // 2, right_out, mask=written & is_value[:, None])


@triton.jit
def _weight(
    query_norm,
    key_norm,
    is_query,
    column,
    DIM: tl.constexpr,
):
    """Weights [heads, columns] of the norms, by what a head is."""
    of_query = tl.load(query_norm + column, mask=column < DIM, other=0.0).to(tl.float32)
    of_key = tl.load(key_norm + column, mask=column < DIM, other=0.0).to(tl.float32)
    return tl.where(is_query[:, None], of_query[None, :], of_key[None, :])
