"""Root mean square normalisation (arXiv 1910.07467), rounded where transformers' `LlamaRMSNorm` rounds.

That is weight * (x / sqrt(mean(x^2) + epsilon)): the quotient in float32, rounded to x's dtype, then the product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Normalise each row of x [rows, dim] and scale it by weight [dim].

    Raises: ValueError for shapes, dtypes or layouts that do not fit together.
    """
    _check(x, weight)
    out = torch.empty_like(x)
    _launch(x, x, weight, out, epsilon, adds=False)
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> torch.Tensor:
    """Add x [rows, dim] to `residual` in place, and give the sum's normalised rows.

    Raises: ValueError for shapes, dtypes or layouts that do not fit together.
    """
    _check(x, weight)
    if residual.shape != x.shape or residual.dtype != x.dtype or not residual.is_contiguous():
        raise ValueError(
            f"residual is {residual.dtype}{list(residual.shape)}; a contiguous {x.dtype}{list(x.shape)} is wanted"
        )
    out = torch.empty_like(x)
    _launch(x, residual, weight, out, epsilon, adds=True)
    return out


def _check(x: torch.Tensor, weight: torch.Tensor) -> None:
    if x.ndim != 2 or not x.is_contiguous():
        raise ValueError(f"x is {list(x.shape)}; contiguous rows [rows, dim] are wanted")
    if weight.shape != x.shape[1:] or weight.dtype != x.dtype or not weight.is_contiguous():
        raise ValueError(
            f"weight is {weight.dtype}{list(weight.shape)}; a contiguous {x.dtype}[{x.shape[1]}] is wanted"
        )


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    epsilon: float,
    *,
    adds: bool,
) -> None:
    rows, dim = x.shape
    if rows == 0:
        return
    width = triton.next_power_of_2(dim)
    warps = min(16, max(1, width // 512))
    _normalise[(rows,)](
        x, residual, weight, out, epsilon, DIM=dim, WIDTH=width, ADDS=adds, num_warps=warps
    )


@triton.jit
def _normalise(
    x,
    residual,
    weight,
    out,
    epsilon,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ADDS: tl.constexpr,
):
    """One program a row: it is read once and kept in registers."""
    row = tl.program_id(0).to(tl.int64) * DIM
    column = tl.arange(0, WIDTH)
    inside = column < DIM
    dtype = out.dtype.element_ty
    values = tl.load(x + row + column, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        values += tl.load(residual + row + column, mask=inside, other=0.0).to(tl.float32)
        rounded = values.to(dtype)
        tl.store(residual + row + column, rounded, mask=inside)
        values = rounded.to(tl.float32)
    mean = tl.sum(values * values, 0) / DIM
    normal = (values * tl.rsqrt(mean + epsilon)).to(dtype).to(tl.float32)
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row + column, (scale * normal).to(dtype), mask=inside)
