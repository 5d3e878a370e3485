"""Loading checkpoints from disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from inference_worker.engine.request import SamplingParams
from inference_worker.model.errors import LoadError, ModelNotFound, UnsupportedModel
from inference_worker.model.loader import default_sampling, load_model
from tests.worker.model.driver import Driver, Settings, generate, new_sequence, prompt_of
from tests.worker.model.tiny_models import CONTEXT, build, build_from, config


def save_tokenizer(directory: Path, extra: int = 0) -> None:
    """A byte-level tokenizer of 256 tokens and some more."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(f"more{i}" for i in range(extra))]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)  # type: ignore[no-untyped-call]
    wrapped.save_pretrained(directory)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    model = build_from(config("Llama", vocab_size=260, eos_token_id=7))
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    return tmp_path


def test_a_loaded_model_serves(checkpoint: Path) -> None:
    served = load_model(Settings(model=str(checkpoint), served_name="mine"))
    info = served.info
    assert (info.name, info.architecture, info.dtype) == ("mine", "LlamaForCausalLM", "float32")
    assert (info.context_length, info.vocabulary_size, info.device) == (CONTEXT, 260, "cpu")
    assert info.eos_token_ids == {7}
    assert info.parameter_count > 10_000
    # two layers keep keys and values of two heads of 16 float32 numbers
    assert info.kv_bytes_per_token == 2 * 2 * 2 * 16 * 4
    runner = served.runner
    assert info.kv_cache_bytes == runner.num_blocks * runner.block_size * info.kv_bytes_per_token
    assert f"a sequence of {CONTEXT} tokens takes" in info.kv_cache
    assert served.tokenizer.encode("Hi")
    expected = generate(build_from(config("Llama", vocab_size=260)), prompt_of(9), 8)
    sequence = new_sequence(prompt_of(9))
    Driver(served.runner).run([sequence], 8)  # type: ignore[arg-type]
    assert sequence.token_ids == expected


@pytest.mark.parametrize(("setting", "expected"), [(50, 50), (10_000, CONTEXT), (None, CONTEXT)])
def test_context_length_is_the_lesser_one(
    checkpoint: Path, setting: int | None, expected: int
) -> None:
    served = load_model(Settings(model=str(checkpoint), context_length=setting))
    assert served.info.context_length == expected


def test_dtype_and_threads_are_set(checkpoint: Path) -> None:
    served = load_model(Settings(model=str(checkpoint), dtype="bfloat16", threads=1))
    assert served.info.dtype == "bfloat16"
    assert torch.get_num_threads() == 1


def test_nothing_there(tmp_path: Path) -> None:
    for model in (str(tmp_path / "absent"), "./absent", str(tmp_path)):
        with pytest.raises(LoadError) as refusal:
            load_model(Settings(model=model))
        assert "\n" not in str(refusal.value)


def test_an_unknown_hub_id_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ModelNotFound, match="hub has no such model or cannot be reached"
    ) as refusal:
        load_model(Settings(model="nobody/no-such-model"))
    assert "\n" not in str(refusal.value)


def test_missing_weights_are_not_made_up(checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    with pytest.raises(LoadError, match=r"1 weights are missing, model\.layers\.1\.mlp\.up_proj"):
        load_model(Settings(model=str(checkpoint)))


def test_no_weights(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(LoadError):
        load_model(Settings(model=str(checkpoint)))


def test_no_tokenizer(checkpoint: Path) -> None:
    for path in checkpoint.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(LoadError, match="no usable tokenizer"):
        load_model(Settings(model=str(checkpoint)))


def test_a_tokenizer_that_knows_more_than_the_model(checkpoint: Path) -> None:
    save_tokenizer(checkpoint, extra=5)
    with pytest.raises(UnsupportedModel, match="261 tokens, the model knows 260"):
        load_model(Settings(model=str(checkpoint)))


def test_no_such_device(checkpoint: Path) -> None:
    count = torch.cuda.device_count()
    with pytest.raises(LoadError, match="CUDA"):
        load_model(Settings(model=str(checkpoint), device=f"cuda:{count}"))


def test_unknown_architecture(checkpoint: Path) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "nonesuch"}))
    with pytest.raises(UnsupportedModel, match="nonesuch"):
        load_model(Settings(model=str(checkpoint)))


def test_several_end_tokens_from_the_generation_config(checkpoint: Path) -> None:
    content = {"eos_token_id": [3, 4], "do_sample": True, "temperature": 0.6}
    (checkpoint / "generation_config.json").write_text(json.dumps(content))
    served = load_model(Settings(model=str(checkpoint)))
    assert served.info.eos_token_ids == {3, 4}
    assert served.info.default_sampling == SamplingParams(temperature=0.6)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, SamplingParams()),
        ({"do_sample": False}, SamplingParams(temperature=0)),
        (
            {"do_sample": False, "temperature": 0.7, "top_p": 0.9},
            SamplingParams(temperature=0, top_p=0.9),
        ),
        ({"do_sample": True}, SamplingParams()),
        (
            {
                "temperature": 0.7,
                "top_k": 20,
                "top_p": 0.8,
                "repetition_penalty": 1.05,
                "min_p": 0.1,
            },
            SamplingParams(
                temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.05, min_p=0.1
            ),
        ),
        ({"top_k": 0, "top_p": None, "temperature": None}, SamplingParams()),
        ({"top_p": 1.5, "min_p": -1, "repetition_penalty": 0}, SamplingParams()),
    ],
)
def test_default_sampling(content: dict[str, Any], expected: SamplingParams) -> None:
    assert default_sampling(content) == expected


def test_a_model_of_another_kind_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(UnsupportedModel, match="encoder-decoder"):
        load_model(Settings(model=str(tmp_path)))


def test_families_differ() -> None:
    """The random models are not degenerate: their greedy completions vary from token to token."""
    completion = generate(build("llama"), prompt_of(5), 12)[5:]
    assert len(set(completion)) > 4
