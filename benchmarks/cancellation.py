"""How soon a client's memory is free once it has gone away, beside the time of one engine step.

`python -m benchmarks.cancellation` starts a worker and an edge, and is itself their clients: raw HTTP connections
that are closed in the middle of a stream. A client's time runs from its close() to the answer of the first GetLoad
that no longer counts its sequence; nothing is subtracted. GetLoad is asked again as soon as it has answered, and the
time between two answers, the resolution, stands in the table.

- queue: every slot is taken by a stream that stays; those that leave wait for one.
- prefill: the prompts of those that leave are being computed, and none of them has a token. Prompts are computed in
  order of arrival within the step's token budget, so of 200 clients one is being computed and the others wait for
  their turn behind it.
- decode: each of those that leave is receiving tokens.

They leave at an arbitrary moment of a step. Of many that leave at once, the first to close is taken for the first to
be gone, the second for the second, and so on. Where nobody stays, the last one is gone when all blocks are free; where
somebody stays, all blocks are free once these have left too. The time of a step is counted with GetLoad just before
they leave, in the same state, and includes the engine's own work.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

import grpc.aio
import uvloop

from benchmarks.load_client import Stream, begun, ended, open_streams, post
from benchmarks.load_watch import PATIENCE_SECONDS, LoadWatch, Measurement
from benchmarks.processes import running_edge, running_worker
from benchmarks.report import Report
from benchmarks.table import Table, percentile
from inference_worker.default_model import CHECKPOINT
from protos.sluice.v1 import generation_pb2 as pb
from protos.sluice.v1 import generation_pb2_grpc as pb_grpc

_STARTED: Final = b"event: started"
_DELTA: Final = b"event: delta"
_SETTLE_STEPS: Final = 8  # are timed before clients leave
_ATTEMPTS: Final = 5  # to find the worker in the wanted state
_SEED: Final = 7
_SCRIPT_CONTEXT: Final = 200_000
_RESERVE_MS: Final = 5  # beyond a step: the most that leaving should take


class Phase(Enum):
    """Where the sequences are when their clients leave."""

    QUEUE = "queue"
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True)
class Subject:
    """A worker to measure, and what its clients ask of it."""

    name: str
    module: str
    settings: dict[str, object]
    context_length: int  # tokens of prompt and completion together; every stream goes that far
    long_prompt: int  # tokens, many steps of prefill
    short_prompt: int = 16  # tokens


@dataclass(frozen=True)
class Scenario:
    """Who leaves, and who stays."""

    phase: Phase
    leaving: int
    repetitions: int
    staying: int = 0

    @property
    def max_running(self) -> int:
        """The worker's slots: none for those that queue, one for everybody else."""
        return self.staying if self.phase is Phase.QUEUE else self.leaving + self.staying


class WrongState(Exception):
    """The worker is not where the scenario wants it."""


