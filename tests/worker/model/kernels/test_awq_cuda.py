"""AWQ layers on their CUDA path: in AWQ's own layout, by the kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from inference_worker.model import loader, self_check
from inference_worker.model.awq import AwqLinear
from inference_worker.model.awq_cuda import CudaWeights
from inference_worker.model.awq_layout import LAYOUTS, AwqWeights, unpack
from inference_worker.model.kernel_decoder import KernelDecoder
from tests.worker.model.awq_checkpoints import pack, random_weights, round_to_nearest
from tests.worker.model.driver import Driver, generate, new_runner, new_sequence, prompt_of
from tests.worker.model.kernels.device import DEVICE
from tests.worker.model.kernels.nearness import cosine
from tests.worker.model.tiny_models import build_from, config

SIZES = (64, 32)


def layer_of(weights: AwqWeights) -> AwqLinear:
    """As `AwqLinear.pack` makes it of weights on a GPU."""
    num_out, num_in = weights.codes.shape
    return AwqLinear(CudaWeights.pack(weights), (num_in, num_out), None)


def on_device(weights: AwqWeights) -> AwqWeights:
    return AwqWeights(*(t.to(DEVICE) for t in (weights.codes, weights.zeros, weights.scales)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [1, 16, 17])  # the last unpacks the weights
def test_products_of_every_layout(layout: str, rows: int) -> None:
    weights = random_weights(64, 256, 64)
    layer = layer_of(on_device(unpack(layout, pack(weights, layout), 64)))
    x = torch.randn(1, rows, 256, dtype=torch.float16, device=DEVICE)
    found = layer(x)
    assert (found.shape, found.dtype) == ((1, rows, 64), torch.float16)
    assert cosine(found, x.double() @ weights.dequantize(torch.float64).t().to(DEVICE)) >= 0.9999


def test_fused_layers_give_the_same() -> None:
    layers = [
        layer_of(on_device(random_weights(size, 128, 32, seed))) for seed, size in enumerate(SIZES)
    ]
    x = torch.randn(3, 128, dtype=torch.float16, device=DEVICE)
    before = [layer(x) for layer in layers]
    fused = AwqLinear.fuse(layers)
    assert fused is not None
    torch.testing.assert_close(fused(x), torch.cat(before, -1), atol=1e-3, rtol=1e-3)
    for layer, expected in zip(layers, before, strict=True):
        torch.testing.assert_close(layer(x), expected)


def test_a_model_of_4_bit_weights_is_the_one_of_unpacked_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fused and computed by kernels, of few rows and of many."""
    monkeypatch.setattr(loader, "_can_use_kernels", lambda *_: True)
    monkeypatch.setattr(self_check, "_LENGTH", 6)  # the interpreter takes its time
    packed, unpacked = (
        build_from(config("Llama", num_hidden_layers=1, attention_bias=True)).to(DEVICE)  # type: ignore[arg-type]
        for _ in range(2)
    )
    layers: list[tuple[str, Any]] = list(unpacked.named_modules())
    for name, module in layers:
        if isinstance(module, nn.Linear) and name != "lm_head":
            weights = round_to_nearest(module.weight, 32, zero_point=True)
            module.weight.data = weights.dequantize(torch.float32)
            sizes = (module.in_features, module.out_features)
            packed.set_submodule(name, AwqLinear(CudaWeights.pack(weights), sizes, module.bias))
    runner = new_runner(packed)
    assert isinstance(runner._forward, KernelDecoder)
    for length in (3, 20):
        sequence = new_sequence(prompt_of(length))
        Driver(runner).run([sequence], 3)
        assert sequence.token_ids == generate(unpacked, prompt_of(length), 3)
