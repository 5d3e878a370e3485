"""An AWQ checkpoint made from a dense one by rounding to the nearest code, and its dense twin of the same values.

What a step costs depends on the format, not on how well the codes were chosen, so no calibration is needed here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from inference_worker.model.awq_layout import GROUP_SIZES, AwqWeights, pack_gemm


def write_awq(source: Path, folder: Path, dense: Path) -> int:
    """Write the checkpoint and its twin; the output head stays as it is. Returns the group size."""
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype="float32")
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name
    }
    group_size = max(
        size for size in GROUP_SIZES if all(m.in_features % size == 0 for m in linear.values())
    )
    packed: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for name, module in linear.items():
            weights = _round(module.weight, group_size)
            module.weight.copy_(weights.dequantize(torch.float32))
            packed |= {f"{name}.{part}": tensor for part, tensor in pack_gemm(weights).items()}
    model.save_pretrained(dense)
    replaced = {f"{name}.weight" for name in linear}
    kept = {name: tensor for name, tensor in model.state_dict().items() if name not in replaced}
    if model.config.tie_word_embeddings:
        kept.pop("lm_head.weight")
    folder.mkdir(exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in (kept | packed).items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = json.loads((dense / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "modules_to_not_convert": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.save_pretrained(folder)
    tokenizer.save_pretrained(dense)
    return group_size


def _round(weight: torch.Tensor, group_size: int) -> AwqWeights:
    """Codes of a weight [out, in] whose groups span from their least to their greatest value, zero included."""
    groups = weight.view(len(weight), -1, group_size)
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    scales = ((high - low) / 15).clamp(min=1e-5).half().float()
    zeros = (-low / scales).round().clamp(0, 15)
    codes = (groups / scales[..., None] + zeros[..., None]).round().clamp(0, 15)
    return AwqWeights(
        codes.flatten(1).to(torch.uint8), zeros.t().to(torch.uint8), scales.t().half()
    )
