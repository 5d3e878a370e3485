"""SiLU(gate) * up, the activation of gated MLPs (arXiv 2002.05202), rounded where transformers rounds."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_WIDTH = 1024


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """SiLU of the left half of gate_up [rows, 2 * dim], times its right half: [rows, dim].

    Raises: ValueError for a shape or layout that does not fit.
    """
    if gate_up.ndim != 2 or gate_up.shape[1] % 2 or not gate_up.is_contiguous():
        raise ValueError(
            f"gate_up is {list(gate_up.shape)}; contiguous rows [rows, 2 * dim] are wanted"
        )
    rows, dim = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, dim)
    if rows:
        width = min(_WIDTH, triton.next_power_of_2(dim))
        _silu_mul[(rows, triton.cdiv(dim, width))](gate_up, out, DIM=dim, WIDTH=width, num_warps=4)
    return out


@triton.jit
def _silu_mul(
    gate_up,
    out,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program a part of a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < DIM
    dtype = out.dtype.element_ty
    gate = tl.load(gate_up + row * 2 * DIM + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + (row * 2 + 1) * DIM + column, mask=inside, other=0.0).to(tl.float32)
    activated = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out + row * DIM + column, (activated * up).to(dtype), mask=inside)
