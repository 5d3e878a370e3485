"""Products with AWQ weights: 4-bit integers times 16-bit activations, on the layout that AWQ checkpoints are stored in.

The layout (AWQ's "gemm" version): `qweight` int32 [in, out / 8], `qzeros` int32 [in / group, out / 8] and `scales`
[in / group, out]. A word holds eight neighbouring columns; its nibbles, from the lowest, are columns 0 2 4 6 1 3 5 7.
A weight is (q - z) * s, with the zero z and the scale s of its group of rows (arXiv 2306.00978).
"""

from __future__ import annotations

import torch

MAX_GEMV_ROWS = 16
_COLUMNS_OF_A_WORD = 8
# the nibble that holds a word's column 0, 1, ... 7
_NIBBLE_OF_COLUMN = (0, 4, 1, 5, 2, 6, 3, 7)


def w4a16_gemv(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    qzeros: torch.Tensor,
    group_size: int,
) -> torch.Tensor:
    """x [rows, in] times the weights [in, out]: [rows, out] in x's dtype, for at most `MAX_GEMV_ROWS` rows.

    The same input gives the same bits every time.

    Raises: ValueError for shapes or dtypes that do not fit together.
    """
    _check(qweight, scales, qzeros, group_size)
    if x.ndim != 2 or x.shape[1] != qweight.shape[0] or not 1 <= x.shape[0] <= MAX_GEMV_ROWS:
        raise ValueError(
            f"x is {list(x.shape)}; 1 to {MAX_GEMV_ROWS} rows of {qweight.shape[0]} are wanted"
        )
    weight = w4a16_dequantize(qweight, scales, qzeros, group_size, torch.float32)
    return (x.float() @ weight).to(x.dtype)


def w4a16_dequantize(
    qweight: torch.Tensor,
    scales: torch.Tensor,
    qzeros: torch.Tensor,
    group_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The weights [in, out] in a dtype, each rounded once.

    Raises: ValueError for shapes or dtypes that do not fit together.
    """
    _check(qweight, scales, qzeros, group_size)
    integers = _unpack(qweight) - _unpack(qzeros).repeat_interleave(group_size, 0)
    return (integers.float() * scales.float().repeat_interleave(group_size, 0)).to(dtype)


def _unpack(words: torch.Tensor) -> torch.Tensor:
    """Nibbles [rows, columns] of words [rows, columns / 8], as int32."""
    shifts = 4 * torch.tensor(_NIBBLE_OF_COLUMN, dtype=torch.int32, device=words.device)
    return ((words[..., None] >> shifts) & 15).flatten(-2)


def _check(
    qweight: torch.Tensor, scales: torch.Tensor, qzeros: torch.Tensor, group_size: int
) -> None:
    num_rows, num_words = qweight.shape
    if group_size < 1 or num_rows % group_size:
        raise ValueError(f"{num_rows} rows are not a multiple of the group size {group_size}")
    num_groups = num_rows // group_size
    for name, tensor, shape in (
        ("scales", scales, (num_groups, num_words * _COLUMNS_OF_A_WORD)),
        ("qzeros", qzeros, (num_groups, num_words)),
    ):
        if tensor.shape != shape:
            raise ValueError(f"{name} is {list(tensor.shape)}; {list(shape)} is wanted")
    for name, tensor in (("qweight", qweight), ("qzeros", qzeros)):
        if tensor.dtype != torch.int32:
            raise ValueError(f"{name} is of {tensor.dtype}; int32 is wanted")
