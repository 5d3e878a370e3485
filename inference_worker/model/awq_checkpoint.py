"""Loads AWQ checkpoints with nothing but torch and transformers, whose own way needs another package."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from inference_worker.model.awq import AwqLinear
from inference_worker.model.awq_layout import GROUP_SIZES, LAYOUTS, stored_shapes, unpack
from inference_worker.model.errors import UnsupportedModel


@dataclass(frozen=True, slots=True)
class AwqFormat:
    """What a checkpoint's configuration says of its weights."""

    layout: str
    group_size: int
    zero_point: bool


def awq_format(config: PretrainedConfig) -> AwqFormat | None:
    """How a checkpoint is quantized with AWQ; None if it is not quantized.

    Raises: UnsupportedModel for any other quantization.
    """
    given = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(decoder=True), "quantization_config", None
    )
    if given is None:
        return None
    fields: dict[str, Any] = given if isinstance(given, dict) else given.to_dict()
    kind, method = config.model_type, fields.get("quant_method")
    if method != "awq":
        raise UnsupportedModel(
            f"{kind}: checkpoints quantized with {method} are not supported, only those with awq"
        )
    # autoawq calls it version, later writers format
    layout = str(fields.get("version") or fields.get("format") or "gemm").lower()
    bits, group_size = fields.get("bits", 4), fields.get("group_size", 128)
    for name, value, supported in (
        ("layout", layout, LAYOUTS),
        ("number of bits", bits, (4,)),
        ("group size", group_size, GROUP_SIZES),
    ):
        if value not in supported:
            known = ", ".join(map(str, supported))
            raise UnsupportedModel(f"{kind}: the AWQ {name} is {value}; supported: {known}")
    return AwqFormat(layout, group_size, fields.get("zero_point", True) is not False)


@contextmanager
def native_awq(awq: AwqFormat) -> Iterator[None]:
    """Within the block, transformers loads AWQ checkpoints into the tensors of `StoredAwq`; see `finish`."""

    class Quantizer(_StoringQuantizer):
        stored_format = awq

    mapping: dict[str, Any] = auto.AUTO_QUANTIZER_MAPPING
    before = mapping["awq"]
    mapping["awq"] = Quantizer
    try:
        yield
    finally:
        mapping["awq"] = before


def finish(
    model: PreTrainedModel, awq: AwqFormat, missing: Collection[str], dtype: torch.dtype
) -> list[str]:
    """Turn every `StoredAwq` of a loaded model into an `AwqLinear`, on the device where it is.

    Takes the names of tensors that the checkpoint lacks and gives those that it may not lack.

    Raises: LoadError.
    """
    understood = set()
    # by name: what has been packed must be gone before the next is, or the weights would be there twice
    for name in [name for name, module in model.named_modules() if isinstance(module, StoredAwq)]:
        stored: dict[str, torch.Tensor | None] = dict(model.get_submodule(name).named_buffers())
        bias = stored.pop("bias", None)
        if not awq.zero_point and (zeros := f"{name}.qzeros") in missing:
            understood.add(zeros)
            stored["qzeros"] = None
        weights = unpack(awq.layout, stored, awq.group_size)
        model.set_submodule(name, AwqLinear.pack(weights, bias, dtype))
    return sorted(set(missing) - understood)


class StoredAwq(nn.Module):
    """A layer's tensors as the checkpoint has them. It computes nothing."""

    def __init__(self, linear: nn.Linear, awq: AwqFormat) -> None:
        super().__init__()
        shapes = stored_shapes(awq.layout, linear.in_features, linear.out_features, awq.group_size)
        if linear.bias is not None:
            shapes["bias"] = ((linear.out_features,), torch.float16)
        for name, (shape, dtype) in shapes.items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))


class _StoringQuantizer(HfQuantizer):
    """Prepares a model for its tensors. What is quantized is told by the tensors that the files hold: so
    `modules_to_not_convert` holds, whose meaning differs between writers.
    """

    requires_calibration = True  # transformers' word for: the weights are quantized already
    stored_format: AwqFormat

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_unused: object
    ) -> None:
        for name in _quantized_layers(checkpoint_files or []):
            _check_layer(model, name, self.stored_format)
            linear: Any = model.get_submodule(name)
            model.set_submodule(name, StoredAwq(linear, self.stored_format))

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def _quantized_layers(files: list[str]) -> Iterator[str]:
    for file in files:
        if not file.endswith(".safetensors"):
            raise UnsupportedModel("AWQ checkpoints are read from safetensors files only")
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no mapping
                if name.endswith(".qweight"):
                    yield name.removesuffix(".qweight")


def _check_layer(model: PreTrainedModel, name: str, awq: AwqFormat) -> None:
    """Raises: UnsupportedModel if the model has no linear layer of that name, or not one of such a shape."""
    try:
        layer: nn.Module | None = model.get_submodule(name)
    except AttributeError:
        layer = None
    kind = model.config.model_type
    if type(layer) is not nn.Linear:
        raise UnsupportedModel(f"{kind}: {name} is quantized but is no linear layer of this model")
    # gemv_fast holds tiles of 64 inputs
    divisor = max(awq.group_size, 64) if awq.layout == "gemv_fast" else awq.group_size
    if layer.in_features % divisor or layer.out_features % 8:
        raise UnsupportedModel(
            f"{kind}: {name} has {layer.in_features} inputs and {layer.out_features} outputs; AWQ needs "
            f"multiples of {divisor} and 8"
        )
