"""Which models are served, and the check that they are served correctly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from inference_worker.model import attention
from inference_worker.model.architecture import check_config, max_context_length, probe_layers
from inference_worker.model.errors import LoadError, UnsupportedModel
from inference_worker.model.kv_cache import KVCache, LayerShape
from inference_worker.model.loader import make_runner
from tests.worker.model.driver import (
    Driver,
    Settings,
    generate,
    new_runner,
    new_sequence,
    prompt_of,
)
from tests.worker.model.tiny_models import CONTEXT, build, build_from, config


@pytest.mark.parametrize(
    ("family", "windows"),
    [
        ("llama", [None, None]),
        ("mistral, window", [12, 12]),
        ("qwen2, window in one layer, biases", [None, 9]),
        ("qwen2 moe, window told by the mask alone", [9, None]),
        ("gemma2, softcap and alternating window", [10, None]),
        ("gpt-oss, sinks", [8, None]),
    ],
)
def test_windows_are_read_off_the_mask(family: str, windows: list[int | None]) -> None:
    layers = probe_layers(build(family))
    assert [layers[i].window for i in range(2)] == windows


def test_shapes_of_keys_and_values() -> None:
    layers = probe_layers(build("deepseek, values of another width"))
    assert layers[0] == LayerShape(num_kv_heads=4, key_dim=32, value_dim=24, window=None)


@pytest.mark.parametrize(
    ("model_config", "reason"),
    [
        (transformers.T5Config(), "encoder-decoder"),
        (transformers.MambaConfig(num_hidden_layers=1), "linear_attention|state"),
        (config("Jamba", num_hidden_layers=2), "linear_attention|mamba"),
        (config("Qwen3Next"), "linear_attention"),
        (config("Llama4Text", attention_chunk_size=8), "chunked"),
        (config("Llama", is_causal=False), "causal"),
        (config("Llama", quantization_config={"quant_method": "gptq"}), "quantized with gptq"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_refused_by_configuration(model_config: PretrainedConfig, reason: str) -> None:
    with pytest.raises(UnsupportedModel, match=reason) as refusal:
        check_config(model_config)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "model_config",
    [
        transformers.BloomConfig(vocab_size=90, hidden_size=32, n_layer=1, n_head=2),
        transformers.FalconConfig(
            vocab_size=90, hidden_size=32, num_hidden_layers=1, num_attention_heads=2
        ),
        config("StableLm"),
        config("Bert", is_decoder=False),
    ],
    ids=lambda value: value.model_type,
)
def test_refused_when_its_attention_is_out_of_reach(model_config: PretrainedConfig) -> None:
    with pytest.raises(UnsupportedModel) as refusal:
        make_runner(build_from(model_config), CONTEXT, Settings())
    assert str(refusal.value).startswith(model_config.model_type)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("fields", "longest"),
    [
        ({}, CONTEXT),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, CONTEXT),
        (
            {
                "rope_parameters": {
                    "rope_type": "dynamic",
                    "factor": 2.0,
                    "rope_theta": 1e4,
                    "original_max_position_embeddings": 96,
                }
            },
            96,
        ),
    ],
)
def test_context_length(fields: dict[str, Any], longest: int) -> None:
    """Rotary frequencies that depend on the longest sequence of a batch would depend on the neighbours."""
    assert max_context_length(config("Llama", **fields)) == longest


@pytest.mark.parametrize("ignored", ["softcap", "s_aux", "scaling"])
def test_the_check_finds_an_attention_that_ignores_something(
    ignored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = {
        "softcap": "gemma2, softcap and alternating window",
        "s_aux": "gpt-oss, sinks",
        "scaling": "granite, multipliers",
    }[ignored]

    def broken(*arguments: Any, **keywords: Any) -> Any:
        return attention.paged_attention(*arguments, **{**keywords, ignored: None})

    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, attention.PAGED, broken)
    with pytest.raises(UnsupportedModel, match="differ from its own"):
        new_runner(build(family))


def test_the_check_finds_a_wrong_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "inference_worker.model.loader.probe_layers",
        lambda model: {
            i: LayerShape(x.num_kv_heads, x.key_dim, x.value_dim, None)
            for i, x in probe_layers(model).items()
        },
    )
    # the check does not know of the window then; 40 tokens still reach past it
    with pytest.raises(UnsupportedModel, match="differ from its own"):
        new_runner(build("mistral, window"))


def test_the_check_finds_decode_rows_that_see_too_little(monkeypatch: pytest.MonkeyPatch) -> None:
    read = KVCache.read

    def forgetful(
        cache: KVCache, layer: int, block_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return read(cache, layer, block_ids.roll(1))

    monkeypatch.setattr(KVCache, "read", forgetful)
    with pytest.raises(UnsupportedModel, match="differ from its own"):
        new_runner(build("llama"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_check_allows_half_precision(dtype: torch.dtype) -> None:
    model: PreTrainedModel = build("qwen3, query norms")
    model.to(dtype)  # type: ignore[arg-type]
    assert new_runner(model).cache.dtype is dtype


def test_the_check_finds_broken_weights() -> None:
    model = build("llama")
    with torch.no_grad():
        model.get_parameter("model.norm.weight").fill_(torch.nan)
    with pytest.raises(UnsupportedModel, match="not finite"):
        new_runner(model)


def test_a_cache_smaller_than_the_check_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences are then as short as the cache; it still serves."""
    model = build("llama")
    expected = generate(model, prompt_of(5), 6)
    monkeypatch.setattr(
        "inference_worker.model.cache_room.free_bytes", lambda _device: 2 * 12 * 512
    )
    runner = make_runner(model, CONTEXT, Settings(block_size=4, kv_cache_fraction=1.0))
    assert runner.num_blocks * runner.block_size <= 24
    sequence = new_sequence(prompt_of(5))
    Driver(runner).run([sequence], 6)
    assert sequence.token_ids == expected


def test_no_memory_for_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inference_worker.model.cache_room.free_bytes", lambda _device: 100)
    with pytest.raises(LoadError, match="no memory for the KV cache"):
        new_runner(build("llama"))


def test_a_processor_gives_no_more_memory_than_all_slots_can_use() -> None:
    runner = make_runner(build("llama"), CONTEXT, Settings(block_size=16, max_running=3))
    assert runner.num_blocks == 3 * CONTEXT // 16
    assert runner.description.startswith(f"KV cache: {runner.num_blocks} blocks of 16 tokens")


def test_the_size_can_be_set() -> None:
    runner = make_runner(build("llama"), CONTEXT, Settings(block_size=16, kv_cache_mib=1))
    assert runner.num_blocks == 2**20 // (16 * runner.cache.bytes_per_token)
