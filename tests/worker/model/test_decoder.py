"""The fused decoder: which models get it, and that nothing but speed changes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from inference_worker.model.batch import Span
from inference_worker.model.decoder import FusedDecoder, fuse
from inference_worker.model.forward import TransformersForward
from tests.worker.model.driver import Driver, generate, new_runner, new_sequence, prompt_of
from tests.worker.model.tiny_models import FAMILIES, build, build_from, config

NUM_TOKENS = 12
LENGTHS = (1, 5, 17, 34)

FUSED: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: config("Llama"),
    "llama, biases": lambda: config("Llama", attention_bias=True, mlp_bias=True),
    "llama, tied embeddings": lambda: config("Llama", tie_word_embeddings=True),
    "llama, one key head": lambda: config("Llama", num_key_value_heads=1),
    "llama, a key head for each": lambda: config("Llama", num_key_value_heads=4),
    "llama, wide heads": lambda: config("Llama", head_dim=48),
    "llama, another activation": lambda: config("Llama", hidden_act="gelu_pytorch_tanh"),
    "llama, scaled as llama 3": lambda: config(
        "Llama",
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 24,
        },
    ),
    "llama, scaled linearly": lambda: config(
        "Llama", rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    ),
    "qwen2, yarn": lambda: config(
        "Qwen2",
        rope_parameters={
            "rope_type": "yarn",
            "factor": 4.0,
            "rope_theta": 1e4,
            "original_max_position_embeddings": 24,
        },
    ),
    "mistral": lambda: config("Mistral", sliding_window=None),
    "mistral, window": FAMILIES["mistral, window"],
    "qwen2, window in one layer, biases": FAMILIES["qwen2, window in one layer, biases"],
    "qwen3, query norms": FAMILIES["qwen3, query norms"],
    "qwen3, window in one layer": lambda: config(
        "Qwen3", use_sliding_window=True, sliding_window=9, max_window_layers=1
    ),
}


def randomise_vectors(model: PreTrainedModel) -> PreTrainedModel:
    """Biases and norms that show when they are mistaken for each other."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) / 4)
    return model


def is_fused(model: PreTrainedModel) -> bool:
    return isinstance(new_runner(model)._forward, FusedDecoder)


@pytest.mark.parametrize("family", FUSED)
def test_greedy_equals_generate(family: str) -> None:
    model = randomise_vectors(build_from(FUSED[family]()))
    expected = [generate(model, prompt_of(length), NUM_TOKENS) for length in LENGTHS]
    assert len({tuple(ids[-NUM_TOKENS:]) for ids in expected}) == len(LENGTHS)
    runner = new_runner(model)
    assert isinstance(runner._forward, FusedDecoder)
    sequences = [new_sequence(prompt_of(length)) for length in LENGTHS]
    Driver(runner, max_chunk=7).run(sequences, NUM_TOKENS)
    assert [s.token_ids for s in sequences] == expected


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(FUSED)))
def test_other_models_keep_their_own_code(family: str) -> None:
    assert isinstance(new_runner(build(family))._forward, TransformersForward)


def test_weights_are_kept_once() -> None:
    model = randomise_vectors(build("qwen2, window in one layer, biases"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    bytes_before = _storage_bytes(model)
    assert fuse(model) is not None
    assert _storage_bytes(model) == bytes_before
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def _storage_bytes(model: PreTrainedModel) -> int:
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in model.parameters()}
    return sum(storage.nbytes() for storage in storages.values())


def test_the_model_itself_still_works() -> None:
    model = build("llama")
    expected = generate(model, prompt_of(17), NUM_TOKENS)
    assert is_fused(model)
    assert generate(model, prompt_of(17), NUM_TOKENS) == expected


class _Doubling(nn.Linear):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden) * 2


def _hook(model: Any) -> None:
    model.model.layers[1].mlp.register_forward_hook(lambda _module, _input, output: output * 2)


def _replaced_forward(model: Any) -> None:
    norm = model.model.layers[1].input_layernorm
    norm.forward = lambda hidden: type(norm).forward(norm, hidden) * 2


def _replaced_linear(model: Any) -> None:
    attention = model.model.layers[0].self_attn
    replaced = _Doubling(attention.q_proj.in_features, attention.q_proj.out_features, bias=False)
    replaced.weight = attention.q_proj.weight
    attention.q_proj = replaced


@pytest.mark.parametrize("alter", [_hook, _replaced_forward, _replaced_linear])
def test_an_altered_model_keeps_its_own_code(alter: Callable[[Any], None]) -> None:
    model = build("llama")
    plain = generate(model, prompt_of(17), NUM_TOKENS)
    alter(model)
    expected = generate(model, prompt_of(17), NUM_TOKENS)
    assert expected != plain
    assert fuse(model) is None
    runner = new_runner(model)
    sequence = new_sequence(prompt_of(17))
    Driver(runner).run([sequence], NUM_TOKENS)
    assert sequence.token_ids == expected


@pytest.mark.parametrize("fails", [False, True])
def test_a_fused_decoder_that_is_wrong_is_not_used(
    fails: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        if fails:
            raise RuntimeError("no such kernel")
        return x * cos

    monkeypatch.setattr("inference_worker.model.decoder.rotate", wrong)
    model = build("llama")
    expected = generate(model, prompt_of(17), NUM_TOKENS)
    with caplog.at_level(logging.WARNING):
        runner = new_runner(model)
    assert "FusedDecoder is not used: " in caplog.text
    sequence = new_sequence(prompt_of(17))
    Driver(runner).run([sequence], NUM_TOKENS)
    assert sequence.token_ids == expected


@pytest.mark.parametrize("family", ["llama", "mistral, window", "qwen3, query norms"])
def test_half_precision_is_as_near_to_full_as_the_models_own(family: str) -> None:
    """Both round; the fused one must not round worse."""
    model = randomise_vectors(build_from(FUSED[family]()))
    prompts = [prompt_of(length) for length in (17, 34)]
    with torch.inference_mode():
        exact = [model(torch.tensor([ids]), use_cache=False).logits[0] for ids in prompts]
        model.bfloat16()
        own = [model(torch.tensor([ids]), use_cache=False).logits[0] for ids in prompts]
    runner = new_runner(model)
    assert isinstance(runner._forward, FusedDecoder)
    for ids, reference, rounded in zip(prompts, exact, own, strict=True):
        driver = Driver(runner)
        sequence = new_sequence(ids)
        driver.reserve(sequence, len(ids))
        span = Span(ids, 0, len(ids), sequence.block_table)
        logits = runner.logits([span], range(len(ids)))
        assert _error(logits, reference) < 1.5 * _error(rounded, reference)


def _error(logits: torch.Tensor, reference: torch.Tensor) -> float:
    return float((logits.float() - reference).norm() / reference.norm())
