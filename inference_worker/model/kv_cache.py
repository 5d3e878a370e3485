"""The KV cache: keys and values of every layer in blocks, and how many blocks there are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from inference_worker.model.errors import LoadError

_KIB, _MIB, _GIB = 2**10, 2**20, 2**30


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer's attention keeps of a token, and how far it looks back."""

    num_kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None  # visible tokens, the querying one included; None: all


class KVCache:
    """Keys and values of every layer.

    Invariant: every element is finite. Attention reads whole blocks and masks what lies past a sequence's end, and a
    masked NaN would still poison the result (0 * NaN is NaN).
    """

    def __init__(
        self,
        layers: Mapping[int, LayerShape],
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        uses_kernels: bool = False,
    ) -> None:
        """Allocate `num_blocks` blocks of `block_size` tokens for layers by their index.

        `uses_kernels`: decode rows are attended to by `kernels.paged_attention`, which copies nothing from the cache
        and reads nothing past a row's end.
        """
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = dtype
        self.device = device
        self.uses_kernels = uses_kernels
        self.layers = dict(layers)
        self.bytes_per_token = bytes_per_token(layers, dtype)
        # of the largest layer
        self.bytes_per_token_of_layer = max(bytes_per_token({0: x}, dtype) for x in layers.values())
        # [num_blocks, block_size, num_kv_heads, dim] by layer
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        for index, layer in layers.items():
            heads = (num_blocks, block_size, layer.num_kv_heads)
            self.keys[index] = _zeros((*heads, layer.key_dim), dtype, device)
            self.values[index] = _zeros((*heads, layer.value_dim), dtype, device)

    def write(
        self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Store a layer's keys and values [tokens, heads, dim] at slots [tokens]."""
        self.keys[layer].flatten(0, 1).index_copy_(0, slots, keys)
        self.values[layer].flatten(0, 1).index_copy_(0, slots, values)

    def clear(self, slots: torch.Tensor) -> None:
        """Zero the slots [tokens] of every layer."""
        for tensor in (*self.keys.values(), *self.values.values()):
            tensor.flatten(0, 1).index_fill_(0, slots, 0)

    def read(self, layer: int, block_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of a layer's keys and values in blocks [n], as [n * block_size, heads, dim]."""
        keys = self.keys[layer].index_select(0, block_ids)
        values = self.values[layer].index_select(0, block_ids)
        return keys.flatten(0, 1), values.flatten(0, 1)

    @property
    def num_bytes(self) -> int:
        """Memory of all blocks."""
        return self.num_blocks * self.block_size * self.bytes_per_token

    def __str__(self) -> str:
        size = self.num_bytes
        shown = f"{size / _GIB:.1f} GiB" if size >= _GIB else f"{size / _MIB:.1f} MiB"
        each = self.bytes_per_token / _KIB
        return (
            f"KV cache: {self.num_blocks} blocks of {self.block_size} tokens, "
            f"{shown} ({each:.1f} KiB a token)"
        )


# The check at the start runs two sequences.
_LEAST_BLOCKS = 2


def bytes_per_token(layers: Mapping[int, LayerShape], dtype: torch.dtype) -> int:
    """Bytes that the layers keep of one token."""
    elements = sum(x.num_kv_heads * (x.key_dim + x.value_dim) for x in layers.values())
    return elements * dtype.itemsize


def count_blocks(
    *, num_bytes: int, block_size: int, token_bytes: int, most_tokens: int | None
) -> int:
    """How many blocks fit into `num_bytes`, and at most what `most_tokens` tokens could ever use.

    Raises: LoadError if not even two blocks fit.
    """
    num_blocks = num_bytes // (block_size * token_bytes)
    if most_tokens is not None:
        num_blocks = min(num_blocks, max(_LEAST_BLOCKS, -(-most_tokens // block_size)))
    if num_blocks < _LEAST_BLOCKS:
        raise LoadError(
            f"no memory for the KV cache of two blocks at least: a block of {block_size} tokens takes "
            f"{block_size * token_bytes / _KIB:.0f} KiB, {max(0, num_bytes) / _KIB:.0f} KiB are left for it"
        )
    return num_blocks


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy's zeros are fresh pages of the system, which cost nothing until they are used; torch's are written
    zeros = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(zeros).view(dtype).view(shape)
