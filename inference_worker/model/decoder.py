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
        self.embedding = embedding
        self.rotary = rotary
        self.layers = layers
        self.head = head

    def __call__(self, batch: Batch, wanted: torch.Tensor) -> torch.Tensor:
        """See Forward."""
        hidden = self.embedding(batch.input_ids)
        # the model's own frequencies, whatever they are scaled by
        cos, sin = self.rotary(hidden, batch.positions[None])
        cos, sin = cos[0, :, None], sin[0, :, None]
        for layer in self.layers:
            hidden = layer(hidden, cos, sin, batch)
        return self.head(hidden[wanted])

    def rotation(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of positions 0 .. count - 1, rounded as the model does, in float32: [count, head dim]."""
        weight = self.embedding.weight
        positions = torch.arange(count, device=weight.device)[None]
        with torch.inference_mode():
            cos, sin = self.rotary(weight, positions)
        return cos[0].float().contiguous(), sin[0].float().contiguous()


class Layer:
    """One layer: normalised attention and normalised MLP, each added to its input."""

    def __init__(self, source: Any, qkv: Projection, gate_up: Projection) -> None:
        """`source` is the model's layer, `qkv` and `gate_up` are its fused projections."""
        attention, mlp = source.self_attn, source.mlp
        self.index: int = attention.layer_idx
        self.scaling: float = attention.scaling
        self.head_dim: int = attention.head_dim
        num_heads, num_kv_heads = (
            linear.out_features // attention.head_dim
            for linear in (attention.q_proj, attention.k_proj)
        )
        self.heads = [num_heads, num_kv_heads, num_kv_heads]
        self.qkv = qkv
        self.output: Projection = attention.o_proj
        self.gate_up = gate_up
        self.down: Projection = mlp.down_proj
        self.activation: Callable[[torch.Tensor], torch.Tensor] = mlp.act_fn
        self.input_norm = Norm(source.input_layernorm)
        self.mlp_norm = Norm(source.post_attention_layernorm)
        has_norms = hasattr(attention, "q_norm")
        self.query_norm = Norm(attention.q_norm) if has_norms else None
        self.key_norm = Norm(attention.k_norm) if has_norms else None

    def __call__(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, batch: Batch
    ) -> torch.Tensor:
        """Hidden states [tokens, size] after this layer; `cos` and `sin` are [tokens, 1, head dim]."""
        qkv = self.qkv(self.input_norm(hidden))
        heads = qkv.view(len(hidden), -1, self.head_dim)
        query, key, value = torch.split(heads, self.heads, 1)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        attended = attend(batch, self.index, query, key, value, self.scaling)
        hidden = hidden + self.output(attended.flatten(1))
        gate, up = self.gate_up(self.mlp_norm(hidden)).chunk(2, -1)
        return hidden + self.down(self.activation(gate) * up)


class Norm:
    """Root mean square normalisation (arXiv 1910.07467)."""

    def __init__(self, source: Any) -> None:
        self.weight: torch.Tensor = source.weight
        self.epsilon: float = source.variance_epsilon
        self.shape = tuple(source.weight.shape)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension."""
        return functional.rms_norm(x, self.shape, self.weight, self.epsilon)


class Head:
    """The last norm and the logits."""

    def __init__(self, norm: Norm, projection: Projection) -> None:
        self.norm = norm
        self.projection = projection

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [tokens, vocabulary]."""
        return self.projection(self.norm(hidden))


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
