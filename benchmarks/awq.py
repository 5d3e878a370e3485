"""What 4-bit AWQ weights cost on a CPU beside the same values dense, in bfloat16 and on one thread.

`python -m benchmarks.awq` has two parts. The first times one layer's product by itself, by shape and number of rows:
torch's product of 4-bit weights, which the worker's steps in torch use up to MAX_INT4_ROWS rows (model/awq_cpu.py);
unpacking them and an ordinary product, which they use beyond; and the ordinary product of dense weights. Layers of one
shape take turns until they hold more than a processor's caches, as a model's do; the figures are CPU time.

The second part generates with a whole model, one text at a time: AWQ and dense, each with steps in C and in torch. The
models are Llamas of random weights, one that the caches nearly hold and one that they do not, rounded to the nearest
codes in groups of 128 (rounded_awq.py). Contenders take turns within a repetition, and all tokens are checked against a
float32 forward pass.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from benchmarks.answer_check import AnswerCheck
from benchmarks.engine import Plan as Run
from benchmarks.engine import Repetition, measure
from benchmarks.generators import Generator, Sluice
from benchmarks.random_llama import TEN_MILLION, Shape, write_random_llama
from benchmarks.report import Report
from benchmarks.rounded_awq import write_awq
from benchmarks.table import Table, spread
from inference_worker.model import awq_cpu
from inference_worker.model.awq_cpu import CpuWeights
from inference_worker.model.awq_layout import AwqWeights

MODELS: Final = {
    "10M": TEN_MILLION,
    "220M": Shape(hidden=2048, intermediate=5632, layers=4, heads=16, kv_heads=8),
}
CONTENDERS: Final = ("AWQ, in C", "AWQ, in torch", "dense, in C", "dense, in torch")
_GROUP_SIZE: Final = 128
_MOST_BYTES: Final = 64 << 20  # of dense layers in turns: more than caches hold
_MOST_LAYERS: Final = 16


@dataclass(frozen=True)
class Plan:
    """How much to run."""

    shapes: tuple[tuple[int, int], ...] = ((256, 1536), (2048, 2048), (4096, 4096))  # in, out
    rows: tuple[int, ...] = (1, 4, 16, 32, 64, 128, 192, 256)
    rounds: int = 3  # of one shape and number of rows
    models: tuple[str, ...] = tuple(MODELS)
    new_tokens: int = 48
    repetitions: int = 3


@dataclass(frozen=True)
class Layers:
    """Layers of one shape, packed and dense."""

    packed: list[CpuWeights]
    dense: list[torch.Tensor]

    @classmethod
    def make(cls, num_in: int, num_out: int) -> Layers:
        """Random ones."""
        count = max(1, min(_MOST_LAYERS, _MOST_BYTES // (2 * num_in * num_out)))
        packed, dense = [], []
        for _ in range(count):
            codes = torch.randint(16, (num_out, num_in), dtype=torch.uint8)
            zeros = torch.randint(16, (num_in // _GROUP_SIZE, num_out), dtype=torch.uint8)
            weights = AwqWeights(codes, zeros, (torch.rand(zeros.shape) * 0.01).half())
            packed.append(CpuWeights.pack(weights, torch.bfloat16))
            dense.append(weights.dequantize(torch.bfloat16))
        return cls(packed, dense)

    def seconds(self, rows: int, rounds: int) -> tuple[float, float, float]:
        """CPU time of a layer's product with 4-bit, with unpacked and with dense weights: the median round."""
        x = torch.randn(rows, self.dense[0].shape[1]).bfloat16()
        kinds: tuple[Callable[[], object], ...] = (
            lambda: [weights.multiply(x) for weights in self.packed],
            lambda: [weights.multiply(x) for weights in self.packed],
            lambda: [torch.nn.functional.linear(x, weight) for weight in self.dense],
        )
        found: list[list[float]] = [[], [], []]
        for _ in range(rounds + 1):
            for kind, most_rows, seconds in zip(kinds, (rows, 0, 0), found, strict=True):
                with _int4_up_to(most_rows):
                    began_at = time.thread_time()
                    kind()
                    seconds.append((time.thread_time() - began_at) / len(self.dense))
        # the first round warms up
        int4, unpacked, dense = (statistics.median(seconds[1:]) for seconds in found)
        return int4, unpacked, dense


@contextmanager
def _int4_up_to(rows: int) -> Iterator[None]:
    before = awq_cpu.MAX_INT4_ROWS
    awq_cpu.MAX_INT4_ROWS = rows  # type: ignore[misc]
    try:
        yield
    finally:
        awq_cpu.MAX_INT4_ROWS = before  # type: ignore[misc]


