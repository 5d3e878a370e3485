"""How near a kernel's result must be to a reference."""

from __future__ import annotations

import torch

from tests.worker.model.kernels.device import DEVICE

# Compiled kernels take a GPU's fast exponential, square root and quotient, each off by some last bits of a float32.
COARSENESS = 1 if DEVICE.type == "cpu" else 4
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def assert_same_up_to_last_bit(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Each element is the expected one or a neighbour of it, and few are neighbours.

    Sums in another order differ in their last bits, which seldom changes a result that is then rounded to 16 bits, or
    one before the last that then makes a difference of two.
    """
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    epsilon = torch.finfo(actual.dtype).eps
    steps = 4 * COARSENESS if actual.dtype == torch.float32 else min(2, COARSENESS)
    difference = (actual.double() - expected.double()).abs()
    assert (difference <= steps * epsilon * expected.double().abs() + 1e-30).all()
    if actual.dtype != torch.float32:
        assert (difference > 0).sum() <= 0.02 * difference.numel()


def cosine(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Cosine similarity of two tensors."""
    return float(torch.cosine_similarity(actual.double().flatten(), expected.double().flatten(), 0))
