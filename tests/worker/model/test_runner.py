"""The paged runner against transformers' own generation and forward pass."""

from __future__ import annotations

import math
from unittest.mock import Mock

import pytest
import torch
from transformers import PreTrainedModel

from inference_worker.engine.event import Token
from inference_worker.engine.request import OutputParams, SamplingParams
from inference_worker.engine.runner import DeviceLost, OutOfMemory, Row
from inference_worker.model import sampler
from inference_worker.model.batch import Batch
from inference_worker.model.runner import ModelRunner
from inference_worker.model.sampler import BadLogits
from tests.worker.model.driver import Driver, generate, new_runner, new_sequence, prompt_of
from tests.worker.model.tiny_models import FAMILIES, build

NUM_TOKENS = 12
LENGTHS = (1, 5, 17, 34)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return build("llama")


@pytest.fixture(scope="module")
def llama_greedy(llama: PreTrainedModel) -> list[list[int]]:
    return [generate(llama, prompt_of(length), NUM_TOKENS) for length in LENGTHS]


@pytest.fixture
def runner(llama: PreTrainedModel, llama_greedy: list[list[int]]) -> ModelRunner:
    """Made after the reference, which sets another attention."""
    return new_runner(llama)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate(family: str) -> None:
    model = build(family)
    expected = [generate(model, prompt_of(length), NUM_TOKENS) for length in LENGTHS]
    assert len({tuple(ids[-NUM_TOKENS:]) for ids in expected}) == len(LENGTHS)
    driver = Driver(new_runner(model), max_chunk=7)
    sequences = [new_sequence(prompt_of(length)) for length in LENGTHS]
    driver.run(sequences, NUM_TOKENS)
    assert [s.token_ids for s in sequences] == expected


@pytest.mark.parametrize(("max_chunk", "budget"), [(1, 1000), (3, 1000), (16, 20), (1000, 1000)])
def test_chunking_changes_nothing(
    runner: ModelRunner, llama_greedy: list[list[int]], max_chunk: int, budget: int
) -> None:
    sequences = [new_sequence(prompt_of(length)) for length in LENGTHS]
    Driver(runner, max_chunk, budget).run(sequences, NUM_TOKENS)
    assert [s.token_ids for s in sequences] == llama_greedy


@pytest.mark.parametrize("block_size", [1, 5, 16, 64])
def test_any_block_size(
    llama: PreTrainedModel, llama_greedy: list[list[int]], block_size: int
) -> None:
    sequences = [new_sequence(prompt_of(length)) for length in LENGTHS]
    Driver(new_runner(llama, block_size), max_chunk=9).run(sequences, NUM_TOKENS)
    assert [s.token_ids for s in sequences] == llama_greedy


