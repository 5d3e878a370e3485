"""AWQ weights on a CPU: in the layout of torch's 4-bit matrix product, which is fast in bfloat16 alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Final

import torch

from inference_worker.model.awq_layout import AwqWeights
from inference_worker.model.errors import LoadError

# Rows above which unpacking the weights and an ordinary product take less time than the 4-bit product, which costs the
# same for each four rows. Measured with one thread, for weights of 256 x 1536 to 4096 x 4096: at 128 rows they take 1.3
# to 1.5 times its time, at 256 rows 0.9 to 1.0 times (`python -m benchmarks.awq`).
MAX_INT4_ROWS: Final = 192
# Outputs are padded to whole blocks of the layout, so that weights can be joined and cut block by block.
_BLOCK: Final = 64
# Weights that are unpacked at a time: few enough to stay in a processor's cache.
_TILE: Final = 2**19


class CpuWeights:
    """One layer's weights, packed. `dtype` is that of the products.

    In bfloat16 small batches are multiplied as they are; in other dtypes the weights are unpacked for each product,
    which is slow.
    """

    def __init__(
        self, packed: torch.Tensor, scales_zeros: torch.Tensor, out_features: int, group_size: int
    ) -> None:
        """`packed` is uint8 [padded out, in / 2]; `scales_zeros` [groups, padded out, 2] holds s and (8 - z) * s."""
        self._packed = packed
        self._scales_zeros = scales_zeros
        self._out_features = out_features
        self._group_size = group_size

    @classmethod
    def pack(cls, weights: AwqWeights, dtype: torch.dtype) -> CpuWeights:
        """Pack a layer's weights. Raises: LoadError if this build of torch packs in a way that is not known."""
        _lane_order()
        out_features = len(weights.codes)
        padding = -out_features % _BLOCK
        codes = torch.nn.functional.pad(weights.codes, (0, 0, 0, padding))
        scales = weights.scales.float()
        offsets = (8 - weights.zeros.float()) * scales
        scales_zeros = torch.stack((scales, offsets), -1).to(dtype)
        scales_zeros = torch.nn.functional.pad(scales_zeros, (0, 0, 0, padding))
        return cls(_pack(codes), scales_zeros.contiguous(), out_features, weights.group_size)

    @staticmethod
    def join(parts: Sequence[CpuWeights]) -> CpuWeights | None:
        """The outputs of several side by side; None if that would leave padding between them."""
        if any(part._out_features % _BLOCK for part in parts[:-1]):
            return None
        return CpuWeights(
            torch.cat([part._packed for part in parts]),
            torch.cat([part._scales_zeros for part in parts], 1),
            sum(part._out_features for part in parts),
            parts[0]._group_size,
        )

    def cut(self, sizes: Sequence[int]) -> list[CpuWeights]:
        """Views of what was joined, by numbers of outputs."""
        padded = [size + -size % _BLOCK for size in sizes]
        packed = torch.split(self._packed, padded)
        scales_zeros = torch.split(self._scales_zeros, padded, 1)
        return [
            CpuWeights(*each, self._group_size)
            for each in zip(packed, scales_zeros, sizes, strict=True)
        ]

    @property
    def num_bytes(self) -> int:
        """Memory taken."""
        return self._packed.nbytes + self._scales_zeros.nbytes

    def unpack(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes uint8 [out, in]; scales and offsets [groups, out]. A weight is (code - 8) * scale + offset."""
        out, groups = self._out_features, len(self._scales_zeros)
        codes = self._codes(0, len(self._packed)).transpose(1, 2).flatten(0, 1)[:out]
        scales, offsets = self._scales_zeros[:, :out].reshape(groups, out, 2).unbind(2)
        return codes.contiguous(), scales.contiguous(), offsets.contiguous()

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, in] times the weights: [rows, out] in the weights' dtype."""
        if self._scales_zeros.dtype == torch.bfloat16 and len(x) <= MAX_INT4_ROWS and _is_fast():
            out: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
                x.contiguous(), self._packed, self._group_size, self._scales_zeros.contiguous()
            )
        else:
            out = self._multiply_unpacked(x)
        return out[:, : self._out_features]

    def _multiply_unpacked(self, x: torch.Tensor) -> torch.Tensor:
        padded_out, in_features = len(self._packed), self._packed.shape[1] * 2
        step = max(_BLOCK, _TILE // in_features // _BLOCK * _BLOCK)
        out = x.new_empty(len(x), padded_out)
        tile = x.new_empty(in_features, min(step, padded_out))
        for start in range(0, padded_out, step):
            stop = min(start + step, padded_out)
            weights = self._unpack(start, stop, tile[:, : stop - start])
            torch.mm(x, weights, out=out[:, start:stop])
        return out

    def _unpack(self, start: int, stop: int, into: torch.Tensor) -> torch.Tensor:
        """Write the weights of some outputs, whole blocks, to `into` [in, stop - start]."""
        codes = self._codes(start, stop, into.dtype).sub_(8)
        num_blocks, _, block = codes.shape
        groups = len(self._scales_zeros)
        # [block of outputs, group, input in the group, output in the block]
        shape = (num_blocks, groups, -1, block)
        scales, offsets = (
            self._scales_zeros[:, start:stop, i].view(groups, num_blocks, 1, block).transpose(0, 1)
            for i in (0, 1)
        )
        target = into.view(groups, -1, num_blocks, block).permute(2, 0, 1, 3)
        torch.addcmul(offsets, codes.view(shape), scales, out=target)
        return into

    def _codes(self, start: int, stop: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        """Codes of some outputs, whole blocks: [block, in, output in the block]."""
        block, is_paired = _lane_order()
        in_features = 2 * self._packed.shape[1]
        packed = self._packed[start:stop].view(-1, in_features, block // 2)
        codes = torch.empty(len(packed), in_features, block, dtype=dtype)
        low, high = (codes[..., ::2], codes[..., 1::2]) if is_paired else codes.chunk(2, -1)
        low.copy_(packed & 15)
        high.copy_(packed >> 4)
        return codes


def _is_fast() -> bool:
    """Whether torch's 4-bit product uses this processor's vectors: it does on x86 since AVX2."""
    return not _lane_order()[1]


@cache
def _lane_order() -> tuple[int, bool]:
    """How torch packs: outputs in a block, and whether a byte holds neighbouring ones, or one of each half.

    It depends on the processor, is not documented, and is found by trying.

    Raises: LoadError.
    """
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (2 * _BLOCK, 32), generator=generator, dtype=torch.uint8)
    packed = _pack(codes)
    for block in (64, 32, 16):
        for is_paired in (False, True):
            view = packed.view(-1, 32, block // 2)
            low, high = view & 15, view >> 4
            lanes = torch.stack((low, high), -1) if is_paired else torch.stack((low, high), -2)
            if torch.equal(lanes.flatten(2).transpose(1, 2).reshape(codes.shape), codes):
                return block, is_paired
    raise LoadError("AWQ: the order of 4-bit weights in this build of torch is not known")


def _pack(codes: torch.Tensor) -> torch.Tensor:
    """Codes uint8 [out, in] as bytes [out, in / 2]."""
    packed: torch.Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    return packed