class Bench:
    """A worker, its edge, and the scenarios on them."""

    def __init__(self, subject: Subject, port: int, watch: LoadWatch, vocabulary_size: int) -> None:
        self._subject = subject
        self._port = port
        self._watch = watch
        self._vocabulary_size = vocabulary_size
        self._random = random.Random(_SEED)

    async def run(self, scenario: Scenario) -> Measurement:
        """All repetitions of a scenario, after one to warm up."""
        await self._repeat(scenario, Measurement())
        measurement = Measurement()
        for _ in range(scenario.repetitions):
            await self._repeat(scenario, measurement)
        return measurement

    async def _repeat(self, scenario: Scenario, measurement: Measurement) -> None:
        for _ in range(_ATTEMPTS):
            stayers = await self._open(scenario.staying, _DELTA)
            leavers = await self._open_leavers(scenario)
            try:
                await self._settle(scenario, measurement)
                await self._leave(scenario, leavers, measurement)
            except WrongState:
                continue
            else:
                return
            finally:
                await self._clear([*stayers, *leavers])
        raise WrongState(f"{scenario} cannot be brought about")

    async def _open_leavers(self, scenario: Scenario) -> list[Stream]:
        match scenario.phase:
            case Phase.QUEUE:
                return await self._open(scenario.leaving, _STARTED)
            case Phase.PREFILL:
                # the first one's prompt is long enough for all others to come in behind it
                first = await self._open(1, _STARTED, self._subject.long_prompt)
                return first + await self._open(scenario.leaving - 1, _STARTED)
            case Phase.DECODE:
                return await self._open(scenario.leaving, _DELTA)

    async def _open(
        self, number: int, awaited: bytes, prompt_tokens: int | None = None
    ) -> list[Stream]:
        length = prompt_tokens or self._subject.short_prompt
        requests = [self._request(length) for _ in range(number)]
        streams = await open_streams(self._port, requests, awaited)
        await begun(streams)
        return streams

    def _request(self, prompt_tokens: int) -> bytes:
        """A stream with a prompt that nobody had before, so that no prefix of it is cached."""
        prompt = self._random.choices(range(self._vocabulary_size), k=prompt_tokens)
        body: dict[str, object] = {
            "token_ids": prompt,
            "max_tokens": self._subject.context_length - prompt_tokens,
            "ignore_eos": True,
        }
        return post("/v1/streams", body)

    async def _settle(self, scenario: Scenario, measurement: Measurement) -> None:
        """Time some steps, up to a random moment. Raises: WrongState."""
        steps = _SETTLE_STEPS + self._random.random()
        before, load = await self._watch.time_steps(measurement, steps)
        inside = load.running + load.waiting
        is_right = inside == scenario.leaving + scenario.staying
        match scenario.phase:
            case Phase.QUEUE:
                is_right &= load.waiting == scenario.leaving
            case Phase.PREFILL:
                is_right &= load.generated_tokens == before.generated_tokens and load.running > 0
            case Phase.DECODE:
                is_right &= load.waiting == 0
        if not is_right:
            raise WrongState

    async def _leave(
        self, scenario: Scenario, leavers: Sequence[Stream], measurement: Measurement
    ) -> None:
        """Close the connections and watch the sequences go."""
        closed_at = []
        for stream in leavers:
            closed_at.append(time.monotonic())
            stream.close()
        await asyncio.sleep(0)  # the event loop closes them
        gone_at: list[float] = []
        last_at = closed_at[-1]
        async with asyncio.timeout(PATIENCE_SECONDS):
            while len(gone_at) < scenario.leaving:
                at, load = await self._watch.now()
                measurement.resolutions.append(at - last_at)
                last_at = at
                left = load.running + load.waiting - scenario.staying
                if left == 0 and not scenario.staying and load.free_blocks < load.total_blocks:
                    left = 1
                gone_at += [at] * (scenario.leaving - left - len(gone_at))
        measurement.durations += [
            gone - closed for closed, gone in zip(closed_at, gone_at, strict=True)
        ]

    async def _clear(self, streams: Sequence[Stream]) -> None:
        """Everybody leaves, and all blocks are free. Raises: TimeoutError, if not."""
        for stream in streams:
            stream.close()
        await ended(streams)
        await self._watch.until(
            lambda load: load.requests == 0 and load.free_blocks == load.total_blocks
        )


@contextlib.asynccontextmanager
async def running_bench(subject: Subject, max_running: int) -> AsyncIterator[Bench]:
    """Worker and edge, ready."""
    settings = {"max_running": max_running, "max_waiting": 256} | subject.settings
    settings["max_batch_tokens"] = max(max_running, int(str(settings["max_batch_tokens"])))
    with (
        running_worker(subject.module, **settings) as (_, address),
        running_edge(address) as (_, port),
    ):
        async with grpc.aio.insecure_channel(address) as channel:
            stub: pb_grpc.GenerationServiceAsyncStub = pb_grpc.GenerationServiceStub(channel)
            model = await stub.GetModel(pb.GetModelRequest())
            yield Bench(subject, port, LoadWatch(stub), model.vocabulary_size)


def script(model: str, step_milliseconds: float) -> Subject:
    """The scripted model: nothing but the pipeline, at a step of known length."""
    settings: dict[str, object] = {
        "model": model,
        "step_milliseconds": step_milliseconds,
        "max_batch_tokens": 256,
        "context_length": _SCRIPT_CONTEXT,
        "blocks": 32_768,
    }
    return Subject(
        f"script, {step_milliseconds:g} ms",
        "inference_worker.scripted_model",
        settings,
        context_length=_SCRIPT_CONTEXT,
        long_prompt=30_000,
    )


def embedded() -> Subject:
    """The embedded model on this machine's CPU."""
    return Subject(
        "embedded model",
        "inference_worker",
        {"max_batch_tokens": 16, "kv_cache_mib": 256},
        context_length=2048,
        long_prompt=1900,
    )


