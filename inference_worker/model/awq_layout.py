"""How AWQ checkpoints lay out their 4-bit weights (arXiv 2306.00978), read from autoawq's packing code.

A weight is (code - zero) * scale, where the codes and zeros are 0 to 15 and each group of neighbouring inputs of one
output shares a zero and a scale. Eight codes share an int32, the first in the lowest bits.

- gemm: `qweight` int32 [in, out / 8], `qzeros` int32 [groups, out / 8], `scales` float16 [groups, out]; a word holds
  eight neighbouring outputs in the order 0 2 4 6 1 3 5 7.
- gemv: `qweight` int32 [out, in / 8], `qzeros` int32 [out, words], `scales` float16 [out, 8 * words]; a word holds
  eight neighbouring inputs, or the zeros of eight groups, in order. The groups are padded: see `_padded_words`.
- gemv_fast: `qweight` int16 [out / 4, in], `scales` and `qzeros` float16 [8 * words, out]; a word holds one code of
  four neighbouring outputs, and the inputs are shuffled: see `_fast_order`. `qzeros` is -zero * scale.

Symmetric checkpoints have the zero 8 throughout, stored or, where they have no `qzeros`, understood.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch

LAYOUTS: Final = ("gemm", "gemv", "gemv_fast")
GROUP_SIZES: Final = (32, 64, 128)
SYMMETRIC_ZERO: Final = 8
_CODES_OF_A_WORD: Final = 8
# The outputs in a gemm word, and where in the word each output is.
_GEMM_ORDER: Final = [0, 2, 4, 6, 1, 3, 5, 7]
_GEMM_PLACES: Final = [_GEMM_ORDER.index(i) for i in range(8)]
# gemv_fast: outputs in a word, and inputs in a tile.
_FAST_OUTPUTS: Final = 4
_FAST_INPUTS: Final = 64


@dataclass(frozen=True, slots=True)
class AwqWeights:
    """One layer's weights, unpacked: weight[o, i] = (codes[o, i] - zeros[g, o]) * scales[g, o] with g = i // group."""

    codes: torch.Tensor  # uint8 [out, in]
    zeros: torch.Tensor  # uint8 [groups, out]
    scales: torch.Tensor  # floating [groups, out]

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        return self.codes.shape[1] // len(self.scales)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weights [out, in]; computed in float32 and rounded once."""
        groups = self.codes.view(len(self.codes), len(self.scales), -1)
        zeros, scales = self.zeros.t()[..., None], self.scales.t()[..., None]
        return ((groups.float() - zeros.float()) * scales.float()).flatten(1).to(dtype)


