"""The kernels of AWQ weights, against weights dequantized by hand."""

from __future__ import annotations

import pytest
import torch

from inference_worker.model.kernels.w4a16 import MAX_GEMV_ROWS, w4a16_dequantize, w4a16_gemv
from tests.worker.model.kernels.device import DEVICE
from tests.worker.model.kernels.nearness import DTYPES, cosine

GROUP_SIZES = [32, 64, 128]


class Weights:
    """Random AWQ weights, packed nibble by nibble, and what they stand for."""

    def __init__(self, num_in: int, num_out: int, group_size: int) -> None:
        torch.manual_seed(num_in + num_out + group_size)
        self.group_size = group_size
        integers = torch.randint(16, (num_in, num_out))
        zeros = torch.randint(16, (num_in // group_size, num_out))
        self.scales = (0.01 + 0.02 * torch.rand(zeros.shape)).half().to(DEVICE)
        self.qweight, self.qzeros = _pack(integers).to(DEVICE), _pack(zeros).to(DEVICE)
        each = (integers - zeros.repeat_interleave(group_size, 0)).double().to(DEVICE)
        self.exact = each * self.scales.double().repeat_interleave(group_size, 0)

    def gemv(self, x: torch.Tensor) -> torch.Tensor:
        return w4a16_gemv(x, self.qweight, self.scales, self.qzeros, self.group_size)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        return w4a16_dequantize(self.qweight, self.scales, self.qzeros, self.group_size, dtype)


def _pack(nibbles: torch.Tensor) -> torch.Tensor:
    """int32 [rows, columns / 8], nibble i of a word from its column 0 2 4 6 1 3 5 7."""
    words = torch.zeros(nibbles.shape[0], nibbles.shape[1] // 8, dtype=torch.int64)
    for place, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        words |= nibbles[:, column::8] << (4 * place)
    return words.to(torch.uint32).view(torch.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("num_out", [8, 72, 264])  # the last is of several programs
def test_dequantize(num_out: int, group_size: int, dtype: torch.dtype) -> None:
    weights = Weights(256, num_out, group_size)
    # every product is exact in float32, so each weight is rounded once
    assert torch.equal(weights.dequantize(dtype), weights.exact.float().to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize(("rows", "num_out"), [(1, 8), (5, 72), (MAX_GEMV_ROWS, 264)])
def test_gemv(num_out: int, rows: int, group_size: int, dtype: torch.dtype) -> None:
    weights = Weights(128, num_out, group_size)
    x = torch.randn(rows, 128, device=DEVICE).to(dtype)
    expected = x.double() @ weights.exact
    actual = weights.gemv(x)
    assert actual.dtype == dtype
    assert cosine(actual, expected) > 0.99999
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def test_more_groups_than_splits() -> None:
    weights = Weights(19 * 32, 8, 32)
    x = torch.randn(2, 19 * 32, device=DEVICE)
    expected = x.double() @ weights.exact
    torch.testing.assert_close(weights.gemv(x).double(), expected, rtol=0, atol=1e-5)


def test_a_row_gives_the_same_bits_again_and_beside_others() -> None:
    weights = Weights(256, 64, 64)
    x = torch.randn(MAX_GEMV_ROWS, 256, device=DEVICE).half()
    together = weights.gemv(x)
    assert torch.equal(weights.gemv(x), together)
    for row in (0, 7, 15):
        assert torch.equal(weights.gemv(x[row : row + 1])[0], together[row])


def test_every_nibble_and_the_sign_bit() -> None:
    """Words of equal nibbles, of which half are negative as int32."""
    words = torch.tensor([0x11111111 * i for i in range(16)], dtype=torch.int64)
    qweight = words.to(torch.uint32).view(torch.int32).repeat(2)[:, None].to(DEVICE).contiguous()
    scales = torch.ones(1, 8, device=DEVICE)
    zeros = torch.zeros(1, 1, dtype=torch.int32, device=DEVICE)
    weights = w4a16_dequantize(qweight, scales, zeros, 32, torch.float32)
    assert torch.equal(weights, torch.arange(16.0, device=DEVICE).repeat(2)[:, None].expand(32, 8))


def test_what_does_not_fit_is_refused() -> None:
    weights = Weights(256, 64, 64)
    x = torch.randn(2, 256, device=DEVICE)
    for wrong in (x[:, :128], x[0], x.repeat(9, 1), x[:0]):
        with pytest.raises(ValueError, match="rows of 256"):
            weights.gemv(wrong)
    with pytest.raises(ValueError, match="not contiguous"):
        weights.gemv(x.repeat(1, 2)[:, ::2])
    for group_size, message in ((48, "group size is 48"), (128, "scales"), (32, "scales")):
        weights.group_size = group_size
        with pytest.raises(ValueError, match=message):
            weights.gemv(x)
    weights.group_size = 64
    for field in ("qweight", "qzeros"):
        broken = Weights(256, 64, 64)
        setattr(broken, field, getattr(broken, field).long())
        with pytest.raises(ValueError, match=f"{field} is of"):
            broken.dequantize(torch.float16)
