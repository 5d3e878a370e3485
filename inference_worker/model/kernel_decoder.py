"""The fused decoder's layers, computed by kernels: what a GPU runs."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from transformers.activations import SiLUActivation

from inference_worker.model.attention import attend_cached
from inference_worker.model.batch import Batch
from inference_worker.model.decoder import FusedDecoder, Layer, Norm
from inference_worker.model.kernels.rms_norm import add_rms_norm, rms_norm
from inference_worker.model.kernels.rope_kv import rope_and_write
from inference_worker.model.kernels.silu_mul import silu_mul


class KernelDecoder:
    """A `Forward` on the weights of a fused decoder, for batches whose cache `uses_kernels`.

    What a batch without prefill chunks launches depends on shapes alone, never on values: it can be captured in a CUDA
    graph. A padded token has slot -1 and, in its row, length 0.
    """

    def __init__(self, decoder: FusedDecoder, num_positions: int) -> None:
        """`num_positions`: positions are below it.

        Raises: ValueError for rotary embeddings of another kind than halves that are turned together.
        """
        self._embedding = decoder.embedding
        self._cos, self._sin = _angles(decoder, num_positions)
        self._layers = decoder.layers
        self._norm = decoder.head.norm
        self._projection = decoder.head.projection

    def __call__(self, batch: Batch, wanted: torch.Tensor) -> torch.Tensor:
        """See Forward."""
        total = self._embedding(batch.input_ids)
        first = self._layers[0].input_norm
        normal = rms_norm(total, first.weight, first.epsilon)
        for layer, after in zip(self._layers, self._layers[1:], strict=False):
            normal = _add(self._compute(layer, normal, total, batch), total, after.input_norm)
        last = self._compute(self._layers[-1], normal, total, batch)
        # only what is looked at goes on
        return self._projection(_add(last[wanted], total[wanted], self._norm))

    def _compute(
        self, layer: Layer, normal: torch.Tensor, total: torch.Tensor, batch: Batch
    ) -> torch.Tensor:
        """What the layer's MLP adds to `total` [tokens, size], to which its attention's part is added here."""
        query_norm, key_norm = layer.query_norm, layer.key_norm
        query = rope_and_write(
            layer.qkv(normal),
            batch.positions,
            batch.slots,
            self._cos,
            self._sin,
            batch.cache.keys[layer.index],
            batch.cache.values[layer.index],
            query_norm=None if query_norm is None else query_norm.weight,
            key_norm=None if key_norm is None else key_norm.weight,
            epsilon=0.0 if query_norm is None else query_norm.epsilon,
        )
        attended = attend_cached(batch, layer.index, query, layer.scaling)
        normal = _add(layer.output(attended.flatten(1)), total, layer.mlp_norm)
        gate_up = layer.gate_up(normal)
        if _is_silu(layer.activation):
            return layer.down(silu_mul(gate_up))
        gate, up = gate_up.chunk(2, -1)
        return layer.down(layer.activation(gate) * up)


def _add(x: torch.Tensor, total: torch.Tensor, norm: Norm) -> torch.Tensor:
    """Add x to `total`, in place, and normalise the sum."""
    return add_rms_norm(x, total, norm.weight, norm.epsilon)


def _is_silu(activation: object) -> bool:
    return isinstance(activation, nn.SiLU | SiLUActivation) or activation is functional.silu


def _angles(decoder: FusedDecoder, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [positions, head dim / 2] as the model computes them, with its own frequencies."""
    weight = decoder.embedding.weight
    positions = torch.arange(num_positions, device=weight.device)[None]
    with torch.inference_mode():
        halves = [table[0].chunk(2, -1) for table in decoder.rotary(weight, positions)]
    head_dim = decoder.layers[0].head_dim
    if any(x.shape[-1] != head_dim // 2 or not torch.equal(x, y) for x, y in halves):
        raise ValueError("its rotary embedding does not turn the halves of a head together")
    (cos, _), (sin, _) = halves
    return cos.contiguous(), sin.contiguous()