def _by_max_running(scenarios: Sequence[Scenario]) -> list[list[Scenario]]:
    """Scenarios that can share a worker."""
    ordered = sorted(scenarios, key=lambda scenario: scenario.max_running)
    return [list(group) for _, group in itertools.groupby(ordered, lambda s: s.max_running)]


async def run(plan: Sequence[tuple[Subject, Sequence[Scenario]]]) -> Table:
    """The table of all scenarios."""
    who = ("Worker", "Phase", "Leave", "Stay", "Samples")
    times = ("p50 ms", "p99 ms", "Step ms", "p99 − step ms")
    table = Table((*who, *times, "Resolution p50 ms", "p99 ms", "Step p99 ms"), labels=2)
    for subject, scenarios in plan:
        measured: dict[Scenario, Measurement] = {}
        for group in _by_max_running(scenarios):
            async with running_bench(subject, group[0].max_running) as bench:
                for scenario in group:
                    measured[scenario] = await bench.run(scenario)
        for scenario in scenarios:
            table.rows.append(_row(subject, scenario, measured[scenario]))
    return table


def _row(subject: Subject, scenario: Scenario, measurement: Measurement) -> list[str]:
    durations = [seconds * 1e3 for seconds in measurement.durations]
    resolutions = [seconds * 1e3 for seconds in measurement.resolutions]
    step, worst = measurement.step * 1e3, percentile(durations, 99)
    figures = (
        *(percentile(durations, 50), worst, step, worst - step),
        *(percentile(resolutions, 50), percentile(resolutions, 99)),
        percentile([seconds * 1e3 for seconds in measurement.steps], 99),
    )
    counts = (scenario.leaving, scenario.staying, len(durations))
    return [
        subject.name,
        scenario.phase.value,
        *map(str, counts),
        *(f"{figure:.1f}" for figure in figures),
    ]


def report(plan: Sequence[tuple[Subject, Sequence[Scenario]]]) -> Report:
    """Run, and write it up."""
    load = os.getloadavg()[0]
    table = uvloop.run(run(plan))
    return Report(
        "Cancellation",
        (
            "From a client's close() to its sequence gone and its blocks free, as GetLoad tells it; `Resolution` is "
            "the time between two answers of GetLoad. `Step` is the mean and `Step p99` the 99th percentile of the "
            f"steps just before. Expected: p99 is at most {_RESERVE_MS} ms above a step. Of fewer than 100 samples, "
            "p99 is the highest.",
            str(table),
        ),
        load,
    )


def scenarios_of_one(repetitions: int) -> list[Scenario]:
    """Each phase with one client."""
    return [
        Scenario(Phase.QUEUE, 1, repetitions, staying=1),
        Scenario(Phase.PREFILL, 1, repetitions),
        Scenario(Phase.DECODE, 1, repetitions),
    ]


def scenarios_of_many(many: int, repetitions: int) -> list[Scenario]:
    """Each phase with many clients that leave at once, and one that leaves while many stay."""
    return [
        Scenario(Phase.QUEUE, many, repetitions, staying=1),
        Scenario(Phase.PREFILL, many, repetitions),
        Scenario(Phase.DECODE, many, repetitions),
        Scenario(Phase.DECODE, 1, repetitions, staying=many - 1),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument(
        "--model", default=str(CHECKPOINT), help="checkpoint whose tokenizer the script uses"
    )
    parser.add_argument(
        "--step-milliseconds", type=float, default=10, help="of the script, with one client"
    )
    parser.add_argument(
        "--step-milliseconds-of-many",
        type=float,
        default=50,
        help="with many, whose events else take all of two cores, as no model with such a batch would",
    )
    parser.add_argument("--many", type=int, default=200, help="clients that leave at once")
    parser.add_argument("--repetitions", type=int, default=100, help="with one client")
    parser.add_argument("--repetitions-of-many", type=int, default=12, help="with many clients")
    parser.add_argument("--keep", type=Path, help="Markdown file that keeps the result")
    given = parser.parse_args()
    of_one = script(given.model, given.step_milliseconds)
    of_many = script(given.model, given.step_milliseconds_of_many)
    if given.quick:
        plan = [(of_one, scenarios_of_one(2)), (of_many, scenarios_of_many(4, 2))]
    else:
        plan = [
            (of_one, scenarios_of_one(given.repetitions)),
            (of_many, scenarios_of_many(given.many, given.repetitions_of_many)),
            (embedded(), scenarios_of_one(given.repetitions)),
        ]
    result = report(plan)
    print(result)
    if given.keep is not None:
        result.keep(given.keep)


if __name__ == "__main__":
    main()
