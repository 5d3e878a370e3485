"""How fast the engine makes tokens, beside transformers' continuous batching, `generate` and llama.cpp, same weights.

`python -m benchmarks.engine` runs each engine in this process, without a server, on a Llama of random weights that it
builds (`--models 10M`; random_llama.py has its shape) and on the embedded model, in each form of the weights and at
each number of prompts at once. Every prompt has the same number of random tokens, and every engine makes the same
number of tokens for each, greedily and past any end of text.

The engines take turns: one measurement of each, on the same prompts, makes a repetition, and the ratios are taken
within it. No prompt comes twice, so no prefix cache helps. Before the measurements, each engine makes a few tokens to
warm up. All tokens are checked against a float32 forward pass (answer_check.py): an engine that computed something else
ends the benchmark.

`awq` rounds the weights to 4 bits (rounded_awq.py); Sluice runs the packed checkpoint, and, like the others, the same
values in bfloat16.

llama.cpp takes part where the packages `llama-cpp-python` and `gguf` are; the weights are written as GGUF for it.

The time of a measurement runs from the first prompt handed over to the last token. CPU time is the whole process's. An
engine or form of weights that cannot run here is left out, and the output says why.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from benchmarks.answer_check import AnswerCheck
from benchmarks.generators import (
    ContinuousBatching,
    Generator,
    NotHere,
    Output,
    Sluice,
    StaticGenerate,
)
from benchmarks.llama_cpp_generator import LlamaCpp
from benchmarks.random_llama import TEN_MILLION, write_random_llama
from benchmarks.report import Report
from benchmarks.rounded_awq import write_awq
from benchmarks.table import Table, percentile, spread
from inference_worker.default_model import CHECKPOINT
from inference_worker.model.errors import LoadError

MODELS: Final = ("10M", "embedded")
WEIGHTS: Final = ("float32", "bfloat16", "awq")
DENSE: Final = "Sluice, the same weights dense"
_WARM_UP_TOKENS: Final = 4
_LEAST_TOKEN, _TOKENS_END = (
    3,
    1700,
)  # prompts are made of these; both models have them, and no special ones among them


@dataclass(frozen=True)
class Plan:
    """What to run."""

    models: tuple[str, ...] = MODELS
    weights: tuple[str, ...] = WEIGHTS
    engines: tuple[str, ...] = ("sluice", "continuous", "generate", "llama.cpp")
    concurrency: tuple[int, ...] = (1, 8, 32)
    threads: int = 1
    prompt_tokens: int = 64
    new_tokens: int = 64
    repetitions: int = 3


@dataclass(frozen=True)
class Measurement:
    """One engine, one repetition."""

    output: Output
    cpu_seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.output.num_tokens / self.output.seconds

    @property
    def tokens_per_cpu_second(self) -> float:
        return self.output.num_tokens / self.cpu_seconds

    def time_to_first_token(self, share: float) -> float:
        """A percentile, in ms."""
        return percentile(self.output.times_to_first_token(), share) * 1e3

    def gap(self, share: float) -> float:
        """A percentile, in ms."""
        return percentile(self.output.gaps(), share) * 1e3


Repetition = dict[str, Measurement]  # by engine
Maker = Callable[[Path, str, int], Generator]  # from a checkpoint, a dtype and a number of threads
ENGINES: Final[dict[str, Maker]] = {
    "sluice": Sluice,
    "continuous": lambda folder, weights, _threads: ContinuousBatching(folder, weights),
    "generate": lambda folder, weights, _threads: StaticGenerate(folder, weights),
    "llama.cpp": LlamaCpp,
}


@contextlib.contextmanager
def checkpoint(model: str) -> Iterator[Path]:
    """The folder of a model."""
    if model == "embedded":
        yield CHECKPOINT
        return
    with tempfile.TemporaryDirectory() as folder:
        write_random_llama(Path(folder))
        yield Path(folder)


@contextlib.contextmanager
def contest(
    plan: Plan, folder: Path, weights: str
) -> Iterator[tuple[list[Generator], AnswerCheck, list[str]]]:
    """The engines that can run, loaded; what checks them; and why the others cannot run."""
    loaded: list[Generator] = []
    missing: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        makers = {engine: ENGINES[engine] for engine in plan.engines}
        dense, dtype = folder, weights
        if weights == "awq":
            dense, dtype, makers = _awq_makers(folder, Path(scratch), makers)
        check = AnswerCheck(dense, weights)
        try:
            for engine, make in makers.items():
                try:
                    loaded.append(make(dense, dtype, plan.threads))
                except (NotHere, LoadError) as error:
                    missing.append(f"{engine} is left out: {error}.")
            yield loaded, check, missing
        finally:
            for generator in loaded:
                generator.close()


def _awq_makers(
    folder: Path, scratch: Path, makers: dict[str, Maker]
) -> tuple[Path, str, dict[str, Maker]]:
    """Sluice reads the packed weights; the others, and Sluice again, the same values in bfloat16."""
    packed, dense = scratch / "awq", scratch / "dense"
    write_awq(folder, packed, dense)
    ours: dict[str, Maker] = {
        "sluice": lambda _folder, _dtype, threads: Sluice(packed, "bfloat16", threads),
        DENSE: lambda folder, dtype, threads: Sluice(folder, dtype, threads, name=DENSE),
    }
    return dense, "bfloat16", ours | {k: make for k, make in makers.items() if k != "sluice"}


def make_prompts(count: int, num_tokens: int, seed: int) -> list[list[int]]:
    """Random tokens, other ones for every seed."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(_LEAST_TOKEN, _TOKENS_END, (count, num_tokens), generator=random)
    rows: list[list[int]] = ids.tolist()
    return rows


