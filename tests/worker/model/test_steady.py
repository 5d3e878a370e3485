"""With --deterministic, a token's logits are the same to the last bit, whatever is computed with it and before it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
import torch

from inference_worker.engine.event import Token
from inference_worker.engine.request import OutputParams, SamplingParams
from inference_worker.engine.sequence import Sequence
from inference_worker.model.batch import Span
from inference_worker.model.errors import UnsupportedModel
from inference_worker.model.loader import load_model
from inference_worker.model.runner import ModelRunner
from tests.worker.model.awq_checkpoints import Quantization, save_quantized
from tests.worker.model.driver import (
    Driver,
    Settings,
    generate,
    new_runner,
    new_sequence,
    prompt_of,
)
from tests.worker.model.test_loader import save_tokenizer
from tests.worker.model.tiny_models import FAMILIES, build, build_from, config

LENGTH = 140  # more keys than are looked at together
MOST_DECODED = 15  # one by one, which costs the most; enough to cross the end of a piece of keys
EXPERTS = ("moe", "gpt-oss", "deepseek")
STEADY = [family for family in FAMILIES if not any(name in family for name in EXPERTS)]


def steady_runner(family: str, dtype: torch.dtype, block_size: int = 4) -> ModelRunner:
    model = build(family).to(dtype)  # type: ignore[arg-type]
    return new_runner(model, block_size, deterministic=True)


def cuts(length: int, longest: int, rng: random.Random) -> Iterator[tuple[int, int]]:
    """A sequence cut into steps of at most `longest` tokens; but the first may have all but `MOST_DECODED`."""
    start = 0
    if longest == 1 and length > MOST_DECODED:
        start = length - MOST_DECODED
        yield 0, start
    while start < length:
        stop = min(length, start + rng.randint(1, longest))
        yield start, stop
        start = stop


class Cutter:
    """Runs the same tokens in steps of different kinds, always in fresh blocks."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self.rng = random.Random(0)

    def blocks(self, count: int) -> list[list[int]]:
        """Disjoint block tables for `count` sequences, in no order."""
        each = -(-LENGTH // self.runner.block_size)
        assert count * each <= self.runner.num_blocks
        blocks = self.rng.sample(range(self.runner.num_blocks), count * each)
        return [blocks[i * each : (i + 1) * each] for i in range(count)]

    def whole(self, tokens: list[int]) -> torch.Tensor:
        (table,) = self.blocks(1)
        return self.runner.logits([Span(tokens, 0, len(tokens), table)], range(len(tokens)))

    def among(self, sequences: list[list[int]], longest: int) -> list[torch.Tensor]:
        """Logits [tokens, vocabulary] of each sequence, computed side by side in steps that begin anywhere."""
        tables = self.blocks(len(sequences))
        steps = [list(cuts(len(tokens), longest, self.rng)) for tokens in sequences]
        parts: list[list[torch.Tensor]] = [[] for _ in sequences]
        while any(steps):
            running = [i for i, left in enumerate(steps) if left and self.rng.random() < 0.7]
            spans = [(i, Span(sequences[i], *steps[i].pop(0), tables[i])) for i in running]
            spans.sort(key=lambda pair: not pair[1].is_decode)
            if not spans:
                continue
            sizes = [span.stop - span.start for _, span in spans]
            logits = self.runner.logits([span for _, span in spans], range(sum(sizes)))
            for (i, _), part in zip(spans, torch.split(logits, sizes), strict=True):
                parts[i].append(part)
        return [torch.cat(part) for part in parts]


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *[(family, torch.bfloat16) for family in STEADY],
        ("llama", torch.float32),
        ("gemma2, softcap and alternating window", torch.float32),
    ],
)
def test_logits_are_bitwise_the_same_however_they_are_computed(
    family: str, dtype: torch.dtype
) -> None:
    cutter = Cutter(steady_runner(family, dtype))
    sequences = [prompt_of(length, seed=length) for length in (LENGTH, 7, 30)]
    alone = [cutter.whole(tokens) for tokens in sequences]
    for longest in (1, 50):  # decode alone, chunks of any size
        for got, expected in zip(cutter.among(sequences, longest), alone, strict=True):
            assert torch.equal(got, expected)


def test_awq_weights_are_among_what_it_holds_for(tmp_path: Path) -> None:
    """A 4-bit product is chosen by its number of rows, which is the same in every pass."""
    model = build_from(config("Llama", vocab_size=260, hidden_size=128, intermediate_size=128))
    save_quantized(model, tmp_path, Quantization())
    save_tokenizer(tmp_path)
    served = load_model(Settings(model=str(tmp_path), deterministic=True))
    assert served.info.dtype == "bfloat16"
    runner = cast(ModelRunner, served.runner)
    cutter = Cutter(runner)
    sequences = [prompt_of(length, seed=length) for length in (LENGTH, 7)]
    alone = [cutter.whole(tokens) for tokens in sequences]
    for got, expected in zip(cutter.among(sequences, 50), alone, strict=True):
        assert torch.equal(got, expected)


def test_they_are_not_without_the_setting() -> None:
    """The reason for it: what this file asserts is no matter of course."""
    cutter = Cutter(new_runner(build("llama").bfloat16()))
    tokens = prompt_of(LENGTH)
    (stepwise,) = cutter.among([tokens], 1)
    assert not torch.equal(stepwise, cutter.whole(tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_neither_threads_nor_the_size_of_blocks_count(dtype: torch.dtype) -> None:
    tokens = prompt_of(21)
    expected = Cutter(steady_runner("llama", dtype)).whole(tokens)
    other = Cutter(steady_runner("llama", dtype, 16))
    try:
        torch.set_num_threads(2)
        assert torch.equal(other.whole(tokens), expected)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("family", ["qwen2 moe, window told by the mask alone", "gpt-oss, sinks"])
def test_a_model_on_which_it_does_not_hold_is_refused(family: str) -> None:
    with pytest.raises(UnsupportedModel, match="deterministic"):
        steady_runner(family, torch.float32)


@pytest.mark.parametrize("family", ["mistral, window", "gpt2, learned positions"])
def test_greedy_equals_generate(family: str) -> None:
    model = build(family)
    expected = generate(model, prompt_of(34), 12)
    sequence = new_sequence(prompt_of(34))
    Driver(new_runner(model, deterministic=True), max_chunk=9).run([sequence], 12)
    assert sequence.token_ids == expected


def test_draws_and_their_probabilities_are_the_same_alone_and_in_a_batch() -> None:
    runner = steady_runner("llama", torch.bfloat16)
    scored = OutputParams(logprobs=4, echo=True, prompt_logprobs=True)
    sampling = SamplingParams(temperature=1.3, top_p=0.9, repetition_penalty=1.2, seed=5)

    def run(others: list[Sequence], max_chunk: int) -> list[Token]:
        one = new_sequence(prompt_of(40), sampling, scored)
        driver = Driver(runner, max_chunk)
        tokens: list[Token] = []
        while one.num_completion_tokens < 12:
            for sequence, output in driver.step([*others, one]):
                assert output.error is None
                if sequence is one:
                    tokens += output.prompt_logprobs
                    tokens += [output.token] if output.token is not None else []
        return tokens

    alone = run([], 1000)
    assert len(alone) == 39 + 12
    others = [
        new_sequence(prompt_of(n), SamplingParams(temperature=0.7, top_k=n, seed=n), scored)
        for n in (3, 30, 9)
    ]
    assert run(others, 7) == alone