def stored_shapes(
    layout: str, in_features: int, out_features: int, group_size: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor that a checkpoint stores for a layer, but for its bias."""
    groups = in_features // group_size
    words = _padded_words(groups, group_size)
    if layout == "gemm":
        return {
            "qweight": ((in_features, out_features // _CODES_OF_A_WORD), torch.int32),
            "qzeros": ((groups, out_features // _CODES_OF_A_WORD), torch.int32),
            "scales": ((groups, out_features), torch.float16),
        }
    if layout == "gemv":
        return {
            "qweight": ((out_features, in_features // _CODES_OF_A_WORD), torch.int32),
            "qzeros": ((out_features, words), torch.int32),
            "scales": ((out_features, words * _CODES_OF_A_WORD), torch.float16),
        }
    return {
        "qweight": ((out_features // _FAST_OUTPUTS, in_features), torch.int16),
        "qzeros": ((words * _CODES_OF_A_WORD, out_features), torch.float16),
        "scales": ((words * _CODES_OF_A_WORD, out_features), torch.float16),
    }


def unpack(layout: str, stored: Mapping[str, torch.Tensor | None], group_size: int) -> AwqWeights:
    """Read a layer's stored tensors; `qzeros` None means symmetric."""
    read = _READERS[layout]
    codes, scales, zeros = read(stored["qweight"], stored["scales"], stored["qzeros"], group_size)
    if zeros is None:
        zeros = torch.full_like(scales, SYMMETRIC_ZERO, dtype=torch.uint8)
    return AwqWeights(codes.contiguous(), zeros.contiguous(), scales.contiguous())


def pack_gemm(weights: AwqWeights) -> dict[str, torch.Tensor]:
    """Store weights in the gemm layout."""
    return {
        "qweight": _pack(weights.codes.t(), _GEMM_ORDER),
        "qzeros": _pack(weights.zeros, _GEMM_ORDER),
        "scales": weights.scales.contiguous(),
    }


_Unpacked = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def _read_gemm(
    qweight: torch.Tensor, scales: torch.Tensor, qzeros: torch.Tensor | None, _group_size: int
) -> _Unpacked:
    zeros = None if qzeros is None else _unpack_words(qzeros)[..., _GEMM_PLACES].flatten(1)
    return _unpack_words(qweight)[..., _GEMM_PLACES].flatten(1).t(), scales, zeros


def _read_gemv(
    qweight: torch.Tensor, scales: torch.Tensor, qzeros: torch.Tensor | None, group_size: int
) -> _Unpacked:
    codes = _unpack_words(qweight).flatten(1)
    groups = codes.shape[1] // group_size
    zeros = None if qzeros is None else _unpack_words(qzeros).flatten(1)[:, :groups].t()
    return codes, scales[:, :groups].t(), zeros


def _read_gemv_fast(
    qweight: torch.Tensor, scales: torch.Tensor, qzeros: torch.Tensor | None, group_size: int
) -> _Unpacked:
    in_features = qweight.shape[1]
    tiles = qweight.view(len(qweight), in_features // _FAST_INPUTS, _FAST_INPUTS)
    shifts = torch.arange(0, 16, 4, dtype=torch.int16, device=qweight.device)
    # a tile's codes were four rows of inputs before they were read as columns of four
    rows = ((tiles[..., None] >> shifts) & 15).view(*tiles.shape[:2], _FAST_OUTPUTS, -1)
    codes = rows.transpose(1, 2).reshape(-1, in_features).to(torch.uint8)
    order = _fast_order(in_features).to(codes.device)
    codes = torch.empty_like(codes).index_copy_(1, order, codes)
    groups = in_features // group_size
    scales = scales[:groups]
    if qzeros is None:
        return codes, scales, None
    return codes, scales, (-qzeros[:groups].float() / scales.float()).round().to(torch.uint8)


def _fast_order(in_features: int) -> torch.Tensor:
    """The input at each place of a gemv_fast row: of 32, pairs come from four eighths in turn, and evens first."""
    pairs = torch.arange(32).view(4, 4, 2).transpose(0, 1)
    order = pairs.reshape(4, 4, 2).transpose(1, 2).reshape(32)
    return (torch.arange(0, in_features, 32)[:, None] + order).flatten()


def _padded_words(groups: int, group_size: int) -> int:
    """Words of zeros that the gemv layouts keep for each output: room for 128 inputs' groups each, whole words."""
    multiple = max(1, 128 // group_size)
    words = -(-groups // _CODES_OF_A_WORD)
    return -(-words // multiple) * multiple


def _unpack_words(words: torch.Tensor) -> torch.Tensor:
    """Codes uint8 [..., words, 8] of int32 words [..., words]; the first is in the lowest bits."""
    as_bytes = words.contiguous().view(torch.uint8).view(*words.shape, 4)
    return torch.stack((as_bytes & 15, as_bytes >> 4), -1).flatten(-2)


def _pack(codes: torch.Tensor, order: list[int]) -> torch.Tensor:
    """Words int32 [rows, columns / 8] of codes [rows, columns], eight columns to a word in this order."""
    nibbles = codes.reshape(len(codes), -1, _CODES_OF_A_WORD)[..., order]
    as_bytes = nibbles[..., ::2] | (nibbles[..., 1::2] << 4)
    return as_bytes.flatten(1).contiguous().view(torch.int32)


_READERS: Final[dict[str, Callable[..., _Unpacked]]] = {
    "gemm": _read_gemm,
    "gemv": _read_gemv,
    "gemv_fast": _read_gemv_fast,
}
