"""Products with AWQ weights: 4-bit integers times 16-bit activations, on the layout that AWQ checkpoints are stored in.

The layout (AWQ's "gemm" version): `qweight` int32 [in, out / 8], `qzeros` int32 [in / group, out / 8] and `scales`
[in / group, out]. A word holds eight neighbouring columns; its nibbles, from the lowest, are columns 0 2 4 6 1 3 5 7.
A weight is (q - z) * s, with the zero z and the scale s of its group of rows (arXiv 2306.00978).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from inference_worker.model.kernels import num_processors

MAX_GEMV_ROWS = 16
_COLUMNS_OF_A_WORD = 8
# Words of a row that one program multiplies: 128 bytes, a line of the caches.
_WORDS = 32
# Rows and columns of the weights that one program dequantizes.
_ROWS = 32
_COLUMNS = 128
# Fewest rows of a matrix product on tensor cores.
_LEAST_ROWS = tl.constexpr(16)
_MOST_SPLITS = 16


def w4a16_gemv(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    qzeros: torch.Tensor,
    group_size: int,
) -> torch.Tensor:
    """x [rows, in] times the weights [in, out]: [rows, out] in x's dtype, for at most `MAX_GEMV_ROWS` rows.

    The weights are used as they are stored, exact until the sum of a group is scaled in float32, so the result is
    slightly nearer to the exact one than a product with weights that were rounded to 16 bits. The groups are cut into
    splits that are summed in order: the same input gives the same bits, whatever the other rows are.

    Raises: ValueError for shapes, dtypes or layouts that do not fit together.
    """
    _check(qweight, scales, qzeros, group_size)
    num_in, num_out = qweight.shape[0], scales.shape[1]
    if x.ndim != 2 or x.shape[1] != num_in or not 1 <= len(x) <= MAX_GEMV_ROWS:
        raise ValueError(f"x is {list(x.shape)}; 1 to {MAX_GEMV_ROWS} rows of {num_in} are wanted")
    if not x.is_contiguous():
        raise ValueError("x is not contiguous")
    rows, num_groups = len(x), len(scales)
    parts_of_a_row = triton.cdiv(qweight.shape[1], _WORDS)
    wanted = triton.cdiv(2 * num_processors(x.device), parts_of_a_row)
    splits = min(num_groups, _MOST_SPLITS, wanted)
    out = x.new_empty(rows, num_out)
    parts = out if splits == 1 else out.new_empty(splits, rows, num_out, dtype=torch.float32)
    _gemv[(parts_of_a_row, splits)](
        x,
        qweight,
        scales,
        qzeros,
        parts,
        rows,
        IN=num_in,
        OUT=num_out,
        GROUP=group_size,
        GROUPS_OF_A_SPLIT=triton.cdiv(num_groups, splits),
        WORDS=_WORDS,
        num_warps=4,
        num_stages=3,
    )
    if splits > 1:
        _sum[(triton.cdiv(rows * num_out, 1024),)](
            parts, out, rows * num_out, SPLITS=splits, WIDTH=1024, num_warps=4
        )
    return out


def w4a16_dequantize(
    qweight: torch.Tensor,
    scales: torch.Tensor,
    qzeros: torch.Tensor,
    group_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The weights [in, out] in a dtype, each rounded once.

    Raises: ValueError for shapes, dtypes or layouts that do not fit together.
    """
    _check(qweight, scales, qzeros, group_size)
    num_in, num_out = qweight.shape[0], scales.shape[1]
    out = torch.empty(num_in, num_out, dtype=dtype, device=qweight.device)
    _dequantize[(num_in // _ROWS, triton.cdiv(num_out, _COLUMNS))](
        qweight,
        scales,
        qzeros,
        out,
        OUT=num_out,
        GROUP=group_size,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        num_warps=4,
    )
    return out


def _check(
    qweight: torch.Tensor, scales: torch.Tensor, qzeros: torch.Tensor, group_size: int
) -> None:
    num_in, num_words = qweight.shape
    if group_size not in (32, 64, 128):
        raise ValueError(f"the group size is {group_size}; 32, 64 and 128 are supported")
    if num_in % group_size:
        raise ValueError(f"{num_in} rows are not a multiple of the group size {group_size}")
    num_groups = num_in // group_size
    for name, tensor, shape in (
        ("qweight", qweight, [num_in, num_words]),
        ("scales", scales, [num_groups, num_words * _COLUMNS_OF_A_WORD]),
        ("qzeros", qzeros, [num_groups, num_words]),
    ):
        if list(tensor.shape) != shape or not tensor.is_contiguous():
            raise ValueError(f"{name} is {list(tensor.shape)}; a contiguous {shape} is wanted")
        if name != "scales" and tensor.dtype != torch.int32:
            raise ValueError(f"{name} is of {tensor.dtype}; int32 is wanted")


@triton.jit
def _nibbles(words, COLUMNS: tl.constexpr):
    """Eight columns of each word, in order, as the bits of float32 2^23 + nibble: no conversion from integers."""
    spread = tl.interleave(words, words)
    spread = tl.interleave(spread, spread)
    spread = tl.interleave(spread, spread)
    column = tl.arange(0, COLUMNS) % 8
    # even columns are in the word's lower half, odd ones in its upper half
    shift = (column // 2 + column % 2 * 4) * 4
    return ((spread >> shift[None, :]) & 15 | 0x4B000000).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["rows"])
def _gemv(
    x,
    qweight,
    scales,
    qzeros,
    parts,
    rows,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS_OF_A_SPLIT: tl.constexpr,
    WORDS: tl.constexpr,
):
    """One program some words of each row and a split's groups.

    The n-th nibbles of the words are a matrix of their own, of every eighth column: so no nibble has to go to another
    thread, and but for a shift by half a word each stays where it is in its word, times a power of 16.
    """
    split = tl.program_id(1)
    row = tl.arange(0, _LEAST_ROWS)
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    is_word = word < OUT // 8
    nothing = tl.zeros([_LEAST_ROWS, WORDS], tl.float32)
    totals = (nothing, nothing, nothing, nothing, nothing, nothing, nothing, nothing)
    first = split * GROUPS_OF_A_SPLIT
    for group in range(first, tl.minimum(first + GROUPS_OF_A_SPLIT, IN // GROUP)):
        entry = group * GROUP + tl.arange(0, GROUP)
        inputs = tl.load(
            x + row[:, None] * IN + entry[None, :], mask=(row < rows)[:, None], other=0.0
        )
        words = tl.load(
            qweight + entry.to(tl.int64)[:, None] * (OUT // 8) + word[None, :],
            mask=is_word[None, :],
            other=0,
        )
        zeros = tl.load(qzeros + group * (OUT // 8) + word, mask=is_word, other=0)
        halves = (words, words >> 16)
        zero_halves = (zeros, zeros >> 16)
        first_scale = scales + group * OUT + word * 8
        sums = ()
        for place in tl.static_range(8):
            # exact: 2^23 and a nibble each, and in 16 bits their difference times 16^3 at most
            weights = _nibble(halves[place // 4], place % 4)
            weights -= _nibble(zero_halves[place // 4], place % 4)[None, :]
            scale = tl.load(first_scale + _column(place), mask=is_word, other=0.0).to(tl.float32)
            product = tl.dot(inputs, weights.to(inputs.dtype), input_precision="ieee")
            sums += (totals[place] + product * (scale / 16 ** (place % 4))[None, :],)  # type: ignore[assignment]
        totals = sums  # type: ignore[assignment]  # they are as many
    for place in tl.static_range(8):
        column = word * 8 + _column(place)
        tl.store(
            parts + (split * rows + row)[:, None] * OUT + column[None, :],
            totals[place].to(parts.dtype.element_ty),
            mask=(row < rows)[:, None] & is_word[None, :],
        )


@triton.jit
def _nibble(words, place: tl.constexpr):
    """A nibble of the lower half of each word, times 16^place, as the bits of float32 2^23 + that."""
    return (words & (15 << (4 * place)) | 0x4B000000).to(tl.float32, bitcast=True)


@triton.jit
def _column(place: tl.constexpr):
    """The column of a word's eight that a nibble is of: even ones are in the lower half."""
    return place % 4 * 2 + place // 4


@triton.jit(do_not_specialize=["count"])
def _sum(parts, out, count, SPLITS: tl.constexpr, WIDTH: tl.constexpr):
    """The sum over the splits, one after the other."""
    index = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = index < count
    total = tl.zeros([WIDTH], tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts + split * count + index, mask=inside, other=0.0)
    tl.store(out + index, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _dequantize(
    qweight,
    scales,
    qzeros,
    out,
    OUT: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program a tile of weights, of one group: its rows divide any group size."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    word = tl.program_id(1) * (COLUMNS // 8) + tl.arange(0, COLUMNS // 8)
    inside = column < OUT
    is_word = (word < OUT // 8)[None, :]
    group = tl.program_id(0) * ROWS // GROUP
    words = tl.load(qweight + row[:, None] * (OUT // 8) + word[None, :], mask=is_word, other=0)
    zeros = tl.load(qzeros + group * (OUT // 8) + word[None, :], mask=is_word, other=0)
    scale = tl.load(scales + group * OUT + column, mask=inside, other=0.0).to(tl.float32)
    weights = (_nibbles(words, COLUMNS) - _nibbles(zeros, COLUMNS)) * scale[None, :]
    tl.store(
        out + row[:, None] * OUT + column[None, :],
        weights.to(out.dtype.element_ty),
        mask=inside[None, :],
    )
