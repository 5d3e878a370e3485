"""AWQ checkpoints made in code: rounded to nearest, and packed one code at a time as autoawq's packing code does."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from inference_worker.model.awq_layout import AwqWeights

GEMM_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
IN_ORDER = list(range(8))


@dataclass(frozen=True)
class Quantization:
    """How to quantize: `stores_zeros` is false for symmetric checkpoints that leave the zeros out."""

    layout: str = "gemm"
    group_size: int = 32
    zero_point: bool = True
    stores_zeros: bool = True
    kept: tuple[str, ...] = ()  # parts of names, as in modules_to_not_convert


def round_to_nearest(weight: torch.Tensor, group_size: int, zero_point: bool) -> AwqWeights:
    """Codes, zeros and scales of weights [out, in]."""
    groups = weight.detach().float().view(len(weight), -1, group_size)
    if zero_point:
        low, high = groups.amin(-1), groups.amax(-1)
        scales = ((high - low) / 15).half()
        zeros = (-low / scales.float()).round().clamp(0, 15)
    else:
        scales = (groups.abs().amax(-1) / 7).half()
        zeros = torch.full_like(scales, 8).float()
    codes = (groups / scales.float()[..., None] + zeros[..., None]).round().clamp(0, 15)
    return AwqWeights(codes.flatten(1).byte(), zeros.t().byte(), scales.t())


def random_weights(num_out: int, num_in: int, group_size: int, seed: int = 0) -> AwqWeights:
    """Weights of any codes, zeros and scales."""
    generator = torch.Generator().manual_seed(seed)
    groups = num_in // group_size
    codes = torch.randint(16, (num_out, num_in), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(16, (groups, num_out), generator=generator, dtype=torch.uint8)
    scales = torch.rand(groups, num_out, generator=generator) * 0.02 + 0.005
    return AwqWeights(codes, zeros, scales.half())


def pack_words(codes: torch.Tensor, order: list[int]) -> torch.Tensor:
    """Eight neighbouring columns in an int32, as autoawq packs them."""
    codes = codes.int()
    words = torch.zeros(len(codes), codes.shape[1] // 8, dtype=torch.int32)
    for column in range(words.shape[1]):
        for i in range(8):
            words[:, column] |= codes[:, column * 8 + order[i]] << (i * 4)
    return words


def pack_fast(codes: torch.Tensor) -> torch.Tensor:
    """Four outputs in an int16, as autoawq's gemv_fast packs them."""
    num_out, num_in = codes.shape
    tiles = codes.view(num_out, num_in // 32, 4, 4, 2).permute(0, 1, 3, 2, 4)
    tiles = tiles.reshape(num_out, num_in // 32, 4, 4, 2).transpose(3, 4)
    rows = tiles.reshape(num_out // 4, 4, num_in // 64, 64).transpose(1, 2)
    rows = rows.reshape(num_out // 4, num_in // 64, 64, 4).int()
    words = rows[..., 0] | (rows[..., 1] << 4) | (rows[..., 2] << 8) | (rows[..., 3] << 12)
    return words.reshape(num_out // 4, num_in).to(torch.int16)


def pack(weights: AwqWeights, layout: str) -> dict[str, torch.Tensor]:
    """The tensors that a checkpoint stores for a layer."""
    if layout == "gemm":
        return {
            "qweight": pack_words(weights.codes.t(), GEMM_ORDER),
            "qzeros": pack_words(weights.zeros, GEMM_ORDER),
            "scales": weights.scales.contiguous(),
        }
    groups = len(weights.scales)
    words = -(-groups // 8)
    multiple = {32: 4, 64: 2, 128: 1}[weights.group_size]
    padding = -(-words // multiple) * multiple * 8 - groups
    scales = nn.functional.pad(weights.scales.t(), (0, padding))
    zeros = nn.functional.pad(weights.zeros.t(), (0, padding))
    if layout == "gemv":
        packed = {"qweight": pack_words(weights.codes, IN_ORDER), "scales": scales}
        return {**packed, "qzeros": pack_words(zeros, IN_ORDER)}
    return {
        "qweight": pack_fast(weights.codes),
        "qzeros": -(scales * zeros.float()).half().t().contiguous(),
        "scales": scales.t().contiguous(),
    }


def save_quantized(
    model: PreTrainedModel, directory: Path, quantization: Quantization
) -> dict[str, AwqWeights]:
    """Write a model's AWQ form and turn the model itself into the dequantised reference; what was quantized."""
    tensors = {name: tensor.half() for name, tensor in model.state_dict().items()}
    quantized: dict[str, AwqWeights] = {}
    for name, module in model.named_modules():
        is_kept = name == "lm_head" or any(part in name for part in quantization.kept)
        if not isinstance(module, nn.Linear) or is_kept:
            continue
        weights = round_to_nearest(module.weight, quantization.group_size, quantization.zero_point)
        module.weight.data = weights.dequantize(module.weight.dtype)
        del tensors[f"{name}.weight"]
        for kind, tensor in pack(weights, quantization.layout).items():
            if kind != "qzeros" or quantization.stores_zeros:
                tensors[f"{name}.{kind}"] = tensor
        quantized[name] = weights
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    _write(model, directory, tensors, quantization)
    return quantized


def _write(
    model: PreTrainedModel,
    directory: Path,
    tensors: dict[str, torch.Tensor],
    quantization: Quantization,
) -> None:
    model.config.save_pretrained(directory)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        directory / "model.safetensors",
        {"format": "pt"},
    )
    kept: Collection[str] | None = list(quantization.kept) or None
    edit_config(
        directory,
        dtype="float16",
        quantization_config={
            "quant_method": "awq",
            "bits": 4,
            "group_size": quantization.group_size,
            "version": quantization.layout,
            "zero_point": quantization.zero_point,
            "modules_to_not_convert": kept,
        },
    )


def edit_config(directory: Path, **fields: object) -> None:
    """Overwrite fields of a checkpoint's config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
