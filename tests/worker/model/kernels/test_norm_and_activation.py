"""The kernels of norms and the gated activation, against transformers' own modules."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from inference_worker.model.kernels.rms_norm import add_rms_norm, rms_norm
from inference_worker.model.kernels.silu_mul import silu_mul
from tests.worker.model.kernels.device import DEVICE
from tests.worker.model.kernels.nearness import DTYPES, assert_same_up_to_last_bit

EPSILON = 1e-5


def norm_of(dim: int, dtype: torch.dtype) -> LlamaRMSNorm:
    norm = LlamaRMSNorm(dim, EPSILON).to(DEVICE, dtype)
    with torch.no_grad():
        norm.weight.normal_()
    return norm


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "dim"), [(1, 64), (3, 96), (5, 1000), (0, 64)])
def test_rms_norm(rows: int, dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(dim)
    norm = norm_of(dim, dtype)
    x = (3 * torch.randn(rows, dim, device=DEVICE)).to(dtype)
    with torch.no_grad():
        assert_same_up_to_last_bit(rms_norm(x, norm.weight, EPSILON), norm(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "dim"), [(1, 64), (3, 96)])
def test_adding_and_norm(rows: int, dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(dim)
    norm = norm_of(dim, dtype)
    x, residual = torch.randn(2, rows, dim, device=DEVICE).to(dtype)
    before = x.clone()
    total = residual + x
    with torch.no_grad():
        normed = add_rms_norm(x, residual, norm.weight, EPSILON)
        assert torch.equal(residual, total)
        assert torch.equal(x, before)
        assert_same_up_to_last_bit(normed, norm(total))


def test_norm_of_zeros_is_zero() -> None:
    x = torch.zeros(2, 64, device=DEVICE)
    assert torch.equal(rms_norm(x, torch.ones(64, device=DEVICE), EPSILON), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "dim"), [(1, 32), (3, 100), (2, 1500), (0, 8)])
def test_silu_mul(rows: int, dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(dim)
    gate_up = (5 * torch.randn(rows, 2 * dim, device=DEVICE)).to(dtype)
    gate, up = gate_up.chunk(2, -1)
    assert_same_up_to_last_bit(silu_mul(gate_up), functional.silu(gate) * up)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_silu_of_extreme_values() -> None:
    gate_up = torch.tensor([[-1e30, -200.0, 200.0, 1e30, 1.0, 1.0, 1.0, 1.0]], device=DEVICE)
    gate, up = gate_up.chunk(2, -1)
    assert torch.allclose(silu_mul(gate_up), functional.silu(gate) * up)


def test_what_does_not_fit_is_refused() -> None:
    x, weight = torch.ones(2, 64), torch.ones(64)
    for wrong in (weight[:32], weight.half(), torch.ones(64, 2)[:, 0]):
        with pytest.raises(ValueError, match="weight"):
            rms_norm(x, wrong, EPSILON)
    with pytest.raises(ValueError, match="contiguous"):
        rms_norm(torch.ones(64, 2).t(), weight, EPSILON)
    for wrong in (x[:1], x.half(), torch.ones(64, 2).t()):
        with pytest.raises(ValueError, match="residual"):
            add_rms_norm(x, wrong, weight, EPSILON)
    for wrong in (torch.ones(2, 5), torch.ones(4), torch.ones(4, 2).t()):
        with pytest.raises(ValueError, match="gate_up"):
            silu_mul(wrong)
