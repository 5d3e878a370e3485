"""Attention of decode rows over the blocks of the KV cache.

Split KV (Flash-Decoding, pytorch.org/blog/flash-decoding): a row's visible tokens are cut into parts that are attended
to at the same time, and a second kernel joins what they give. Within a part the softmax is online (arXiv 2205.14135).
All query heads that share a key head are one program's, so that every key and value is read once (arXiv 2305.13245).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from inference_worker.model.kernels import num_processors

# Tokens of a part that are attended to at once, at most, and bytes of their keys and values, of which two tiles lie in
# shared memory at a time.
_TILE = 64
_TILE_BYTES = 32 * 1024
# Fewest rows and columns of a matrix product on tensor cores.
_LEAST = 16
_MOST_SPLITS = 64
_LOG2_E = tl.constexpr(math.log2(math.e))


def decode_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    """Attention of one query a row over the row's cached tokens: [rows, heads, value dim] in the query's dtype.

    `query` is [rows, heads, key dim]; the caches are [blocks, block size, kv heads, key dim] and [..., value dim];
    `block_table` [rows, width] and `lengths` [rows] are int32, a length including the querying token, at most width *
    block size; a row of length 0 gives zeros. `window` is the number of visible tokens, the querying one included;
    `softcap` bounds the scores (arXiv 2408.00118); `sinks` [heads] take weight and give no value (arXiv 2508.10925).
    `splits` is how many parts a row is cut into, by default `num_splits`.

    What is launched depends on shapes alone, never on `lengths`, so it can be captured in a CUDA graph. The same input
    gives the same bits, and another number of splits may give others. Triton compiles one variant for rows that are cut
    and one for rows that are not, but none for a number of rows, splits or blocks: every stream would wait for it.

    Raises: ValueError for shapes, dtypes or layouts that do not fit together.
    """
    rows, num_heads, key_dim = query.shape
    _, block_size, num_kv_heads, value_dim = value_cache.shape
    _check(query, key_cache, value_cache, block_table, lengths, sinks)
    if splits is None:
        splits = num_splits(
            rows * num_kv_heads, block_table.shape[1] * block_size, num_processors(query.device)
        )
    out = query.new_empty(rows, num_heads, value_dim)
    if rows == 0:
        return out
    # a part's attention and the logarithm, to base 2, of its softmax's denominator
    parts = (
        out
        if splits == 1
        else out.new_empty(rows, num_heads, splits, value_dim, dtype=torch.float32)
    )
    sums = torch.empty(rows, num_heads, splits, dtype=torch.float32, device=query.device)
    group = num_heads // num_kv_heads
    key_width = max(_LEAST, triton.next_power_of_2(key_dim))
    value_width = max(_LEAST, triton.next_power_of_2(value_dim))
    tile = _TILE_BYTES // ((key_width + value_width) * query.element_size())
    tile = max(_LEAST, 1 << (min(tile, _TILE).bit_length() - 1))
    cuts = {"WINDOW": window or 0, "TILE": tile}
    _attend[(rows, num_kv_heads, splits)](
        query,
        key_cache,
        value_cache,
        block_table,
        lengths,
        out if sinks is None else sinks,
        parts,
        sums,
        scale,
        block_table.stride(0),
        splits,
        KV_HEADS=num_kv_heads,
        GROUP=group,
        GROUP_WIDTH=max(_LEAST, triton.next_power_of_2(group)),
        KEY_DIM=key_dim,
        KEY_WIDTH=key_width,
        VALUE_DIM=value_dim,
        VALUE_WIDTH=value_width,
        BLOCK_SIZE=block_size,
        SOFTCAP=softcap or 0.0,
        SINKS=sinks is not None,
        IS_WHOLE=splits == 1,
        **cuts,
        num_warps=4,
        num_stages=2,
    )
    if splits > 1:
        _join[(rows, num_heads)](
            parts,
            sums,
            lengths,
            out if sinks is None else sinks,
            out,
            splits,
            HEADS=num_heads,
            VALUE_DIM=value_dim,
            VALUE_WIDTH=value_width,
            SPLITS_WIDTH=max(_MOST_SPLITS, triton.next_power_of_2(splits)),
            SINKS=sinks is not None,
            **cuts,
            num_warps=4,
        )
    return out


def num_splits(num_pairs: int, most_tokens: int, processors: int) -> int:
    """Parts to cut each row into: enough programs for two a processor, but no part below two tiles in a full row.

    `num_pairs` is rows times key heads. A power of two, so that few numbers of splits, each of which rounds in its own
    way, ever occur.
    """
    wanted = -(-2 * processors // max(1, num_pairs))
    most = max(1, min(wanted, most_tokens // (2 * _TILE), _MOST_SPLITS))
    return 1 << (most.bit_length() - 1)


def _check(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    sinks: torch.Tensor | None,
) -> None:
    rows, num_heads, key_dim = query.shape
    num_blocks, block_size, num_kv_heads, value_dim = value_cache.shape
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} heads are not a multiple of {num_kv_heads} key heads")
    blocks = [num_blocks, block_size, num_kv_heads]
    for name, tensor, dtype, shape in (
        ("query", query, query.dtype, [rows, num_heads, key_dim]),
        ("key_cache", key_cache, query.dtype, [*blocks, key_dim]),
        ("value_cache", value_cache, query.dtype, [*blocks, value_dim]),
        ("block_table", block_table, torch.int32, [rows, *block_table.shape[1:2]]),
        ("lengths", lengths, torch.int32, [rows]),
        ("sinks", sinks, query.dtype, [num_heads]),
    ):
        if tensor is None:
            continue
        if tensor.dtype != dtype or list(tensor.shape) != shape:
            raise ValueError(
                f"{name} is {tensor.dtype}{list(tensor.shape)}; {dtype}{shape} is wanted"
            )
        # the columns in use of a wider table are a view
        if not tensor.is_contiguous() and not (name == "block_table" and tensor.stride(1) == 1):
            raise ValueError(f"{name} is not contiguous")


@triton.jit
def _cut(
    length,
    splits,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
):
    """A row's first visible token, and the tokens of each part: whole tiles, as few as the splits need."""
    begin = length * 0
    if WINDOW > 0:
        begin = tl.maximum(length - WINDOW, 0)
    size = tl.cdiv(tl.cdiv(length - begin, TILE), splits) * TILE
    return begin, size


