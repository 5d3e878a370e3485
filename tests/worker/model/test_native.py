"""The forward pass in C: exact against transformers, indifferent to the batch, and never in the way."""

from __future__ import annotations

import ctypes
import logging
import math
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from inference_worker.engine.runner import OutOfMemory
from inference_worker.model.awq import AwqLinear
from inference_worker.model.batch import Span
from inference_worker.model.decoder import FusedDecoder, fuse
from inference_worker.model.native.decoder import NativeDecoder
from inference_worker.model.native.matrix import Matrix, Unfit
from tests.worker.model.awq_checkpoints import round_to_nearest
from tests.worker.model.driver import Driver, generate, new_runner, new_sequence, prompt_of
from tests.worker.model.native_models import QUANTIZABLE, logits_of, native_runner, quantize
from tests.worker.model.test_decoder import FUSED, LENGTHS, NUM_TOKENS, randomise_vectors
from tests.worker.model.tiny_models import CONTEXT, build, build_from, config

UNKNOWN_TO_C = "llama, another activation"


pytestmark = pytest.mark.usefixtures("native_library")


@pytest.mark.parametrize("family", sorted(set(FUSED) - {UNKNOWN_TO_C}))
def test_greedy_equals_generate(family: str) -> None:
    model = randomise_vectors(build_from(FUSED[family]()))
    expected = [generate(model, prompt_of(length), NUM_TOKENS) for length in LENGTHS]
    sequences = [new_sequence(prompt_of(length)) for length in LENGTHS]
    Driver(native_runner(model), max_chunk=7).run(sequences, NUM_TOKENS)
    assert [s.token_ids for s in sequences] == expected


@pytest.mark.parametrize("block_size", [1, 5, 64])
def test_any_block_size(block_size: int) -> None:
    model = build("mistral, window")
    expected = [generate(model, prompt_of(length), NUM_TOKENS) for length in LENGTHS]
    sequences = [new_sequence(prompt_of(length)) for length in LENGTHS]
    Driver(native_runner(model, block_size), max_chunk=9).run(sequences, NUM_TOKENS)
    assert [s.token_ids for s in sequences] == expected


@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 128, 256])
def test_any_size_of_heads(head_dim: int) -> None:
    model = build_from(config("Llama", head_dim=head_dim, vocab_size=150, intermediate_size=160))
    expected = generate(model, prompt_of(17, vocabulary=150), NUM_TOKENS)
    sequence = new_sequence(prompt_of(17, vocabulary=150))
    Driver(native_runner(model)).run([sequence], NUM_TOKENS)
    assert sequence.token_ids == expected


@pytest.mark.parametrize("family", ["llama", "mistral, window", "qwen3, query norms"])
def test_half_precision_is_as_near_to_full_as_the_models_own(family: str) -> None:
    """It rounds less often, never worse."""
    model = randomise_vectors(build_from(FUSED[family]()))
    ids = prompt_of(34)
    with torch.inference_mode():
        exact = model(torch.tensor([ids]), use_cache=False).logits[0]
        model.bfloat16()
        own = model(torch.tensor([ids]), use_cache=False).logits[0]
    logits = logits_of(native_runner(model), [ids])[0]
    assert float((logits - exact).norm()) < 1.2 * float((own.float() - exact).norm())


