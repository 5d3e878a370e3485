"""4-bit weights on a GPU, against the same weights unpacked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from inference_worker.model.awq import AwqLinear
from inference_worker.model.awq_layout import LAYOUTS, AwqWeights
from inference_worker.model.loader import load_model
from tests.worker.model.awq_checkpoints import Quantization, random_weights
from tests.worker.model.driver import (
    Driver,
    Settings,
    generate,
    new_runner,
    new_sequence,
    prompt_of,
)
from tests.worker.model.kernels.nearness import cosine
from tests.worker.model.test_awq import save_model

CONFIG = LlamaConfig(
    vocab_size=199,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=192,
    bos_token_id=None,
    eos_token_id=None,
)


def on_gpu(weights: AwqWeights) -> AwqWeights:
    return AwqWeights(*(x.to("cuda") for x in (weights.codes, weights.zeros, weights.scales)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 16, 17, 64])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_products(rows: int, group: int, dtype: torch.dtype) -> None:
    weights = random_weights(1024, 4096, group)
    layer = AwqLinear.pack(on_gpu(weights), None, dtype)
    x = torch.randn(rows, 4096, dtype=dtype, device="cuda")
    found = layer(x)
    assert (found.shape, found.dtype) == ((rows, 1024), dtype)
    expected = x.double() @ weights.dequantize(torch.float64).t().to("cuda")
    assert cosine(found, expected) >= 0.9999


@pytest.mark.parametrize(("num_out", "num_in"), [(28_672, 4096), (4096, 14_336)])
def test_products_of_large_layers(num_out: int, num_in: int) -> None:
    """As a Llama of 8 billion weights has them, cut into few splits and into many."""
    weights = on_gpu(random_weights(num_out, num_in, 128))
    layer = AwqLinear.pack(weights, None, torch.bfloat16)
    exact = weights.dequantize(torch.float32).t()
    for rows in (1, 8, 16, 17):
        x = torch.randn(rows, num_in, dtype=torch.bfloat16, device="cuda")
        assert cosine(layer(x), x.float() @ exact) >= 0.9999


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_is_served_as_its_dequantised_model(tmp_path: Path, layout: str) -> None:
    reference = save_model(tmp_path, Quantization(layout, 64), attention_bias=True)
    served = load_model(
        Settings(model=str(tmp_path), dtype="float32", device="cuda", kv_cache_mib=64)
    )
    runner: Any = served.runner
    assert type(runner._forward).__name__ == "KernelDecoder"
    assert runner._graphs is not None
    sequence = new_sequence(prompt_of(9))
    Driver(runner).run([sequence], 8)
    # the norms and embeddings are stored in half precision
    reference = reference.half().float().to("cuda")
    assert sequence.token_ids == generate(reference, prompt_of(9), 8)


def twins() -> tuple[Any, Any]:
    """A Llama with 4-bit weights, and one with the same weights unpacked."""
    torch.manual_seed(0)
    packed = LlamaForCausalLM(CONFIG).to("cuda", torch.bfloat16).eval()  # type: ignore[arg-type]
    unpacked = LlamaForCausalLM(CONFIG).to("cuda", torch.bfloat16).eval()  # type: ignore[arg-type]
    unpacked.load_state_dict(packed.state_dict())
    for seed, (name, module) in enumerate(list(packed.named_modules())):
        if isinstance(module, nn.Linear) and name != "lm_head":
            weights = on_gpu(random_weights(module.out_features, module.in_features, 128, seed))
            packed.set_submodule(name, AwqLinear.pack(weights, None, torch.bfloat16))
            unpacked.get_submodule(name).weight.data = weights.dequantize(torch.bfloat16)
    return packed, unpacked


def test_a_model_of_4_bit_weights_is_the_one_of_unpacked_weights() -> None:
    packed, unpacked = twins()
    runner = new_runner(packed)
    assert type(runner._forward).__name__ == "KernelDecoder"
    for num_rows in (1, 4, 20):  # as they are, and by way of unpacked weights
        sequences = [new_sequence(prompt_of(5 + i, seed=num_rows)) for i in range(num_rows)]
        Driver(runner).run(sequences, 8)
        for sequence in sequences:
            ids = torch.tensor([sequence.token_ids], device="cuda")
            with torch.inference_mode():
                rows = unpacked(ids, use_cache=False).logits[0].float()
            first = sequence.num_prompt_tokens
            drawn = ids[0, first:]
            behind = (
                rows[first - 1 : -1].amax(1) - rows[first - 1 : -1].gather(1, drawn[:, None])[:, 0]
            )
            assert bool((behind <= 0.15 * rows[first - 1 : -1].std(1)).all())
