"""Checkpoints that autoawq writes for us, of several families and forms: what is served is what they hold."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from inference_worker.model.awq_layout import unpack
from inference_worker.model.awq_writer import CannotQuantize, QuantizeOptions, quantize
from inference_worker.model.loader import load_model
from inference_worker.quantize import BUILT_IN_TEXT
from tests.worker.model.driver import Driver, Settings, generate, new_sequence, prompt_of
from tests.worker.model.test_loader import save_tokenizer
from tests.worker.model.tiny_models import build_from, config

SIZES: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "head_dim": 32,
}


def save(directory: Path, family: str, **fields: Any) -> PreTrainedModel:
    """A tiny model and its tokenizer on disk."""
    model = build_from(config(family, **(SIZES | fields)))
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return model


def dequantised(model: Path, quantized: Path, options: QuantizeOptions) -> PreTrainedModel:
    """The model of a checkpoint's very numbers, in float32 and in transformers' own code."""
    reference: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    stored = load_file(quantized / "model.safetensors")
    packed = {name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")}
    assert len(packed) == 7 * SIZES["num_hidden_layers"]
    state = {
        f"{name}.weight": unpack(
            options.layout,
            {kind: stored.pop(f"{name}.{kind}") for kind in ("qweight", "qzeros", "scales")},
            options.group_size,
        ).dequantize(torch.float32)
        for name in packed
    }
    state |= {name: tensor.float() for name, tensor in stored.items()}
    reference.load_state_dict(state, strict=False)
    return reference


@pytest.mark.skipif(importlib.util.find_spec("awq") is None, reason="autoawq is not installed")
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Llama", QuantizeOptions(64, zero_point=False, calibration_tokens=64)),
        ("Qwen2", QuantizeOptions(32, layout="gemv", calibration_tokens=64)),
        ("Qwen3", QuantizeOptions(64, calibration_tokens=64)),
    ],
    ids=["llama, symmetric", "qwen2, gemv", "qwen3"],
)
def test_what_it_writes_is_served(tmp_path: Path, family: str, options: QuantizeOptions) -> None:
    model, out = tmp_path / "model", tmp_path / "awq"
    before = save(model, family)
    quantize(str(model), out, BUILT_IN_TEXT.read_text(), options)
    reference = dequantised(model, out, options)
    zeros = json.loads((out / "config.json").read_text())["quantization_config"]["zero_point"]
    assert zeros == options.zero_point
    # it is near what it was made from, and served as it is
    ids = torch.tensor([prompt_of(40)])
    with torch.inference_mode():
        wanted, found = (each(ids).logits.flatten() for each in (before, reference))
    assert float(torch.cosine_similarity(wanted, found, 0)) > 0.9
    served = load_model(Settings(model=str(out), dtype="float32", native=True))
    sequence = new_sequence(prompt_of(9))
    Driver(served.runner).run([sequence], 12)  # type: ignore[arg-type]
    assert sequence.token_ids == generate(reference, prompt_of(9), 12)


@pytest.mark.skipif(importlib.util.find_spec("awq") is None, reason="autoawq is not installed")
def test_a_text_that_is_too_short(tmp_path: Path) -> None:
    save(tmp_path / "model", "Llama")
    options = QuantizeOptions(group_size=64)
    with pytest.raises(CannotQuantize, match="the calibration text has 6 tokens; at least 64"):
        quantize(str(tmp_path / "model"), tmp_path / "out", "Hello.", options)
    assert not (tmp_path / "out").exists()
