"""Small random models of many architectures, in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

VOCABULARY = 199
CONTEXT = 192

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT,
    # nothing ends a generation early
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def config(kind: str, **fields: Any) -> PretrainedConfig:
    """A configuration of two small layers; `kind` is the class without its ending."""
    make: Callable[..., PretrainedConfig] = getattr(transformers, f"{kind}Config")
    return make(**{**_SIZES, **fields})


def gpt2_config() -> PretrainedConfig:
    return transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=CONTEXT,
        bos_token_id=None,
        eos_token_id=None,
    )


# Each stands for something that attention must honour.
FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: config("Llama"),
    "mistral, window": lambda: config("Mistral", sliding_window=12),
    "qwen2, window in one layer, biases": lambda: config(
        "Qwen2", use_sliding_window=True, sliding_window=9, max_window_layers=1
    ),
    "qwen2 moe, window told by the mask alone": lambda: config(
        "Qwen2Moe",
        use_sliding_window=True,
        sliding_window=9,
        max_window_layers=1,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    ),
    "qwen3, query norms": lambda: config("Qwen3"),
    "qwen3 moe, query norms and experts": lambda: config(
        "Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
    "gemma2, softcap and alternating window": lambda: config(
        "Gemma2", sliding_window=10, attn_logit_softcapping=0.5, query_pre_attn_scalar=1
    ),
    "gpt2, learned positions": gpt2_config,
    "phi3, fused projections": lambda: config("Phi3", sliding_window=11),
    "olmo2, norms after": lambda: config("Olmo2"),
    "granite, multipliers": lambda: config("Granite", attention_multiplier=0.3),
    "gpt-oss, sinks": lambda: config(
        "GptOss", sliding_window=8, num_local_experts=4, num_experts_per_tok=2
    ),
    "deepseek, values of another width": lambda: config(
        "DeepseekV3",
        num_key_value_heads=4,
        q_lora_rank=None,
        kv_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=24,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
    ),
}


def build(family: str, seed: int = 0) -> PreTrainedModel:
    """A random model whose weights are large enough for greedy choices to differ from token to token."""
    return build_from(FAMILIES[family](), seed)


def build_from(model_config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A random model of a configuration."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        model_config, attn_implementation="eager"
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name and "wte" not in name:
                parameter.mul_(4)
            if name.endswith("sinks"):
                parameter.normal_()
    model.train(False)
    return model
