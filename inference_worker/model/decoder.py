"""A decoder of the Llama kind with few, large operations: the forward pass of Llama, Mistral, Qwen2 and Qwen3."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from inference_worker.model.attention import attend
from inference_worker.model.batch import Batch
from inference_worker.model.projection import Projection, fuse_projections

# Each has pre-norm layers of rotary attention and a gated MLP, and differs in biases, query norms and windows only.
_FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


class FusedDecoder:
    """The layers of a loaded model with their projections fused: a `Forward`.

    It computes on the model's own weights, and so does the model still.
    """

    def __init__(self, embedding: nn.Embedding, rotary: nn.Module, layers: list[Layer], head: Head):
        self._embedding = embedding
        self._rotary = rotary
        self._layers = layers
        self._head = head

    def __call__(self, batch: Batch, wanted: torch.Tensor) -> torch.Tensor:
        """See Forward."""
        hidden = self._embedding(batch.input_ids)
        # the model's own frequencies, whatever they are scaled by
        cos, sin = self._rotary(hidden, batch.positions[None])
        cos, sin = cos[0, :, None], sin[0, :, None]
        for layer in self._layers:
            hidden = layer(hidden, cos, sin, batch)
        return self._head(hidden[wanted])


class Layer:
    """One layer: normalised attention and normalised MLP, each added to its input."""

    def __init__(self, source: Any, qkv: Projection, gate_up: Projection) -> None:
        """`source` is the model's layer, `qkv` and `gate_up` are its fused projections."""
        attention, mlp = source.self_attn, source.mlp
        self._index: int = attention.layer_idx
        self._scaling: float = attention.scaling
        self._head_dim: int = attention.head_dim
        num_heads, num_kv_heads = (
            linear.out_features // attention.head_dim
            for linear in (attention.q_proj, attention.k_proj)
        )
        self._heads = [num_heads, num_kv_heads, num_kv_heads]
        self._qkv = qkv
        self._output: Projection = attention.o_proj
        self._gate_up = gate_up
        self._down: Projection = mlp.down_proj
        self._activation: Callable[[torch.Tensor], torch.Tensor] = mlp.act_fn
        self._input_norm = Norm(source.input_layernorm)
        self._mlp_norm = Norm(source.post_attention_layernorm)
        has_norms = hasattr(attention, "q_norm")
        self._query_norm = Norm(attention.q_norm) if has_norms else None
        self._key_norm = Norm(attention.k_norm) if has_norms else None

    def __call__(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, batch: Batch
    ) -> torch.Tensor:
        """Hidden states [tokens, size] after this layer; `cos` and `sin` are [tokens, 1, head dim]."""
        qkv = self._qkv(self._input_norm(hidden))
        heads = qkv.view(len(hidden), -1, self._head_dim)
        query, key, value = torch.split(heads, self._heads, 1)
        if self._query_norm is not None and self._key_norm is not None:
            query, key = self._query_norm(query), self._key_norm(key)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        attended = attend(batch, self._index, query, key, value, self._scaling)
        hidden = hidden + self._output(attended.flatten(1))
        gate, up = self._gate_up(self._mlp_norm(hidden)).chunk(2, -1)
        return hidden + self._down(self._activation(gate) * up)


class Norm:
    """Root mean square normalisation (arXiv 1910.07467)."""

    def __init__(self, source: Any) -> None:
        self._weight: torch.Tensor = source.weight
        self._epsilon: float = source.variance_epsilon
        self._shape = tuple(source.weight.shape)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension."""
        return functional.rms_norm(x, self._shape, self._weight, self._epsilon)


class Head:
    """The last norm and the logits."""

    def __init__(self, norm: Norm, projection: Projection) -> None:
        self._norm = norm
        self._projection = projection

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [tokens, vocabulary]."""
        return self._projection(self._norm(hidden))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (arXiv 2104.09864) of heads [tokens, heads, dim], halves rotated together."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def fuse(model: PreTrainedModel) -> FusedDecoder | None:
    """The fused decoder of a model, or None if anything in it is not known for certain."""
    family = _FAMILIES.get(type(model).__name__)
    if family is None or not all(_is_known(module, family) for module in model.modules()):
        return None
    source: Any = model
    layers: list[Layer] = []
    for layer in source.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        qkv = fuse_projections([attention.q_proj, attention.k_proj, attention.v_proj])
        gate_up = fuse_projections([mlp.gate_proj, mlp.up_proj])
        if qkv is None or gate_up is None:
            return None
        layers.append(Layer(layer, qkv, gate_up))
    head = Head(Norm(source.model.norm), source.lm_head)
    return FusedDecoder(source.model.embed_tokens, source.model.rotary_emb, layers, head)


def _is_known(module: nn.Module, family: str) -> bool:
    """Whether a module does what its class says: one of the family's own or of ours, without hooks."""
    is_altered = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    known = (
        f"transformers.models.{family}.",
        "transformers.activations",
        "torch.nn.",
        "inference_worker.",
    )
    return not is_altered and type(module).__module__.startswith(known)