@torch.inference_mode()
def products(plan: Plan) -> Table:
    """A row for each shape and number of rows."""
    columns = ("4-bit ms", "unpacked ms", "dense ms", "unpacked ÷ 4-bit", "dense ÷ 4-bit")
    table = Table(("Inputs x outputs", "Rows", *columns), labels=2)
    for num_in, num_out in plan.shapes:
        layers = Layers.make(num_in, num_out)
        for rows in plan.rows:
            int4, unpacked, dense = layers.seconds(rows, plan.rounds)
            times = (f"{1e3 * seconds:.3f}" for seconds in (int4, unpacked, dense))
            ratios = (f"{unpacked / int4:.2f}", f"{dense / int4:.2f}")
            table.rows.append((f"{num_in} x {num_out}", str(rows), *times, *ratios))
    return table


@contextmanager
def contest(shape: Shape) -> Iterator[tuple[list[Generator], AnswerCheck]]:
    """The contenders, loaded, and what checks them."""
    loaded: list[Generator] = []
    with tempfile.TemporaryDirectory() as scratch:
        source, packed, dense = (Path(scratch, name) for name in ("source", "awq", "dense"))
        write_random_llama(source, shape)
        write_awq(source, packed, dense)
        check = AnswerCheck(dense, "awq")
        try:
            for name in CONTENDERS:
                folder = packed if name.startswith("AWQ") else dense
                native = name.endswith("C")
                loaded.append(Sluice(folder, "bfloat16", threads=1, native=native, name=name))
            yield loaded, check
        finally:
            for generator in loaded:
                generator.close()


def whole_models(plan: Plan) -> Table:
    """Four rows a model. Raises: WrongAnswer, GenerationFailed."""
    columns = ("Tokens/s", "Tokens/CPU s", "AWQ in C ÷ this", "by CPU time")
    table = Table(("Model", "Weights, steps", *columns), labels=2)
    run = Run(prompt_tokens=16, new_tokens=plan.new_tokens, repetitions=plan.repetitions)
    for model in plan.models:
        with contest(MODELS[model]) as (contenders, check):
            _add_rows(table, model, measure(run, contenders, check, concurrency=1))
    return table


def _add_rows(table: Table, model: str, repetitions: Sequence[Repetition]) -> None:
    ours = [repetition[CONTENDERS[0]] for repetition in repetitions]
    for name in CONTENDERS:
        found = [repetition[name] for repetition in repetitions]
        pairs = list(zip(ours, found, strict=True))
        ratios = (
            spread([a.tokens_per_second / b.tokens_per_second for a, b in pairs], 2),
            spread([a.tokens_per_cpu_second / b.tokens_per_cpu_second for a, b in pairs], 2),
        )
        table.rows.append(
            (
                model,
                name,
                spread([m.tokens_per_second for m in found], 1),
                spread([m.tokens_per_cpu_second for m in found], 1),
                *(("", "") if name == CONTENDERS[0] else ratios),
            )
        )


def report(plan: Plan) -> Report:
    """Run, and write it up."""
    load = os.getloadavg()[0]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    models = "; ".join(f"{name}: {MODELS[name]}" for name in plan.models)
    paragraphs = (
        f"bfloat16, groups of {_GROUP_SIZE}, one thread. One layer's product, CPU time, the median of {plan.rounds}:",
        str(products(plan)),
        f"One text at a time: a prompt of 16 tokens and {plan.new_tokens} new ones; {plan.repetitions} repetitions: "
        "median (lowest–highest). The last columns say how many times the tokens AWQ made in C within the same "
        f"repetition. Expected: at least 1.4 times those of dense weights. {models}.",
        str(whole_models(plan)),
    )
    return Report("AWQ", paragraphs, load)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    plan = Plan()
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=plan.models)
    parser.add_argument("--new-tokens", type=int, default=plan.new_tokens)
    parser.add_argument("--repetitions", type=int, default=plan.repetitions)
    parser.add_argument("--keep", type=Path, help="Markdown file that keeps the result")
    given = parser.parse_args()
    plan = Plan(
        models=tuple(given.models),
        new_tokens=given.new_tokens,
        repetitions=given.repetitions,
    )
    if given.quick:
        plan = Plan(((256, 128),), (1, 3), 1, ("10M",), new_tokens=4, repetitions=1)
    result = report(plan)
    print(result)
    if given.keep is not None:
        result.keep(given.keep)


if __name__ == "__main__":
    main()