@triton.jit(do_not_specialize=["table_stride", "splits"])
def _attend(
    query,
    key_cache,
    value_cache,
    block_table,
    lengths,
    sinks,
    parts,
    sums,
    scale,
    table_stride,
    splits,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_WIDTH: tl.constexpr,
    KEY_DIM: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program a row, key head and part, which is the row where rows are whole.

    Invariant of the loop: `maximum`, `total` and `attended` are the softmax's maximum, denominator and numerator over
    the tokens so far, as powers of two.
    """
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(lengths + row)
    begin, size = _cut(length, splits, WINDOW, TILE)
    first = begin + split * size
    last = tl.minimum(first + size, length)

    member = tl.arange(0, GROUP_WIDTH)
    key_column = tl.arange(0, KEY_WIDTH)
    value_column = tl.arange(0, VALUE_WIDTH)
    head = row * KV_HEADS * GROUP + kv_head * GROUP + member
    is_head = member < GROUP
    q = tl.load(
        query + head[:, None] * KEY_DIM + key_column[None, :],
        mask=is_head[:, None] & (key_column < KEY_DIM)[None, :],
        other=0.0,
    )
    maximum = tl.full([GROUP_WIDTH], -float("inf"), tl.float32)
    total = tl.zeros([GROUP_WIDTH], tl.float32)
    attended = tl.zeros([GROUP_WIDTH, VALUE_WIDTH], tl.float32)
    for start in range(first, last, TILE):
        token = start + tl.arange(0, TILE)
        visible = token < last
        block = tl.load(
            block_table + row * table_stride + token // BLOCK_SIZE, mask=visible, other=0
        )
        slot = block.to(tl.int64) * BLOCK_SIZE + token % BLOCK_SIZE
        cached = slot * KV_HEADS + kv_head
        k = tl.load(
            key_cache + cached[None, :] * KEY_DIM + key_column[:, None],
            mask=visible[None, :] & (key_column < KEY_DIM)[:, None],
            other=0.0,
        )
        v = tl.load(
            value_cache + cached[:, None] * VALUE_DIM + value_column[None, :],
            mask=visible[:, None] & (value_column < VALUE_DIM)[None, :],
            other=0.0,
        )
        scores = tl.dot(q, k, input_precision="ieee") * scale
        if SOFTCAP > 0:
            # the hyperbolic tangent, which triton has on GPUs alone
            scores = SOFTCAP * (2.0 / (1.0 + tl.exp(scores * (-2.0 / SOFTCAP))) - 1.0)
        scores = tl.where(visible[None, :], scores * _LOG2_E, -float("inf"))
        # finite: at least one token of a tile is visible
        higher = tl.maximum(maximum, tl.max(scores, 1))
        shrink = tl.exp2(maximum - higher)
        weights = tl.exp2(scores - higher[:, None])
        total = total * shrink + tl.sum(weights, 1)
        attended = attended * shrink[:, None]
        attended += tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        maximum = higher

    if IS_WHOLE and SINKS:
        sink = tl.load(sinks + kv_head * GROUP + member, mask=is_head, other=0.0)
        sink = sink.to(tl.float32) * _LOG2_E
        higher = tl.maximum(maximum, sink)
        shrink = tl.exp2(maximum - higher)
        total = total * shrink + tl.exp2(sink - higher)
        attended = attended * shrink[:, None]
    if IS_WHOLE | (first < last):
        part = head * splits + split
        attended = attended / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(
            parts + part[:, None] * VALUE_DIM + value_column[None, :],
            attended.to(parts.dtype.element_ty),
            mask=is_head[:, None] & (value_column < VALUE_DIM)[None, :],
        )
        if not IS_WHOLE:
            tl.store(sums + part, maximum + tl.log2(total), mask=is_head)


@triton.jit(do_not_specialize=["splits"])
def _join(
    parts,
    sums,
    lengths,
    sinks,
    out,
    splits,
    HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    SPLITS_WIDTH: tl.constexpr,
    SINKS: tl.constexpr,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program a row and head: the parts that hold tokens, each weighted by its share of the denominator."""
    row = tl.program_id(0)
    head = row.to(tl.int64) * HEADS + tl.program_id(1)
    length = tl.load(lengths + row)
    begin, size = _cut(length, splits, WINDOW, TILE)
    split = tl.arange(0, SPLITS_WIDTH)
    column = tl.arange(0, VALUE_WIDTH)
    # later parts were not written
    holds = (split < splits) & (begin + split * size < length)
    logs = tl.load(sums + head * splits + split, mask=holds, other=-float("inf"))
    maximum = tl.max(logs, 0)
    if SINKS:
        sink = tl.load(sinks + tl.program_id(1)).to(tl.float32) * _LOG2_E
        maximum = tl.maximum(maximum, sink)
    # of an empty row it is the logarithm of nothing
    maximum = tl.where(maximum == -float("inf"), 0.0, maximum)
    shares = tl.exp2(logs - maximum)
    total = tl.sum(shares, 0)
    if SINKS:
        total += tl.exp2(sink - maximum)
    values = tl.load(
        parts + (head * splits + split)[:, None] * VALUE_DIM + column[None, :],
        mask=holds[:, None] & (column < VALUE_DIM)[None, :],
        other=0.0,
    )
    joined = tl.sum(values * shares[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(
        out + head * VALUE_DIM + column,
        joined.to(out.dtype.element_ty),
        mask=column < VALUE_DIM,
    )