@pytest.mark.parametrize("limit", [1, 6_000])
@pytest.mark.parametrize("family", ["llama", "mistral, window", "gpt-oss, sinks"])
def test_decode_rows_in_several_groups(
    family: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inference_worker.model.batch._GATHERED_BYTES_CPU", limit)
    model = build(family)
    expected = [generate(model, prompt_of(length), NUM_TOKENS) for length in LENGTHS]
    sequences = [new_sequence(prompt_of(length)) for length in LENGTHS]
    Driver(new_runner(model)).run(sequences, NUM_TOKENS)
    assert [s.token_ids for s in sequences] == expected


def test_latecomers_share_steps_with_decode_rows(
    runner: ModelRunner, llama_greedy: list[list[int]]
) -> None:
    driver = Driver(runner, max_chunk=6)
    sequences = [new_sequence(prompt_of(length)) for length in LENGTHS]
    running = []
    for sequence in sequences:
        running.append(sequence)
        driver.step(running)
        driver.step(running)
    driver.run(sequences, NUM_TOKENS)
    got = [s.token_ids[: len(ids)] for s, ids in zip(sequences, llama_greedy, strict=True)]
    assert got == llama_greedy


def test_recomputed_after_preemption(runner: ModelRunner, llama_greedy: list[list[int]]) -> None:
    driver = Driver(runner, max_chunk=6)
    sequences = [new_sequence(prompt_of(length)) for length in LENGTHS]
    driver.run(sequences, 5)
    for sequence in sequences[::2]:
        driver.release(sequence)
    driver.run(sequences, NUM_TOKENS)
    assert [s.token_ids for s in sequences] == llama_greedy


def test_full_blocks_of_another_sequence_are_only_read(
    runner: ModelRunner, llama_greedy: list[list[int]]
) -> None:
    driver = Driver(runner)
    first = new_sequence(prompt_of(34))
    driver.run([first], 1)
    shared = 34 // runner.block_size
    before = {i: x[first.block_table[:shared]].clone() for i, x in runner.cache.keys.items()}
    second = new_sequence(prompt_of(34))
    second.block_table = first.block_table[:shared]
    second.num_computed_tokens = shared * runner.block_size
    driver.run([first, second], NUM_TOKENS)
    assert first.token_ids == second.token_ids == llama_greedy[LENGTHS.index(34)]
    for layer, keys in before.items():
        assert torch.equal(runner.cache.keys[layer][first.block_table[:shared]], keys)


def test_a_seed_draws_the_same_alone_and_in_a_batch(runner: ModelRunner) -> None:
    sampling = SamplingParams(temperature=0.9, top_p=0.95, seed=-17)
    alone = new_sequence(prompt_of(17), sampling)
    Driver(runner).run([alone], NUM_TOKENS)
    together = new_sequence(prompt_of(17), sampling)
    others = [
        new_sequence(prompt_of(n), SamplingParams(temperature=1.5, top_k=n, seed=n))
        for n in (2, 30, 9)
    ]
    driver = Driver(runner, max_chunk=5)
    driver.run([*others, together], 4)
    driver.release(together)
    driver.run([*others, together], NUM_TOKENS)
    assert together.token_ids == alone.token_ids


@pytest.mark.parametrize("max_chunk", [4, 1000])
def test_prompt_logprobs_are_those_of_the_plain_forward(
    llama: PreTrainedModel, llama_greedy: list[list[int]], max_chunk: int
) -> None:
    prompt = prompt_of(17)
    llama.set_attn_implementation("eager")
    with torch.inference_mode():
        expected = llama(torch.tensor([prompt])).logits[0].log_softmax(-1)
    driver = Driver(new_runner(llama), max_chunk)
    sequence = new_sequence(prompt, output=OutputParams(logprobs=3, prompt_logprobs=True))
    other = new_sequence(prompt_of(5))
    scored: list[Token] = []
    while sequence.num_completion_tokens < 2:
        for each, output in driver.step([other, sequence]):
            assert output.error is None
            if each is sequence:
                scored += output.prompt_logprobs
            else:
                assert output.prompt_logprobs == ()
    assert [token.token_id for token in scored] == prompt[1:]
    for position, token in enumerate(scored):
        assert token.logprob == pytest.approx(float(expected[position, token.token_id]), abs=1e-4)
        values, ids = expected[position].topk(3)
        assert [c.token_id for c in token.top] == ids.tolist()
        assert [c.logprob for c in token.top] == pytest.approx(values.tolist(), abs=1e-4)
    assert sequence.token_ids[17:19] == llama_greedy[LENGTHS.index(17)][17:19]


def test_prompt_logprobs_of_one_token_are_none(runner: ModelRunner) -> None:
    sequence = new_sequence([7], output=OutputParams(logprobs=0, prompt_logprobs=True))
    [(_, output)] = Driver(runner).step([sequence])
    assert output.prompt_logprobs == ()
    assert output.token is not None
    assert output.token.logprob is not None


class _Forward:
    """A forward pass that spoils rows or fails."""

    def __init__(self, runner: ModelRunner) -> None:
        assert runner._forward is not None
        self.inner = runner._forward
        self.spoil_token: int | None = None
        self.error: Exception | None = None
        self.num_wanted: list[int] = []

    def __call__(self, batch: Batch, wanted: torch.Tensor) -> torch.Tensor:
        if self.error is not None:
            raise self.error
        self.num_wanted.append(len(wanted))
        logits = self.inner(batch, wanted).clone()
        if self.spoil_token is not None:
            logits[batch.input_ids[wanted] == self.spoil_token] = math.nan
        return logits


def spoilable(runner: ModelRunner) -> _Forward:
    forward = _Forward(runner)
    runner._forward = forward
    return forward


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_numbers_fails_alone(runner: ModelRunner, temperature: float) -> None:
    sampling = SamplingParams(temperature=temperature)
    spoilable(runner).spoil_token = 66
    healthy = [new_sequence([1, 2, 3], sampling), new_sequence([4], sampling)]
    sick = new_sequence([5, 6, 66], sampling)
    outputs = dict(Driver(runner).step([healthy[0], sick, healthy[1]]))
    assert isinstance(outputs[sick].error, BadLogits)
    assert all(outputs[s].error is None and outputs[s].token is not None for s in healthy)


def test_a_prefill_chunk_without_numbers_fails_before_it_is_whole(runner: ModelRunner) -> None:
    spoilable(runner).spoil_token = 66
    sick, healthy = new_sequence([1, 2, 66, 4, 5, 6]), new_sequence([7, 8, 9, 10])
    outputs = dict(Driver(runner, max_chunk=3).step([sick, healthy]))
    assert isinstance(outputs[sick].error, BadLogits)
    assert outputs[healthy].error is None


def test_nan_in_the_cache_does_not_outlive_its_sequence() -> None:
    """Blocks of a sequence whose keys and values were NaN serve the next one, padding included."""
    model = build("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[66] = math.nan  # type: ignore[operator]
    runner = new_runner(build("llama"))
    runner._forward = new_runner(model)._forward
    driver = Driver(runner)
    sick = new_sequence([1, 2, 66, 3, 4])
    [(_, output)] = driver.step([sick])
    assert isinstance(output.error, BadLogits)
    driver.release(sick)
    driver.free = list(range(runner.num_blocks))[::-1]  # block 0 first
    tables = list(runner.cache.keys.values()) + list(runner.cache.values.values())
    assert all(bool(table.isfinite().all()) for table in tables)


def test_nan_of_a_running_sequence_does_not_reach_its_neighbours() -> None:
    """The block that shorter rows would be padded with belongs to a sequence that explodes in the same step."""
    model = build("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[66] = math.nan  # type: ignore[operator]
    runner = new_runner(build("llama"))
    runner._forward = new_runner(model)._forward
    driver = Driver(runner)
    driver.free = list(range(runner.num_blocks))[::-1]
    sick, long, short = new_sequence([1, 2]), new_sequence([5] * 34), new_sequence([7, 8, 9])
    driver.step([sick, long, short])
    assert 0 in sick.block_table
    sick.token_ids[-1] = 66
    outputs = dict(driver.step([sick, long, short]))
    assert isinstance(outputs[sick].error, BadLogits)
    assert outputs[long].error is None
    assert outputs[short].error is None


def test_logits_are_made_for_no_more_than_the_rows(runner: ModelRunner) -> None:
    forward = spoilable(runner)
    Driver(runner).step([new_sequence(prompt_of(30)), new_sequence(prompt_of(9))])
    assert forward.num_wanted == [2]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be ..."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
        MemoryError("Unable to allocate 1.00 GiB for an array"),
    ],
    ids=str,
)
def test_out_of_memory_is_told_and_nothing_is_lost(
    runner: ModelRunner, llama_greedy: list[list[int]], error: Exception
) -> None:
    driver = Driver(runner)
    sequence = new_sequence(prompt_of(17))
    driver.run([sequence], 3)
    forward = spoilable(runner)
    forward.error = error
    with pytest.raises(OutOfMemory):
        driver.step([sequence])
    forward.error = None
    driver.run([sequence], NUM_TOKENS)
    assert sequence.token_ids == llama_greedy[LENGTHS.index(17)]


def test_an_error_of_the_device_itself_is_no_rows(runner: ModelRunner) -> None:
    spoilable(runner).error = torch.AcceleratorError("CUDA error: an illegal memory access was ...")
    with pytest.raises(DeviceLost, match="illegal"):
        Driver(runner).step([new_sequence([1, 2])])


@pytest.mark.parametrize("num_rows", [1, 2])
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), OutOfMemory),
        (MemoryError(), OutOfMemory),
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), DeviceLost),
    ],
    ids=["device memory", "host memory", "device"],
)
def test_a_draw_for_which_there_is_no_memory_or_device_is_no_rows_fault(
    runner: ModelRunner,
    num_rows: int,
    error: Exception,
    expected: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "inference_worker.model.sampler._choose", Mock(spec=sampler._choose, side_effect=error)
    )
    with pytest.raises(expected):
        Driver(runner).step([new_sequence([1, 2]) for _ in range(num_rows)])


def test_other_errors_pass_through(runner: ModelRunner) -> None:
    spoilable(runner).error = RuntimeError("something else")
    with pytest.raises(RuntimeError, match="something else"):
        Driver(runner).step([new_sequence([1, 2])])


def test_a_biased_token_outside_the_vocabulary_fails_its_row_alone(runner: ModelRunner) -> None:
    sick = new_sequence([1, 2], SamplingParams(temperature=0, logit_bias={10_000: 1.0}))
    healthy = new_sequence([1, 2])
    outputs = dict(Driver(runner).step([sick, healthy]))
    assert isinstance(outputs[sick].error, ValueError)
    assert outputs[healthy].token is not None


def test_closed_runner_refuses_steps(runner: ModelRunner) -> None:
    runner.close()
    with pytest.raises(RuntimeError, match="closed"):
        runner.execute([Row(new_sequence([1]), 1)])


def test_half_precision_runs() -> None:
    model = build("llama")
    model.bfloat16()
    driver = Driver(new_runner(model), max_chunk=5)
    drawn = driver.run([new_sequence(prompt_of(n)) for n in LENGTHS], 4)
    assert all(len(tokens) == 4 for tokens in drawn.values())
