"""4-bit weights on a GPU, against the same weights unpacked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from inference_worker.model.awq import AwqLinear
from inference_worker.model.awq_layout import AwqWeights
from tests.worker.model.awq_checkpoints import random_weights
from tests.worker.model.driver import Driver, new_runner, new_sequence, prompt_of
from tests.worker.model.kernels.nearness import cosine

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
