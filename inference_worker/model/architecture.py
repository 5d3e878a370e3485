"""What kind of model a checkpoint is, and whether paged attention can serve it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from inference_worker.model.awq_checkpoint import awq_format
from inference_worker.model.errors import UnsupportedModel
from inference_worker.model.kv_cache import LayerShape

_PROBE = "sluice_probe"
# A position farther out than any window, at which a layer's mask is looked at.
_FAR = 1 << 18
# Rotary embeddings whose frequencies change for the whole batch once any sequence is longer than the original length.
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}
_SERVED_LAYER_TYPES = {"full_attention", "sliding_attention"}


def check_config(config: PretrainedConfig) -> None:
    """Refuse what can be told from the configuration alone.

    Raises: UnsupportedModel.
    """
    text = config.get_text_config(decoder=True)
    kind = config.model_type
    if config.is_encoder_decoder:
        raise UnsupportedModel(f"{kind} is an encoder-decoder; only decoder-only models are served")
    if getattr(text, "is_causal", True) is False or getattr(
        text, "use_bidirectional_attention", False
    ):
        raise UnsupportedModel(f"{kind}: its attention is not causal")
    awq_format(config)
    layer_types = getattr(text, "layer_types", None) or ()
    if other := sorted(set(layer_types) - _SERVED_LAYER_TYPES):
        raise UnsupportedModel(f"{kind}: layers of type {', '.join(other)} are not supported")
    if getattr(text, "attention_chunk_size", None):
        raise UnsupportedModel(f"{kind}: chunked attention is not supported")


def max_context_length(config: PretrainedConfig) -> int | None:
    """Most tokens that the model was made for; None if its configuration does not say."""
    text = config.get_text_config(decoder=True)
    longest: int | None = getattr(text, "max_position_embeddings", None)
    rope: dict[str, Any] = getattr(text, "rope_parameters", None) or {}
    # models with several kinds of layers have a set of parameters for each kind
    for parameters in (rope, *(x for x in rope.values() if isinstance(x, dict))):
        if parameters.get("rope_type") in _LENGTH_DEPENDENT_ROPE:
            # longer sequences would change the frequencies of the others in their batch
            original = parameters.get("original_max_position_embeddings") or getattr(
                text, "original_max_position_embeddings", None
            )
            if original:
                longest = min(longest or original, original)
    return longest


def probe_layers(model: PreTrainedModel) -> dict[int, LayerShape]:
    """Run two tokens and note what each layer keeps and how far it sees, by its index.

    The window is read off the very mask that the model asks for, so it holds for models that tell
    their attention nothing of it. Leaves the model's attention set to the probe.

    Raises: UnsupportedModel.
    """
    kind = model.config.model_type
    if getattr(model, "_is_stateful", False):
        raise UnsupportedModel(f"{kind} keeps a recurrent state; only attention is served")
    layers: dict[int, LayerShape] = {}
    try:
        model.set_attn_implementation(_PROBE)
        tokens = torch.tensor([[0, 1]], device=model.device)
        positions = torch.tensor([[0, 1]], device=model.device)
        with torch.inference_mode():
            model(input_ids=tokens, position_ids=positions, use_cache=False, layers_seen=layers)
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{kind}: {error}") from error
    except Exception as error:  # a model's own code may fail in any way on what it is not made for
        raise UnsupportedModel(
            f"{kind}: its attention cannot be replaced ({_first_line(error)})"
        ) from error
    expected = model.config.get_text_config(decoder=True).num_hidden_layers
    if len(layers) != expected:
        raise UnsupportedModel(
            f"{kind}: {len(layers)} of {expected} layers attend through the replaceable interface"
        )
    return layers


def _probe_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    layers_seen: dict[int, LayerShape],
    position_bias: torch.Tensor | None = None,
    **_unused: object,
) -> tuple[torch.Tensor, None]:
    if attention_mask is None or position_bias is not None:
        raise UnsupportedModel("it makes its own attention mask or position bias")
    index = getattr(module, "layer_idx", None)
    if index is None or index in layers_seen:
        raise UnsupportedModel("its attention layers have no index of their own")
    window = int(attention_mask.flatten()[0])
    layers_seen[index] = LayerShape(key.shape[1], key.shape[-1], value.shape[-1], window or None)
    return value.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1]), None


def _probe_mask(
    *,
    mask_function: Callable[..., torch.Tensor],
    q_length: int,
    kv_length: int,
    device: torch.device,
    **_unused: object,
) -> torch.Tensor:
    """In place of a mask, its window: [1, 1, queries, keys] filled with the visible tokens, 0 for all."""
    windows = {_window_at(mask_function, position) for position in (_FAR, _FAR + 1)}
    if len(windows) > 1:
        raise UnsupportedModel("its attention sees neither all earlier tokens nor a sliding window")
    return torch.full((1, 1, q_length, kv_length), float(windows.pop()), device=device)


def _window_at(mask_function: Callable[..., torch.Tensor], position: int) -> int:
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.long)
    keys = torch.arange(position + 2)[None, None, None]
    visible = mask_function(zero, zero, zero + position, keys).expand(1, 1, 1, -1).flatten()
    seen = visible.nonzero().flatten()
    first, last, count = int(seen[0]), int(seen[-1]), len(seen)
    if last != position or count != last - first + 1:
        raise UnsupportedModel("its attention sees neither all earlier tokens nor a sliding window")
    return 0 if first == 0 else count


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


AttentionInterface.register(_PROBE, _probe_attention)
AttentionMaskInterface.register(_PROBE, _probe_mask)