def measure(
    plan: Plan, contenders: Sequence[Generator], check: AnswerCheck, concurrency: int
) -> list[Repetition]:
    """All repetitions. Raises: WrongAnswer, GenerationFailed."""
    warm_up = make_prompts(concurrency, plan.prompt_tokens, seed=concurrency)
    for generator in contenders:
        generator.generate(warm_up, _WARM_UP_TOKENS)
    repetitions: list[Repetition] = []
    for index in range(plan.repetitions):
        prompts = make_prompts(
            concurrency, plan.prompt_tokens, seed=1000 * (index + 1) + concurrency
        )
        turn = index % len(contenders)
        found = {
            generator.name: _measure_one(generator, prompts, plan.new_tokens)
            for generator in [*contenders[turn:], *contenders[:turn]]
        }
        for name, measurement in found.items():
            check.check(name, prompts, measurement.output.tokens)
        repetitions.append(found)
    return repetitions


def _measure_one(
    generator: Generator, prompts: Sequence[Sequence[int]], num_tokens: int
) -> Measurement:
    gc.collect()
    gc.disable()
    try:
        cpu_seconds = time.process_time()
        output = generator.generate(prompts, num_tokens)
        return Measurement(output, time.process_time() - cpu_seconds)
    finally:
        gc.enable()


def _add_rows(table: Table, concurrency: int, repetitions: Sequence[Repetition]) -> None:
    reference = Sluice.name
    for name in sorted(repetitions[0], key=lambda name: name != reference):
        found = [repetition[name] for repetition in repetitions]
        ratios = [""] * 2
        if name != reference and reference in repetitions[0]:
            ours = [repetition[reference] for repetition in repetitions]
            pairs = list(zip(ours, found, strict=True))
            ratios = [
                spread([a.tokens_per_second / b.tokens_per_second for a, b in pairs], 2),
                spread([a.tokens_per_cpu_second / b.tokens_per_cpu_second for a, b in pairs], 2),
            ]
        table.rows.append(
            (
                str(concurrency),
                name,
                spread([m.tokens_per_second for m in found], 0),
                spread([m.time_to_first_token(50) for m in found], 0),
                spread([m.gap(50) for m in found], 2),
                spread([m.gap(99) for m in found], 2),
                *ratios,
            )
        )


def run(plan: Plan, model: str, folder: Path) -> Iterator[str]:
    """A paragraph and a table for each form of the weights."""
    columns = ("Tokens/s", "First token ms", "Gap p50 ms", "Gap p99 ms")
    ratios = ("Sluice ÷ this", "by CPU time")
    for weights in plan.weights:
        table = Table(("At once", "Engine", *columns, *ratios), labels=2)
        with contest(plan, folder, weights) as (contenders, check, missing):
            for concurrency in plan.concurrency if contenders else ():
                _add_rows(table, concurrency, measure(plan, contenders, check, concurrency))
        yield " ".join([f"{_describe(model)}, {weights}:", *missing])
        if table.rows:
            yield str(table)


def _describe(model: str) -> str:
    return f"The {TEN_MILLION}" if model == "10M" else "The embedded model"


def report(plan: Plan, model: str) -> Report:
    """Run with one model, and write it up."""
    load = os.getloadavg()[0]
    torch.set_num_threads(plan.threads)
    introduction = (
        f"Prompts of {plan.prompt_tokens} tokens and {plan.new_tokens} new ones for each, all at once; "
        f"{plan.threads} torch thread(s); {plan.repetitions} repetitions: median (lowest–highest). A gap is the time "
        "between two tokens of one text. The last columns say how many times the tokens per second, and the tokens per "
        "CPU second, Sluice made within the same repetition."
    )
    with checkpoint(model) as folder:
        paragraphs = (introduction, *run(plan, model, folder))
    return Report(f"Engine, {model}", paragraphs, load)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    plan = Plan()
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=plan.models)
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=plan.weights)
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=plan.engines)
    parser.add_argument("--concurrency", type=int, nargs="+", default=plan.concurrency)
    parser.add_argument("--threads", type=int, default=plan.threads)
    parser.add_argument("--prompt-tokens", type=int, default=plan.prompt_tokens)
    parser.add_argument("--new-tokens", type=int, default=plan.new_tokens)
    parser.add_argument("--repetitions", type=int, default=plan.repetitions)
    parser.add_argument("--keep", type=Path, help="Markdown file that keeps the result")
    given = parser.parse_args()
    plan = Plan(
        models=tuple(given.models),
        weights=tuple(given.weights),
        engines=tuple(given.engines),
        concurrency=(1, 3) if given.quick else tuple(given.concurrency),
        threads=given.threads,
        prompt_tokens=given.prompt_tokens,
        new_tokens=8 if given.quick else given.new_tokens,
        repetitions=1 if given.quick else given.repetitions,
    )
    for model in plan.models:
        result = report(plan, model)
        print(result, flush=True)
        if given.keep is not None:
            result.keep(given.keep)


if __name__ == "__main__":
    main()
