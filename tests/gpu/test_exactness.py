"""What the GPU computes is what the model's own code computes: kernels, graphs and steps in flight included."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from transformers import PreTrainedModel

from inference_worker.model.runner import ModelRunner
from tests.worker.model.driver import Driver, generate, new_runner, new_sequence, prompt_of
from tests.worker.model.test_decoder import FUSED
from tests.worker.model.tiny_models import FAMILIES, build_from

NUM_TOKENS = 12
LENGTHS = (1, 5, 17, 34)
MODELS = {**FAMILIES, **FUSED}
# A token is right if its logit is within this share of the logits' spread of the best one: half precision
# rounds at every layer, and in another order on each path.
TIES = {torch.bfloat16: 0.15, torch.float16: 0.05}


def on_gpu(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model: Any = build_from(MODELS[name]())
    return cast(PreTrainedModel, model.to("cuda", dtype))


@pytest.mark.parametrize("name", MODELS)
def test_float32_tokens_are_those_of_generate(name: str) -> None:
    model = on_gpu(name)
    expected = [generate(model, prompt_of(length), NUM_TOKENS) for length in LENGTHS]
    runner = new_runner(model)
    assert runner.cache.uses_kernels
    sequences = [new_sequence(prompt_of(length)) for length in LENGTHS]
    Driver(runner, max_chunk=7).run(sequences, NUM_TOKENS)
    assert [s.token_ids for s in sequences] == expected


# blocks that prefill gathers, and blocks that `varlen_attn` takes a table of
@pytest.mark.parametrize("block_size", [4, 256])
@pytest.mark.parametrize("dtype", TIES, ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen3, query norms", "mistral, window"])
def test_half_precision_tokens_are_the_likeliest_or_nearly(
    name: str, dtype: torch.dtype, block_size: int
) -> None:
    model = on_gpu(name, dtype)
    runner = new_runner(model, block_size)
    sequences = [new_sequence(prompt_of(length)) for length in LENGTHS]
    Driver(runner, max_chunk=7).run(sequences, NUM_TOKENS)
    exact = on_gpu(name)
    exact.set_attn_implementation("eager")
    for sequence, length in zip(sequences, LENGTHS, strict=True):
        assert len(sequence.token_ids) == length + NUM_TOKENS
        with torch.inference_mode():
            logits = exact(
                torch.tensor([sequence.token_ids], device="cuda"), use_cache=False
            ).logits[0]
        drawn = torch.tensor(sequence.token_ids[length:], device="cuda")
        rows = logits[length - 1 : -1]
        behind = rows.amax(1) - rows.gather(1, drawn[:, None])[:, 0]
        assert bool((behind <= TIES[dtype] * rows.std(1)).all()), behind / rows.std(1)


def test_the_fused_layers_are_computed_by_kernels_and_captured() -> None:
    runner = new_runner(on_gpu("llama"))
    assert type(runner._forward).__name__ == "KernelDecoder"
    assert runner._graphs is not None
    assert runner.runs_ahead


@pytest.mark.parametrize("name", ["llama", "mistral, window", "qwen3, query norms"])
def test_graphs_give_what_the_same_kernels_give_one_by_one(name: str) -> None:
    captured = new_runner(on_gpu(name))
    assert captured._forward is not None
    assert captured._graphs is not None
    plain = ModelRunner(captured._forward, captured.cache)
    tokens = []
    for runner in (plain, captured):
        driver = Driver(runner, max_chunk=16)
        sequences = [new_sequence(prompt_of(3 + 5 * i)) for i in range(8)]
        for count in range(1, 9):  # every number of rows, so every size and padding
            driver.run(sequences[:count], 2 * count)
        driver.run(sequences, 20)
        tokens.append([s.token_ids for s in sequences])
    assert tokens[0] == tokens[1]
