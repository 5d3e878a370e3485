"""Decoders whose attention, or all whose layers, are computed by kernels: nothing but speed changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from transformers import PretrainedConfig, PreTrainedModel

from inference_worker.model import loader
from inference_worker.model.architecture import probe_layers
from inference_worker.model.batch import Batch, DecodeRows, Span, pack
from inference_worker.model.decoder import FusedDecoder, fuse
from inference_worker.model.forward import Forward, TransformersForward
from inference_worker.model.kernel_decoder import KernelDecoder
from inference_worker.model.kernels import find_fault
from inference_worker.model.kv_cache import KVCache
from tests.worker.model.driver import Driver, generate, new_runner, new_sequence, prompt_of
from tests.worker.model.kernels.device import DEVICE
from tests.worker.model.kernels.nearness import COARSENESS
from tests.worker.model.test_decoder import FUSED, randomise_vectors
from tests.worker.model.tiny_models import CONTEXT, FAMILIES, build_from

BLOCK_SIZE, NUM_BLOCKS = 4, 64


def new_model(make: Callable[[], PretrainedConfig]) -> PreTrainedModel:
    model: Any = randomise_vectors(build_from(make()))
    return cast(PreTrainedModel, model.to(DEVICE))


def new_cache(model: PreTrainedModel, **options: Any) -> KVCache:
    sizes: Any = {"num_blocks": NUM_BLOCKS, "block_size": BLOCK_SIZE}
    return KVCache(probe_layers(model), dtype=model.dtype, device=DEVICE, **sizes, **options)


def new_fused(model: PreTrainedModel) -> FusedDecoder:
    decoder = fuse(model)
    assert decoder is not None
    return decoder


def steps() -> Iterator[tuple[list[Span], list[int]]]:
    """Spans and the indices of the logits to compare: prompts in chunks, decode rows, and both in a batch."""
    first, second, third = (prompt_of(length) for length in (7, 16, 5))
    tables = [list(range(i, NUM_BLOCKS, 3)) for i in range(3)]
    yield [Span(first, 0, 5, tables[0]), Span(second, 0, 4, tables[1])], [4, 3, 8]
    yield [Span(first, 5, 6, tables[0]), Span(second, 4, 14, tables[1])], [0, 1, 10]
    rows = [Span(first, 6, 7, tables[0]), Span(second, 14, 15, tables[1])]
    yield [*rows, Span(third, 0, 1, tables[2])], [0, 1, 2]
    yield [Span(second, 15, 16, tables[1]), Span(third, 1, 2, tables[2])], [0, 1]


@torch.inference_mode()
def logits_of(forward: Forward, cache: KVCache) -> list[torch.Tensor]:
    return [
        forward(pack(spans, cache), torch.tensor(wanted, device=DEVICE))
        for spans, wanted in steps()
    ]


def assert_near(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype
        scale = float(theirs.abs().max())
        torch.testing.assert_close(ours, theirs, rtol=0, atol=COARSENESS * 1e-5 * scale)


@pytest.mark.parametrize(
    "family",
    [
        "llama, one key head",
        "llama, another activation",
        "llama, scaled as llama 3",
        "mistral, window",
        "qwen2, window in one layer, biases",
        "qwen3, query norms",
    ],
)
def test_fused_layers(family: str) -> None:
    model = new_model(FUSED[family])
    plain, ours = new_cache(model), new_cache(model, uses_kernels=True)
    decoder = new_fused(model)
    expected = logits_of(decoder, plain)
    assert_near(logits_of(KernelDecoder(decoder, CONTEXT), ours), expected)
    for layer in plain.keys:
        torch.testing.assert_close(ours.keys[layer], plain.keys[layer], rtol=0, atol=1e-4)
        torch.testing.assert_close(ours.values[layer], plain.values[layer], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "family",
    [
        "gemma2, softcap and alternating window",
        "gpt-oss, sinks",
        "deepseek, values of another width",
    ],
)
def test_attention_of_other_models(family: str) -> None:
    model = new_model(FAMILIES[family])
    plain, ours = new_cache(model), new_cache(model, uses_kernels=True)
    forward = TransformersForward(model)
    assert_near(logits_of(forward, ours), logits_of(forward, plain))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_near_to_the_exact_result_as_torch_is(dtype: torch.dtype) -> None:
    model = new_model(FUSED["qwen3, query norms"])
    exact = torch.cat(logits_of(new_fused(model), new_cache(model)))
    half = cast(Any, model).to(dtype)
    decoder = new_fused(half)
    torchs = torch.cat(logits_of(decoder, new_cache(half))) - exact
    ours = torch.cat(logits_of(KernelDecoder(decoder, CONTEXT), new_cache(half, uses_kernels=True)))
    assert ours.dtype == dtype
    assert (ours - exact).norm() < 1.5 * torchs.norm()


@torch.inference_mode()
def test_padded_rows_change_nothing() -> None:
    model = new_model(FUSED["mistral, window"])
    decoder = KernelDecoder(new_fused(model), CONTEXT)
    cache = new_cache(model, uses_kernels=True)
    logits = logits_of(decoder, cache)
    *_, (spans, wanted) = steps()
    batch = pack(spans, cache)
    tensors = [*cache.keys.values(), *cache.values.values()]
    before = [tensor.clone() for tensor in tensors]
    padded = decoder(_pad(batch, 3), torch.tensor(wanted, device=DEVICE))
    assert_near([padded], logits[-1:])
    for tensor, old in zip(tensors, before, strict=True):
        torch.testing.assert_close(tensor, old)
        for after in (tensor, old):
            after.flatten(0, 1)[batch.slots] = 0
        assert torch.equal(tensor, old)


def _pad(batch: Batch, count: int) -> Batch:
    """The decode rows with more rows behind them that hold nothing."""
    (rows,) = batch.decode

    def longer(x: torch.Tensor, value: int) -> torch.Tensor:
        return torch.cat([x, x.new_full((count, *x.shape[1:]), value)])

    table, lengths = longer(rows.block_table, 0), longer(rows.lengths, 0)
    padded = DecodeRows(batch.cache, 0, lengths, table, (0, CONTEXT))
    ids, positions = longer(batch.input_ids, 0), longer(batch.positions, 0)
    return Batch(batch.cache, ids, positions, longer(batch.slots, -1), [padded], [])


def test_the_loader_computes_by_kernels_where_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_can_use_kernels", lambda *_: True)
    model = new_model(FUSED["qwen2, window in one layer, biases"])
    prompt = prompt_of(7)
    expected = generate(model, prompt, 4)
    runner = new_runner(model)
    assert isinstance(runner._forward, KernelDecoder)
    sequence = new_sequence(prompt)
    Driver(runner).run([sequence], 4)
    assert list(sequence.token_ids) == expected


def test_a_processor_without_kernels_is_told_so() -> None:
    fault = find_fault(torch.device("cpu"), torch.float32)
    assert fault == "they are for CUDA devices"


def test_rotary_embeddings_of_another_kind_are_refused() -> None:
    decoder = new_fused(new_model(FUSED["llama"]))

    def rotary(x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = torch.rand(1, positions.shape[1], 16)
        return angles, angles

    decoder.rotary = rotary  # type: ignore[assignment]
    with pytest.raises(ValueError, match="halves"):
        KernelDecoder(decoder, CONTEXT)
