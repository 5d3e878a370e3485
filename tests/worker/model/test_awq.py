"""AWQ weights: their layouts, their products, and checkpoints with them."""

from __future__ import annotations

import importlib.util
import itertools
import json
import shutil
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import cosine_similarity
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from inference_worker.default_model import CHECKPOINT
from inference_worker.model import awq_cpu
from inference_worker.model.awq import AwqLinear
from inference_worker.model.awq_checkpoint import StoredAwq
from inference_worker.model.awq_layout import LAYOUTS, pack_gemm, stored_shapes, unpack
from inference_worker.model.errors import LoadError, UnsupportedModel
from inference_worker.model.loader import _load_weights, load_model
from tests.worker.model.awq_checkpoints import (
    Quantization,
    edit_config,
    pack,
    random_weights,
    save_quantized,
)
from tests.worker.model.driver import Driver, Settings, generate, new_sequence, prompt_of
from tests.worker.model.test_loader import save_tokenizer
from tests.worker.model.tiny_models import build_from, config

GROUP_SIZES = (32, 64, 128)
VOCABULARY = 260
PINNED = Path(__file__).parents[1] / "pinned_answers.json"


def cosine(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(cosine_similarity(found.double().flatten(), expected.double().flatten(), 0))


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_code_for_code(layout: str, group_size: int) -> None:
    for num_out, num_in in ((64, 384), (200, 128)):
        weights = random_weights(num_out, num_in, group_size)
        stored = pack(weights, layout)
        shapes = {name: (tuple(t.shape), t.dtype) for name, t in stored.items()}
        assert shapes == stored_shapes(layout, num_in, num_out, group_size)
        found = unpack(layout, stored, group_size)
        assert torch.equal(found.codes, weights.codes)
        assert torch.equal(found.zeros, weights.zeros)
        assert torch.equal(found.scales, weights.scales)


def test_the_gemm_layout_is_written_as_it_is_read() -> None:
    weights = random_weights(72, 256, 64)
    for name, tensor in pack(weights, "gemm").items():
        assert torch.equal(pack_gemm(weights)[name], tensor)


@pytest.mark.skipif(importlib.util.find_spec("awq") is None, reason="autoawq is not installed")
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_autoawq_packs_the_same(group_size: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        linear_classes: Any = importlib.import_module("awq.modules.linear")
    weights = random_weights(64, 384, group_size)
    linear = nn.Linear(384, 64, bias=False).half()
    linear.weight.data = weights.dequantize(torch.float16)
    for layout, name in zip(LAYOUTS, ("GEMM", "GEMV", "GEMVFast"), strict=True):
        scales, zeros = weights.scales, weights.zeros.half()
        if layout != "gemm":
            scales, zeros = scales.t().contiguous(), zeros.t().contiguous()
        packer = getattr(linear_classes, f"WQLinear_{name}")
        theirs = packer.from_linear(linear, 4, group_size, scales=scales, zeros=zeros)
        for kind, tensor in pack(weights, layout).items():
            assert torch.equal(getattr(theirs, kind), tensor), (layout, kind)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_products_are_those_of_the_dequantised_weights(group_size: int, dtype: torch.dtype) -> None:
    row_counts = (1, 3, awq_cpu.MAX_INT4_ROWS, awq_cpu.MAX_INT4_ROWS + 1)
    for num_out, num_in in itertools.product((8, 64, 200), (128, 384)):
        weights = random_weights(num_out, num_in, group_size)
        bias = torch.randn(num_out)
        layer = AwqLinear.pack(weights, bias, dtype)
        for rows in row_counts:
            x = torch.randn(2, rows, num_in).to(dtype)[1:]
            found = layer(x)
            assert (found.shape, found.dtype) == ((1, rows, num_out), dtype)
            expected = x.double() @ weights.dequantize(torch.float64).t() + bias.double()
            assert cosine(found, expected) >= 0.9999
            if dtype == torch.float32:
                torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=1e-5)


def test_both_products_of_a_cpu_use_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = AwqLinear.pack(random_weights(128, 256, 64), None, torch.bfloat16)
    x = torch.randn(16, 256).bfloat16()
    packed = layer(x)
    monkeypatch.setattr(awq_cpu, "MAX_INT4_ROWS", 0)
    assert cosine(layer(x), packed) > 0.99999


def test_weights_take_the_memory_of_four_bits() -> None:
    layer = AwqLinear.pack(random_weights(512, 1024, 128), None, torch.bfloat16)
    assert layer.num_weights == 512 * 1024
    assert layer.num_bytes == 512 * 1024 * (0.5 + 4 / 128)


def test_fused_layers_give_the_same_and_keep_nothing_twice() -> None:
    sizes = (192, 64, 64)
    layers = [
        AwqLinear.pack(random_weights(size, 256, 64, seed), torch.randn(size), torch.bfloat16)
        for seed, size in enumerate(sizes)
    ]
    for rows in (1, 100):
        x = torch.randn(rows, 256).bfloat16()
        before = [layer(x) for layer in layers]
        fused = AwqLinear.fuse(layers)
        assert fused is not None
        assert torch.equal(fused(x), torch.cat(before, -1))
        for layer, expected in zip(layers, before, strict=True):
            assert torch.equal(layer(x), expected)
        stores: list[Any] = [layer._weights for layer in (fused, *layers)]
        assert len({store._packed.untyped_storage().data_ptr() for store in stores}) == 1


def test_what_does_not_fit_is_not_fused() -> None:
    def layer(num_out: int, has_bias: bool = False) -> AwqLinear:
        bias = torch.zeros(num_out) if has_bias else None
        return AwqLinear.pack(random_weights(num_out, 128, 64), bias, torch.bfloat16)

    assert AwqLinear.fuse([layer(64), layer(64, has_bias=True)]) is None
    assert AwqLinear.fuse([layer(72), layer(64)]) is None  # padding would come between them


# --- checkpoints


def save_model(directory: Path, quantization: Quantization, **fields: Any) -> Any:
    """A tiny model's AWQ checkpoint; the dequantised model."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    model = build_from(config("Llama", vocab_size=VOCABULARY, **sizes, **fields))
    save_quantized(model, directory, quantization)
    save_tokenizer(directory)
    return model


@pytest.mark.parametrize(
    "quantization",
    [
        *(Quantization(layout, size) for layout in LAYOUTS for size in GROUP_SIZES),
        Quantization("gemm", 64, zero_point=False),
        Quantization("gemm", 64, zero_point=False, stores_zeros=False),
        Quantization("gemv", 32, zero_point=False, stores_zeros=False),
        Quantization("gemm", 32, kept=("v_proj", "down_proj")),
    ],
    ids=str,
)
@pytest.mark.parametrize("native", [True, False], ids=["in C", "in torch"])
def test_a_checkpoint_is_served_as_its_dequantised_model(
    tmp_path: Path, native: bool, quantization: Quantization
) -> None:
    reference = save_model(tmp_path, quantization, attention_bias=True)
    served = load_model(Settings(model=str(tmp_path), dtype="float32", native=native))
    assert served.info.parameter_count == sum(p.numel() for p in reference.parameters())
    sequence = new_sequence(prompt_of(9))
    Driver(served.runner).run([sequence], 8)  # type: ignore[arg-type]
    # the norms and embeddings are stored in half precision
    reference.half().float()
    assert sequence.token_ids == generate(reference, prompt_of(9), 8)


def test_weights_are_never_there_both_stored_and_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path, Quantization())
    stored: weakref.WeakSet[StoredAwq] = weakref.WeakSet()
    left: list[int] = []

    def remember(module: StoredAwq, *arguments: Any) -> None:
        make(module, *arguments)
        stored.add(module)

    def count(*arguments: Any) -> AwqLinear:
        left.append(len(stored))
        return pack(*arguments)

    make, pack = StoredAwq.__init__, AwqLinear.pack
    monkeypatch.setattr(StoredAwq, "__init__", remember)
    monkeypatch.setattr(AwqLinear, "pack", count)
    load_model(Settings(model=str(tmp_path)))
    assert left == list(range(14, 0, -1))


def test_the_embedded_model_answers_as_its_dequantised_form(tmp_path: Path) -> None:
    """Greedy text of pinned prompts, in either number type, in C and in torch: as float32 makes of the same values."""
    conversations = json.loads(PINNED.read_text())[::6]
    reference: Any = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype="float32")
    save_quantized(reference, tmp_path, Quantization(group_size=64))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(CHECKPOINT / name, tmp_path / name)
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path)
    prompts = [
        tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True)["input_ids"]
        for row in conversations
    ]
    end = tokenizer.eos_token_id
    expected = [until(end, generate(reference, ids, 20)[len(ids) :]) for ids in prompts]
    assert len({tuple(answer) for answer in expected}) > len(prompts) // 2
    for dtype, native in itertools.product(("float32", "bfloat16"), (True, False)):
        settings = Settings(model=str(tmp_path), dtype=dtype, native=native)
        sequences = [new_sequence(ids) for ids in prompts]
        Driver(load_model(settings).runner).run(sequences, 20)  # type: ignore[arg-type]
        found = [s.token_ids[len(ids) :] for s, ids in zip(sequences, prompts, strict=True)]
        assert [until(end, answer) for answer in found] == expected, (dtype, native)


def until(end: int, token_ids: list[int]) -> list[int]:
    """What comes before the end of text."""
    return token_ids[: token_ids.index(end)] if end in token_ids else token_ids


def test_a_cpu_takes_bfloat16_unless_told_otherwise(tmp_path: Path) -> None:
    save_model(tmp_path, Quantization())
    assert load_model(Settings(model=str(tmp_path))).info.dtype == "bfloat16"
    assert load_model(Settings(model=str(tmp_path), dtype="float16")).info.dtype == "float16"


def test_a_gpu_whose_kernels_do_not_run_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path, Quantization())
    monkeypatch.setattr("inference_worker.model.kernels.find_fault", lambda *_: "no C compiler")
    settings = Settings(model=str(tmp_path))
    with pytest.raises(LoadError, match=r"^AWQ weights on a GPU need .*: no C compiler$"):
        _load_weights(settings, AutoConfig.from_pretrained(tmp_path), torch.device("cuda", 0))


def test_transformers_own_way_is_back_after_the_load(tmp_path: Path) -> None:
    before = AUTO_QUANTIZER_MAPPING["awq"]
    save_model(tmp_path, Quantization())
    load_model(Settings(model=str(tmp_path)))
    assert AUTO_QUANTIZER_MAPPING["awq"] is before


def test_missing_zeros_are_understood_of_symmetric_weights_alone(tmp_path: Path) -> None:
    save_model(tmp_path, Quantization(zero_point=True, stores_zeros=False))
    with pytest.raises(LoadError, match=r"14 weights are missing, model\..*qzeros"):
        load_model(Settings(model=str(tmp_path)))


def test_missing_codes_are_not_made_up(tmp_path: Path) -> None:
    save_model(tmp_path, Quantization())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.scales"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(LoadError, match=r"1 weights are missing, model\.layers\.1\.mlp\.up_proj"):
        load_model(Settings(model=str(tmp_path)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantized with gptq are not supported"),
        ({"quant_method": "bitsandbytes"}, "quantized with bitsandbytes are not supported"),
        ({"quant_method": "awq", "bits": 8}, "number of bits is 8"),
        ({"quant_method": "awq", "group_size": -1}, "group size is -1; supported: 32, 64, 128"),
        ({"quant_method": "awq", "version": "marlin"}, "layout is marlin; supported: gemm, gemv"),
    ],
)
def test_other_quantizations_are_refused_in_one_line(
    tmp_path: Path, fields: dict[str, object], message: str
) -> None:
    save_model(tmp_path, Quantization())
    edit_config(tmp_path, quantization_config=fields)
    with pytest.raises(UnsupportedModel, match=message) as refusal:
        load_model(Settings(model=str(tmp_path)))
    assert "\n" not in str(refusal.value)


def test_quantized_weights_of_no_linear_layer_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path, Quantization())
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.mlp.experts.0.up_proj.qweight"] = torch.zeros(8, 8, dtype=torch.int32)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UnsupportedModel, match=r"experts\.0\.up_proj is quantized but is no linear"
    ):
        load_model(Settings(model=str(tmp_path)))


def test_shapes_that_awq_does_not_have_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path, Quantization(group_size=32))
    edit_config(tmp_path, intermediate_size=248)
    with pytest.raises(UnsupportedModel, match=r"248 inputs and 128 outputs"):
        load_model(Settings(model=str(tmp_path)))
