"""The weights of a linear layer as the C code reads them."""

from __future__ import annotations

import ctypes
from typing import Any, Final

import torch
from torch import nn

from inference_worker.model.awq import AwqLinear
from inference_worker.model.awq_cpu import CpuWeights
from inference_worker.model.projection import Projection

_BLOCK: Final = 16  # outputs
_WORD: Final = 8  # codes


class Unfit(Exception):
    """The C code does not know something of this model; the message is one line."""


class CMatrix(ctypes.Structure):
    """See Matrix in decoder.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weights", "bias", "scales", "offsets")),
        ("group_size", ctypes.c_int64),
    ]


class Matrix:
    """Tensors of a projection: its own where it is a plain matrix, a copy in another order of 4-bit codes."""

    def __init__(self, projection: Projection) -> None:
        """Raises: Unfit."""
        linear: Any = projection
        self.in_features: int
        self.out_features: int
        self._scales: torch.Tensor | None = None
        self._offsets: torch.Tensor | None = None
        self._group_size = 0
        if type(linear) is nn.Linear and linear.weight.is_contiguous():
            self._weights: torch.Tensor = linear.weight
        elif isinstance(linear, AwqLinear) and isinstance(linear.weights, CpuWeights):
            if linear.out_features % _BLOCK:
                raise Unfit(f"4-bit weights have {linear.out_features} outputs, no multiple of 16")
            codes, self._scales, self._offsets = linear.weights.unpack()
            self._weights = arrange(codes)
            self._group_size = linear.in_features // len(self._scales)
        else:
            raise Unfit("its projections are not plain matrices")
        self._bias: torch.Tensor | None = linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What is read whole for every row."""
        return [x for x in (self._weights, self._scales, self._offsets) if x is not None]

    def addresses(self, shape: tuple[int, int], dtype: torch.dtype) -> CMatrix:
        """What C gets; good for as long as this lives. Raises: Unfit, if it is of another shape or dtype."""
        rows, columns = shape
        bias = address(self._bias, (rows,), dtype)
        if self._scales is None or self._offsets is None:
            return CMatrix(address(self._weights, shape, dtype), bias, None, None, 0)
        words = address(self._weights, (rows // _BLOCK, columns // _WORD, _BLOCK), torch.int32)
        groups = (columns // self._group_size, rows)
        scales, offsets = (address(x, groups, dtype) for x in (self._scales, self._offsets))
        return CMatrix(words, bias, scales, offsets, self._group_size)


def arrange(codes: torch.Tensor) -> torch.Tensor:
    """Words int32 [out / 16, in / 8, 16] of codes uint8 [out, in]: see code_tile in decoder.c."""
    num_out, num_in = codes.shape
    # input 2j + i of a word is in its bits 4j + 16i on: the order of nibbles is all even inputs, then all odd ones
    nibbles = codes.view(num_out, num_in // _WORD, _WORD // 2, 2).transpose(2, 3).flatten(2)
    words = (nibbles[..., ::2] | nibbles[..., 1::2] << 4).contiguous().view(torch.int32)
    return words.view(-1, _BLOCK, num_in // _WORD).transpose(1, 2).contiguous()


def address(tensor: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> int | None:
    """Of its first element; None of None. Raises: Unfit, if it is not what C takes it for."""
    if tensor is None:
        return None
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        raise Unfit("its weights differ in kind")
    return tensor.data_ptr()
