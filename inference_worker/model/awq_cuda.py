"""AWQ weights on a GPU: in AWQ's own gemm layout, multiplied by Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from inference_worker.model.awq_layout import AwqWeights, pack_gemm
from inference_worker.model.kernels import w4a16


class CudaWeights:
    """One layer's weights, in 16-bit products: up to 16 rows as they are, more by way of unpacked weights."""

    def __init__(
        self, qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, group_size: int
    ) -> None:
        """The tensors are those of the gemm layout."""
        self._qweight = qweight
        self._qzeros = qzeros
        self._scales = scales
        self._group_size = group_size

    @classmethod
    def pack(cls, weights: AwqWeights) -> CudaWeights:
        """Pack a layer's weights."""
        return cls(**pack_gemm(weights), group_size=weights.group_size)

    @staticmethod
    def join(parts: Sequence[CudaWeights]) -> CudaWeights:
        """The outputs of several side by side."""
        return CudaWeights(
            torch.cat([part._qweight for part in parts], 1),
            torch.cat([part._qzeros for part in parts], 1),
            torch.cat([part._scales for part in parts], 1),
            parts[0]._group_size,
        )

    def cut(self, sizes: Sequence[int]) -> list[CudaWeights]:
        """Views of what was joined, by numbers of outputs."""
        words = [size // 8 for size in sizes]
        tensors = zip(
            torch.split(self._qweight, words, 1),
            torch.split(self._qzeros, words, 1),
            torch.split(self._scales, list(sizes), 1),
            strict=True,
        )
        return [CudaWeights(*each, self._group_size) for each in tensors]

    @property
    def num_bytes(self) -> int:
        """Memory taken."""
        return self._qweight.nbytes + self._qzeros.nbytes + self._scales.nbytes

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, in] times the weights: [rows, out] in x's dtype."""
        # only what `cut` gave is not contiguous
        stored = (
            self._qweight.contiguous(),
            self._scales.contiguous(),
            self._qzeros.contiguous(),
            self._group_size,
        )
        if len(x) <= w4a16.MAX_GEMV_ROWS:
            return w4a16.w4a16_gemv(x.contiguous(), *stored)
        return x @ w4a16.w4a16_dequantize(*stored, x.dtype)
