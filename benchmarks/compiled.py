"""What torch.compile would make of a step, and what it costs to start with: the table behind steps in C.

`python -m benchmarks.compiled` takes the Llama of 10 million random parameters in float32 on one thread, and computes
decode steps of some rows (`--rows`) with its fused decoder: in torch as it is, compiled by torch.compile with nothing
cached, compiled with the artefacts of that (`torch.compiler.save_cache_artifacts`) loaded first, and in C. Each runs in
a process of its own, with an empty folder for what the compiler keeps on disk, and they take turns.

`Ready` is the time from the loaded model to the end of the first steps: one of each number of rows, at two lengths, so
that shapes are known to vary. `Step` is the CPU time of one step, without drawing tokens, while sequences grow. The
first steps' logits must be those of torch as it is; C's are checked when the worker loads it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.random_llama import TEN_MILLION, write_random_llama
from benchmarks.report import Report
from benchmarks.table import Table, spread
from inference_worker.model.batch import Span, pack
from inference_worker.model.forward import Forward
from inference_worker.model.loader import load_model
from inference_worker.model.runner import ModelRunner
from inference_worker.settings import WorkerSettings

EAGER, COLD, CACHED, IN_C = "torch", "torch.compile", "torch.compile, cached", "C"
KINDS: Final = (EAGER, COLD, CACHED, IN_C)
_ROWS: Final = (1, 8, 32)  # of a step
_LENGTHS: Final = (100, 130)  # tokens; steps grow from the first one
_TOLERANCE: Final = 1e-3
_KV_CACHE_MIB: Final = 128


@dataclass(frozen=True)
class Outcome:
    """One process."""

    ready_seconds: float
    artefact_mib: float  # 0 where there is none
    step_ms: dict[int, float]  # by rows, the median

    @classmethod
    def read(cls, line: str) -> Outcome:
        fields = json.loads(line)
        steps = {int(rows): ms for rows, ms in fields.pop("step_ms").items()}
        return cls(**fields, step_ms=steps)


def measure(kind: str, folder: Path, artefact: Path, sizes: Sequence[int], steps: int) -> Outcome:
    """In this process, which has compiled nothing yet. Raises: ValueError, if the logits are not torch's."""
    settings = WorkerSettings(
        model=str(folder),
        dtype="float32",
        threads=1,
        kv_cache_mib=_KV_CACHE_MIB,
        device="cpu",
        native=kind == IN_C,
    )
    runner: Any = load_model(settings).runner
    eager: Forward = runner._forward
    forward: Forward = eager
    expected = _first_logits(eager, runner, sizes)
    began_at = time.perf_counter()
    if kind in (COLD, CACHED):
        if kind == CACHED:
            torch.compiler.load_cache_artifacts(artefact.read_bytes())
        forward = torch.compile(eager, dynamic=True)
    first = _first_logits(forward, runner, sizes)
    ready_seconds = time.perf_counter() - began_at
    if any((a - b).abs().max() > _TOLERANCE for a, b in zip(first, expected, strict=True)):
        raise ValueError(f"{kind} computes something else")
    if kind == COLD and (made := torch.compiler.save_cache_artifacts()) is not None:
        artefact.write_bytes(made[0])
    medians = {
        rows: 1e3
        * statistics.median(_step(forward, runner, rows, _LENGTHS[0] + i)[1] for i in range(steps))
        for rows in sizes
    }
    size = artefact.stat().st_size / 2**20 if artefact.exists() and kind != IN_C else 0.0
    return Outcome(ready_seconds, size, medians)


def _first_logits(
    forward: Forward, runner: ModelRunner, sizes: Sequence[int]
) -> list[torch.Tensor]:
    """Of the same steps on an empty cache."""
    for tensor in (*runner.cache.keys.values(), *runner.cache.values.values()):
        tensor.zero_()
    return [_step(forward, runner, rows, at)[0] for rows in sizes for at in _LENGTHS]


@torch.inference_mode()
def _step(
    forward: Forward, runner: ModelRunner, rows: int, length: int
) -> tuple[torch.Tensor, float]:
    """Logits of one token of each row, all `length` tokens long, and the CPU seconds."""
    width = -(-length // runner.block_size)
    tables = [list(range(row * width, (row + 1) * width)) for row in range(rows)]
    ids = [[(7 * row + i) % TEN_MILLION.vocabulary for i in range(length)] for row in range(rows)]
    spans = [Span(x, length - 1, length, table) for x, table in zip(ids, tables, strict=True)]
    wanted = torch.arange(rows)
    began_at = time.thread_time()
    logits = forward(pack(spans, runner.cache), wanted)
    return logits, time.thread_time() - began_at


def run(
    folder: Path, repetitions: int, sizes: Sequence[int], steps: int
) -> dict[str, list[Outcome]]:
    """Every kind, in turns, each in a process of its own."""
    found: dict[str, list[Outcome]] = {kind: [] for kind in KINDS}
    for _ in range(repetitions):
        with tempfile.TemporaryDirectory() as scratch:
            artefact = Path(scratch, "artefact")
            for kind in KINDS:  # what is cached is made just before
                found[kind].append(_run_apart(kind, folder, artefact, sizes, steps))
    return found


def _run_apart(
    kind: str, folder: Path, artefact: Path, sizes: Sequence[int], steps: int
) -> Outcome:
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "benchmarks.compiled", "--alone", kind, str(folder)]
        result = subprocess.run(
            [*command, str(artefact), f"--steps={steps}", "--rows", *map(str, sizes)],
            env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return Outcome.read(result.stdout.splitlines()[-1])


def table_of(found: dict[str, list[Outcome]]) -> Table:
    """One row for each kind."""
    columns = [f"Step of {rows}, CPU ms" for rows in found[EAGER][0].step_ms]
    table = Table(("Decoder", "Ready s", "Artefact MiB", *columns), labels=1)
    for kind, outcomes in found.items():
        sizes = [x.artefact_mib for x in outcomes]
        table.rows.append(
            (
                kind,
                spread([x.ready_seconds for x in outcomes], 2),
                spread(sizes, 1) if any(sizes) else "",
                *(spread([x.step_ms[rows] for x in outcomes], 2) for rows in outcomes[0].step_ms),
            )
        )
    return table


def _paragraphs(found: dict[str, list[Outcome]], repetitions: int) -> Iterator[str]:
    yield (
        f"Decode steps of the {TEN_MILLION} in float32 on one thread, at {_LENGTHS[0]} tokens and more; {repetitions} "
        "repetitions, each in a process of its own: median (lowest–highest). `Ready` runs from the loaded model to the "
        "end of the first steps."
    )
    yield str(table_of(found))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--alone", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--rows", type=int, nargs="+", default=_ROWS, help="of steps (1 8 32)")
    parser.add_argument("--steps", type=int, default=100, help="of each number of rows (100)")
    parser.add_argument("--keep", type=Path, help="Markdown file that keeps the result")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if given.alone is not None:
        kind, folder, artefact = given.alone
        outcome = measure(kind, Path(folder), Path(artefact), given.rows, given.steps)
        print(json.dumps(vars(outcome)))
        return
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        write_random_llama(Path(folder))
        found = run(Path(folder), given.repetitions, given.rows, given.steps)
    report = Report("Compiled", tuple(_paragraphs(found, given.repetitions)), load)
    print(report)
    if given.keep is not None:
        report.keep(given.keep)


if __name__ == "__main__":
    main()
