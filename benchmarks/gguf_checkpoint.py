"""A Llama checkpoint written as GGUF, llama.cpp's format, with the package `gguf`.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Names of tensors, and the order of the rows of the
query and key projections, as llama.cpp's convert_hf_to_gguf.py has them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from safetensors.torch import load_file
from transformers import AutoConfig

Floats = npt.NDArray[np.float32]

_WHOLE: Final = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_OF_LAYER: Final = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(
    gguf: Any, folder: Path, path: Path, dtype: str, *, has_tokenizer: bool = False
) -> Any:
    """Write the checkpoint in `folder` to `path`, matrices as float32 or bfloat16, and return its configuration.

    `gguf` is the package. `has_tokenizer`: with the tokenizer and the chat template, which a server needs.

    Raises: ValueError for a model that is no plain Llama, or a tokenizer that is no byte-level BPE.
    """
    config = AutoConfig.from_pretrained(folder)
    rope = config.rope_parameters
    if config.model_type != "llama" or config.attention_bias or rope["rope_type"] != "default":
        raise ValueError("only plain Llamas are written as GGUF")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if has_tokenizer:
        _add_tokenizer(gguf, writer, folder, config)
    else:
        writer.add_tokenizer_model("no_vocab")
    stored = getattr(gguf.GGMLQuantizationType, {"float32": "F32", "bfloat16": "BF16"}[dtype])
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            _add(gguf, writer, config, name, tensor.float().numpy(), stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return config


def _add(gguf: Any, writer: Any, config: Any, name: str, values: Floats, stored: Any) -> None:
    if name == "lm_head.weight" and config.tie_word_embeddings:
        return  # llama.cpp takes the embedding where there is no output
    if name.endswith("q_proj.weight"):
        values = _interleaved(values, config.num_attention_heads)
    elif name.endswith("k_proj.weight"):
        values = _interleaved(values, config.num_key_value_heads)
    if values.ndim == 1:  # llama.cpp adds and multiplies by vectors in float32 alone
        stored = gguf.GGMLQuantizationType.F32
    writer.add_tensor(_name(name), gguf.quantize(values, stored), raw_dtype=stored)


def _add_tokenizer(gguf: Any, writer: Any, folder: Path, config: Any) -> None:
    """Byte-level BPE that cuts a text into words as GPT-2 does."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    model, words = tokenizer["model"], tokenizer["pre_tokenizer"]
    if model["type"] != "BPE" or words["type"] != "ByteLevel":
        raise ValueError("only byte-level BPE is written as GGUF")
    special = {token["id"] for token in tokenizer["added_tokens"]}
    added = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    ids: dict[str, int] = model["vocab"] | added
    kinds = gguf.TokenType
    tokens = sorted(ids, key=ids.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [kinds.CONTROL if ids[token] in special else kinds.NORMAL for token in tokens]
    )
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_add_bos_token(False)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_chat_template((folder / "chat_template.jinja").read_text())


def _name(name: str) -> str:
    """GGUF's name of a tensor of the checkpoint."""
    module = name.removesuffix(".weight")
    if module in _WHOLE:
        return f"{_WHOLE[module]}.weight"
    number, inside = module.removeprefix("model.layers.").split(".", 1)
    return f"blk.{number}.{_OF_LAYER[inside]}.weight"


def _interleaved(weight: Floats, heads: int) -> Floats:
    """Rows of each head so that RoPE turns neighbours, where the checkpoint's turns a row of the first half with one of
    the second."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, columns)
