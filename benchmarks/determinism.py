"""What --deterministic costs: the engine's tokens a second with it and without, on the same prompts in the same run.

`python -m benchmarks.determinism` runs the engine in this process, without a server, on a Llama of random weights. The
two take turns; figures are tokens a second of the process's CPU time with one torch thread, and the ratio is taken
within a repetition. Tokens are greedy and of a fixed number, after prompts of a fixed length.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.engine import make_prompts
from benchmarks.generators import Sluice
from benchmarks.random_llama import TEN_MILLION, Shape, write_random_llama
from benchmarks.report import Report
from benchmarks.table import Table, spread


@dataclass(frozen=True)
class Plan:
    """How much to run."""

    shape: Shape = TEN_MILLION
    weights: tuple[str, ...] = ("float32", "bfloat16")
    concurrency: tuple[int, ...] = (1, 8, 32)
    prompt_tokens: int = 16
    new_tokens: int = 8
    repetitions: int = 3


def measure(plan: Plan, folder: Path, weights: str, table: Table, *, native: bool) -> None:
    """Add a row for each number of prompts at once, with steps in C (`native`) or in torch."""
    plain = Sluice(folder, weights, threads=1, native=native)
    steady = Sluice(folder, weights, threads=1, native=native, deterministic=True)
    for concurrency in plan.concurrency:
        figures: list[tuple[float, float]] = []
        for repetition in range(-1, plan.repetitions):  # the first one warms up
            prompts = make_prompts(concurrency, plan.prompt_tokens, seed=repetition + 1000)
            speeds = []
            for engine in (plain, steady):
                began_at = time.process_time()
                output = engine.generate(prompts, plan.new_tokens)
                speeds.append(output.num_tokens / (time.process_time() - began_at))
            if repetition >= 0:
                figures.append((speeds[0], speeds[1]))
        table.rows.append(
            (
                "C" if native else "torch",
                weights,
                str(concurrency),
                spread([without for without, _ in figures], 0),
                spread([with_it for _, with_it in figures], 0),
                spread([with_it / without for without, with_it in figures], 2),
            )
        )
    plain.close()
    steady.close()


def report(plan: Plan) -> Report:
    """Run, and write it up."""
    load = os.getloadavg()[0]
    torch.set_num_threads(1)
    columns = ("without: tokens/CPU s", "--deterministic: tokens/CPU s", "ratio")
    table = Table(("Steps in", "Weights", "At once", *columns), labels=3)
    with tempfile.TemporaryDirectory() as folder:
        write_random_llama(Path(folder), plan.shape)
        for native, weights in itertools.product((True, False), plan.weights):
            measure(plan, Path(folder), weights, table, native=native)
    introduction = (
        f"The engine with and without --deterministic on the {plan.shape}: {plan.prompt_tokens} prompt tokens, "
        f"{plan.new_tokens} new ones, prefill included; one torch thread, CPU time, {plan.repetitions} repetitions in "
        "turns: median (lowest–highest). Steps in C, which serve on a CPU with a compiler, are equal for any batch by "
        "themselves; in torch "
        "a step of one sequence computes eight rows for its one, and attention goes token by token in prefill too."
    )
    return Report("Determinism", (introduction, str(table)), load)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument("--keep", type=Path, help="Markdown file that keeps the result")
    given = parser.parse_args()
    quick = Plan(weights=("float32",), concurrency=(1, 2), new_tokens=2, repetitions=1)
    result = report(quick if given.quick else Plan())
    print(result)
    if given.keep is not None:
        result.keep(given.keep)


if __name__ == "__main__":
    main()
