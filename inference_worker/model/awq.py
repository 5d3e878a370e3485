"""A linear layer with 4-bit AWQ weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn

from inference_worker.model import kernels
from inference_worker.model.awq_cpu import CpuWeights
from inference_worker.model.awq_layout import AwqWeights
from inference_worker.model.errors import LoadError


class PackedWeights(Protocol):
    """The weights of one layer in the form that a device multiplies them in."""

    @property
    def num_bytes(self) -> int:
        """Memory taken."""
        ...

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, in] times the weights: [rows, out]."""
        ...

    @staticmethod
    def join(parts: Sequence[Any]) -> PackedWeights | None:
        """The outputs of several of the same kind side by side; None where they do not fit."""
        ...

    def cut(self, sizes: Sequence[int]) -> Sequence[PackedWeights]:
        """Views of what was joined, by numbers of outputs."""
        ...


class AwqLinear(nn.Module):
    """y = x W' + b with weights that stay packed, in place of a `nn.Linear`; made on its device, and stays there."""

    def __init__(
        self, weights: PackedWeights, sizes: tuple[int, int], bias: torch.Tensor | None
    ) -> None:
        """`sizes` are the numbers of inputs and outputs."""
        super().__init__()
        self.in_features, self.out_features = sizes
        self._weights = weights
        self.bias = bias

    @classmethod
    def pack(cls, weights: AwqWeights, bias: torch.Tensor | None, dtype: torch.dtype) -> AwqLinear:
        """Pack weights for products in `dtype` on the device where they are.

        Raises: LoadError.
        """
        out_features, in_features = weights.codes.shape
        packed: PackedWeights
        if weights.codes.is_cuda:
            if not kernels.is_available():
                raise LoadError("AWQ weights on a GPU need triton, which is not installed")
            from inference_worker.model.awq_cuda import CudaWeights

            packed = CudaWeights.pack(weights)
        else:
            packed = CpuWeights.pack(weights, dtype)
        bias = None if bias is None else bias.to(dtype)
        return cls(packed, (in_features, out_features), bias)

    @classmethod
    def fuse(cls, parts: Sequence[AwqLinear]) -> AwqLinear | None:
        """One layer that gives the outputs of several of the same input side by side; None if they do not fit.

        The parts go on working, on views of the fused weights: nothing is kept twice.
        """
        weights = parts[0]._weights.join([part._weights for part in parts])
        if weights is None or len({part.bias is None for part in parts}) > 1:
            return None
        sizes = [part.out_features for part in parts]
        biases = [part.bias for part in parts if part.bias is not None]
        for part, view in zip(parts, weights.cut(sizes), strict=True):
            part._weights = view
        bias = torch.cat(biases) if biases else None
        return cls(weights, (parts[0].in_features, sum(sizes)), bias)

    @property
    def num_weights(self) -> int:
        """Weights that the layer stands for, packed or not."""
        return self.in_features * self.out_features + (0 if self.bias is None else len(self.bias))

    @property
    def num_bytes(self) -> int:
        """Memory of the packed weights."""
        return self._weights.num_bytes

    @property
    def weights(self) -> PackedWeights:
        """The weights alone: on a CPU they are CpuWeights."""
        return self._weights

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Outputs [..., out] of inputs [..., in]."""
        out = self._weights.multiply(x.reshape(-1, self.in_features))
        if self.bias is not None:
            out = out + self.bias
        return out.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """As nn.Linear's."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