@pytest.mark.parametrize("is_quantized", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_is_computed_the_same_whatever_shares_its_step(
    dtype: torch.dtype, is_quantized: bool
) -> None:
    """To the last bit: alone or among others, in one chunk, in several, or token by token."""
    sizes = QUANTIZABLE if is_quantized else {}
    model: PreTrainedModel = randomise_vectors(build_from(config("Qwen3", **sizes)))
    model.to(dtype)  # type: ignore[arg-type]
    if is_quantized:
        quantize(model, group_size=32)
    runner = native_runner(model)
    prompts = [prompt_of(length, seed) for seed, length in enumerate((34, 1, 17, 20, 5, 9, 3, 11))]
    alone = [logits_of(runner, [ids])[0] for ids in prompts]
    for chunk in (1, 5, 1000):
        together = logits_of(runner, prompts, chunk)
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_outputs_that_are_no_whole_block_are_not_for_c() -> None:
    weights = round_to_nearest(torch.randn(24, 64), 32, zero_point=True)
    with pytest.raises(Unfit, match="24 outputs"):
        Matrix(AwqLinear.pack(weights, None, torch.float32))


def test_deterministic_takes_it_as_it_is() -> None:
    runner = new_runner(build("llama"), native=True, deterministic=True)
    assert isinstance(runner._forward, NativeDecoder)


def test_memory_that_there_was_none_of_is_not_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_from(config("Llama"))
    runner = native_runner(model)
    prompt = prompt_of(40)
    allocate = torch.empty

    def refuse(*size: object, **options: object) -> torch.Tensor:
        if len(size) == 1 and isinstance(size[0], int):  # scratch memory alone
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return allocate(*size, **options)  # type: ignore[call-overload, no-any-return]

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", refuse)
        with pytest.raises(OutOfMemory):
            Driver(runner, max_chunk=40).run([new_sequence(prompt)], 2)
    forward = runner._forward
    assert isinstance(forward, NativeDecoder)
    room = forward._library.scratch_size(
        ctypes.byref(forward._model), *forward._room, forward._num_threads
    )
    assert room <= len(forward._scratch)  # what C takes for its own
    sequence = new_sequence(prompt)
    Driver(runner, max_chunk=39).run([sequence], 4)
    assert sequence.token_ids == generate(model, prompt, 4)


def test_positions_beyond_those_computed_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inference_worker.model.native.decoder._POSITIONS", 8)
    model = build("llama")
    expected = generate(model, prompt_of(34), NUM_TOKENS)
    sequence = new_sequence(prompt_of(34))
    Driver(native_runner(model), max_chunk=7).run([sequence], NUM_TOKENS)
    assert sequence.token_ids == expected


@pytest.mark.parametrize("first_positions", [8, 2048])
def test_frequencies_stay_those_of_the_models_own_length(
    first_positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dynamic rotary embeddings change theirs as soon as they are asked for one position more."""
    monkeypatch.setattr("inference_worker.model.native.decoder._POSITIONS", first_positions)
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
    model = build_from(config("Llama", rope_parameters=rope))
    ids = prompt_of(CONTEXT - 1)
    with torch.inference_mode():
        own = model(torch.tensor([ids]), use_cache=False).logits[0]
    assert torch.allclose(logits_of(native_runner(model), [ids], 50)[0], own, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_no_number_stays_in_its_row(dtype: torch.dtype) -> None:
    model: PreTrainedModel = build("llama")
    model.to(dtype)  # type: ignore[arg-type]
    runner = native_runner(model)
    healthy = logits_of(runner, [[5, 6, 7]])[0]
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight")[66] = math.nan
    sick, other = logits_of(runner, [[1, 66, 2], [5, 6, 7]])
    assert not bool(sick[1:].isfinite().any())
    assert bool(sick[0].isfinite().all())
    assert torch.equal(other, healthy)


def test_models_that_it_does_not_know_run_in_torch_and_the_log_says_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    for model, reason in (
        (build_from(FUSED[UNKNOWN_TO_C]()), "its activation is GELUTanh"),
        (build_from(config("Llama", hidden_size=72, head_dim=16)), "not multiples of 32"),
        (build_from(config("Llama", head_dim=24)), "its heads have 24 elements"),
        (build("llama").to(torch.float16), "float16 are not known"),  # type: ignore[arg-type]
    ):
        caplog.clear()
        assert isinstance(new_runner(model, native=True)._forward, FusedDecoder)
        [line] = [x.getMessage() for x in caplog.records if "not in C" in x.message]
        assert line.startswith("steps run in torch, not in C: ")
        assert reason in line


def test_a_token_wanted_twice_or_out_of_order() -> None:
    """More logits than tokens, as of a single prompt token that is both the last and scored."""
    runner = native_runner(build("llama"))
    driver = Driver(runner)
    sequence = new_sequence([5, 6, 7])
    driver.reserve(sequence, 3)
    span = Span(sequence.token_ids, 0, 3, sequence.block_table)
    in_order = runner.logits([span], range(3))
    which = [2, 0, 1, 2, 2, 0, 1, 0]
    assert torch.equal(runner.logits([span], which), in_order[which])


@pytest.mark.parametrize(
    ("token_ids", "block_table", "wanted", "fault"),
    [
        ([5, 199], [0], 0, "a token id"),
        ([5, -1], [0], 0, "a token id"),
        ([5, 6], [10**6], 0, "a slot"),
        ([5, 6], [-1], 0, "a slot"),
        ([5, 6], [0], 2, "a wanted token"),
        ([5, 6], [0], -1, "a wanted token"),
    ],
)
def test_nothing_is_read_or_written_out_of_range(
    token_ids: list[int], block_table: list[int], wanted: int, fault: str
) -> None:
    runner = native_runner(build("llama"))
    with pytest.raises(IndexError, match=f"{fault} is out of range"):
        runner.logits([Span(token_ids, 0, len(token_ids), block_table)], [wanted])


def test_blocks_out_of_range_are_not_followed() -> None:
    runner = native_runner(build("llama"), block_size=4)
    tokens = list(range(9))
    with pytest.raises(IndexError, match="a block is out of range"):
        runner.logits([Span(tokens, 8, 9, [0, 10**6, 1])], [0])


def test_a_not_a_number_of_any_kind_is_one_in_the_result() -> None:
    """All bits set, as in memory that was never written: what a payload adds to must not end up finite."""
    model = build("llama")
    attention = model.get_submodule("model.layers.0.self_attn")
    sizes = [attention.get_parameter(f"{x}_proj.weight").shape[0] for x in "qkv"]
    runner = native_runner(model)
    assert isinstance(runner._forward, NativeDecoder)
    _, key, _ = torch.split(runner._forward._matrices[0]["qkv"].tensors[0], sizes)
    with torch.no_grad():
        key.view(torch.int32).fill_(-1)
    assert bool(logits_of(runner, [[1, 2, 3]])[0].isnan().all())


@pytest.mark.parametrize("name", ["model.norm", "model.layers.1.mlp.down_proj", "lm_head"])
def test_weights_of_two_kinds_are_not_read_as_one(name: str) -> None:
    model = build("llama")
    cache = native_runner(model).cache
    model.get_submodule(name).bfloat16()
    fused = fuse(model)
    assert fused is not None
    with pytest.raises(Unfit, match="differ in kind"):
        NativeDecoder(fused, cache, CONTEXT)


@pytest.mark.parametrize("compiler", ["", "false", "/nonexistent/cc"])
def test_without_a_compiler_torch_serves_and_the_log_says_so(
    compiler: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("CC", compiler)
    if not compiler:
        monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with caplog.at_level(logging.INFO):
        runner = new_runner(build("llama"), native=True)
    assert isinstance(runner._forward, FusedDecoder)
    assert "steps run in FusedDecoder" in caplog.text
    [line] = [r.getMessage() for r in caplog.records if "steps run in torch, not in C" in r.message]
    assert "\n" not in line
