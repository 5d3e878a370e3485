"""What a step costs that draws its tokens, beside one that takes the likeliest.

`python -m benchmarks.sampling` builds a Llama of random weights and a vocabulary of 32,000 tokens, once with sharp
distributions, as trained models have them, and once with flat ones, where top-p keeps thousands of tokens. 32 texts are
generated in one batch; a step is one call of the engine's `step`, which gives one token to each. All figures are CPU
time of the thread that does the work: the median step of a repetition. Greedy and sampled batches take turns, and a
ratio is taken within a repetition.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.engine import make_prompts
from benchmarks.random_llama import Shape, write_random_llama
from benchmarks.report import Report
from benchmarks.table import Table, spread
from inference_worker.engine.engine import Engine, EngineOptions
from inference_worker.engine.event import Failed, FinishReason
from inference_worker.engine.request import Request, SamplingParams, StoppingParams
from inference_worker.model.loader import load_model
from inference_worker.settings import WorkerSettings

ROWS: Final = 32
_PROMPT_TOKENS: Final = 16
_KV_CACHE_MIB: Final = 64
_GREEDY: Final = "greedy"
# Rows take the parameters of a kind in turn.
KINDS: Final[dict[str, list[dict[str, Any]]]] = {
    _GREEDY: [{"temperature": 0.0}],
    "temperature": [{"temperature": 0.8}],
    "top-k": [{"top_k": 50}],
    "top-p": [{"top_p": 0.95}],
    "min-p": [{"min_p": 0.05}],
    "top-k, top-p, temperature": [{"temperature": 0.7, "top_k": 40, "top_p": 0.9}],
    "repetition penalty, top-p": [{"top_p": 0.95, "repetition_penalty": 1.1}],
}
KINDS["all of these in one batch"] = [fields for kind in KINDS.values() for fields in kind]
_SHARP: Final = Shape(vocabulary=32_000, logit_deviation=6.0)
DISTRIBUTIONS: Final = {"sharp": _SHARP, "flat": replace(_SHARP, logit_deviation=1.0)}


@dataclass(frozen=True)
class Plan:
    """How much to run."""

    weights: tuple[str, ...] = ("float32", "bfloat16")
    repetitions: int = 5
    steps: int = 20  # of one measurement
    shapes: tuple[tuple[str, Shape], ...] = tuple(DISTRIBUTIONS.items())


class Batches:
    """An engine that runs batches of one kind after another."""

    def __init__(self, folder: Path, weights: str) -> None:
        settings = WorkerSettings(
            model=str(folder),
            dtype=weights,
            threads=1,
            kv_cache_mib=_KV_CACHE_MIB,
            device="cpu",
            prefix_cache=False,
        )
        served = load_model(settings)
        context_length = served.info.context_length
        options = EngineOptions(ROWS, settings.max_batch_tokens, context_length, prefix_cache=False)
        self._engine = Engine(served.runner, served.tokenizer.new_detokenizer, options)

    def step_seconds(self, kind: str, num_steps: int) -> float:
        """CPU time of the median step that decodes a batch of this kind."""
        parameters = KINDS[kind]
        for row, prompt in enumerate(make_prompts(ROWS, _PROMPT_TOKENS, seed=1)):
            sampling = SamplingParams(**parameters[row % len(parameters)], seed=row)
            self._engine.add(Request("row", tuple(prompt), StoppingParams(1000), sampling))
        self._step()  # the prompts, in one step
        seconds: list[float] = []
        while len(seconds) < num_steps:
            began_at = time.thread_time()
            drawn = self._step()
            seconds.append(time.thread_time() - began_at)
            assert drawn == ROWS, f"{drawn} tokens came from {ROWS} rows"
        self._engine.cancel_all(FinishReason.CANCELLED)
        self._engine.take_events()
        return statistics.median(seconds)

    def close(self) -> None:
        """Give the memory back."""
        self._engine.close()

    def _step(self) -> int:
        """How many tokens it drew."""
        before = self._engine.load().generated_tokens
        self._engine.step()
        for _request, event in self._engine.take_events():
            if isinstance(event, Failed):
                raise event.error
        return self._engine.load().generated_tokens - before


def measure(plan: Plan, folder: Path, weights: str) -> dict[str, list[float]]:
    """Seconds of a step by kind, one a repetition."""
    batches = Batches(folder, weights)
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for kind in KINDS:
        batches.step_seconds(kind, 2)  # warm up
    for _ in range(plan.repetitions):
        for kind, seconds in found.items():
            seconds.append(batches.step_seconds(kind, plan.steps))
    batches.close()
    return found


def _add_rows(table: Table, name: str, weights: str, found: dict[str, list[float]]) -> None:
    greedy = found[_GREEDY]
    for kind, seconds in found.items():
        more = [a - b for a, b in zip(seconds, greedy, strict=True)]
        shares = [100 * (a / b - 1) for a, b in zip(seconds, greedy, strict=True)]
        table.rows.append(
            (
                name,
                weights,
                kind,
                spread([1e3 * s for s in seconds], 2),
                *(
                    ("", "")
                    if kind == _GREEDY
                    else (spread([1e3 * s for s in more], 2), spread(shares, 1))
                ),
            )
        )


def report(plan: Plan) -> Report:
    """Run, and write it up."""
    load = os.getloadavg()[0]
    torch.set_num_threads(1)
    columns = ("Step ms", "more than greedy ms", "more than greedy %")
    table = Table(("Distributions", "Weights", "Batch", *columns), labels=3)
    for name, shape in plan.shapes:
        with tempfile.TemporaryDirectory() as folder:
            write_random_llama(Path(folder), shape)
            for weights in plan.weights:
                _add_rows(table, name, weights, measure(plan, Path(folder), weights))
    introduction = (
        f"One step of {ROWS} rows, with the engine around it, of the {plan.shapes[0][1]}; one torch thread, CPU time, "
        f"{plan.repetitions} repetitions: median (lowest–highest). Expected with sharp distributions: at most 15 % "
        "more than greedy."
    )
    return Report("Sampling", (introduction, str(table)), load)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    plan = Plan()
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument(
        "--weights", nargs="+", choices=("float32", "bfloat16"), default=plan.weights
    )
    parser.add_argument(
        "--distributions", nargs="+", choices=list(DISTRIBUTIONS), default=list(DISTRIBUTIONS)
    )
    parser.add_argument("--repetitions", type=int, default=plan.repetitions)
    parser.add_argument("--keep", type=Path, help="Markdown file that keeps the result")
    given = parser.parse_args()
    plan = Plan(
        weights=tuple(given.weights),
        repetitions=1 if given.quick else given.repetitions,
        steps=2 if given.quick else plan.steps,
        shapes=tuple((name, DISTRIBUTIONS[name]) for name in given.distributions),
    )
    if given.quick:
        small = [(name, replace(shape, vocabulary=2000, layers=1)) for name, shape in plan.shapes]
        plan = replace(plan, shapes=tuple(small))
    result = report(plan)
    print(result)
    if given.keep is not None:
        result.keep(given.keep)


if __name__ == "__main__":
    main()
