"""What it costs to bring a token from the engine to the client, beside a server that has no worker behind it.

`python -m benchmarks.transport` starts a worker, an edge and a bare server, and is itself their client. The worker is
the real one, around a scripted model whose every token is the time at which its step was computed. The bare server
(bare_server.py: uvicorn, httptools, uvloop, one raw ASGI send an event) sends the very streams again that the edge
sent just before: the same bytes, events and pace.

Three paces, each with 1, 32 and 256 chat streams:

- a step takes no time: how many tokens get through. Tokens share an event when their reader is behind, so events and
  tokens are counted apart, and an event of many tokens costs more than one of a single token.
- a step takes 2 ms, as with a fast model: what an event costs under load.
- a step takes 20 ms: what the path adds to a token's latency when it is not busy. All streams get their tokens at the
  same moment.

Latency is the time from the end of the model's step to the arrival of the whole event in the client, the engine's own
work on the token included; all processes read one clock.

Every stream is open, and has its first token, before a measurement begins; it ends with the last stream. CPU time is
the kernel's count for the whole process over that time, user and system, divided by the events that arrived in it.
Edge and bare server take turns; a figure is the median of the repetitions, the lowest and the highest behind it. Every
stream must arrive whole, with the number of tokens that was asked for.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import orjson
import uvloop

from benchmarks.load_client import Stream, StreamFailed, begun, ended, get, open_streams, post
from benchmarks.pace import Pace
from benchmarks.processes import Process, running, running_edge, running_worker
from benchmarks.recording import Write, read_writes
from benchmarks.report import Report
from benchmarks.stamp import MARK
from benchmarks.table import Table, percentile, spread
from inference_worker.default_model import CHECKPOINT

PERIODS: Final = (0.0, 0.002, 0.02)  # seconds between two tokens of a stream
_OPENING_SECONDS: Final = 0.05  # the same while streams open
_WORKER_CPU: Final = 3  # place among the figures
_BLOCKS: Final = 65_536
_BATCH_TOKENS: Final = 8192  # the prompts of all streams in one step


class TooShort(StreamFailed):
    """The streams had too few tokens to be open all at once."""


@dataclass(frozen=True)
class Plan:
    """What to run."""

    model: str
    streams: tuple[int, ...]
    repetitions: int
    seconds: float  # of one measurement, about
    warm_up_tokens: int = 100  # of a stream


@dataclass(frozen=True)
class Stack:
    """The processes, and where they listen."""

    worker: Process
    edge: Process
    edge_port: int
    bare: Process
    bare_port: int
    pace: Pace
    recording: Path


@dataclass(frozen=True)
class Measurement:
    """What one server did with all its streams, from the moment all were open."""

    events: int
    tokens: int
    seconds: float
    server_cpu_seconds: float
    worker_cpu_seconds: float
    latencies: list[float]  # seconds, one a token
    writes: list[list[Write]]  # of each stream, all that came from its beginning

    @property
    def events_per_second(self) -> float:
        return self.events / self.seconds

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def server_cpu(self) -> float:
        """µs an event."""
        return self.server_cpu_seconds / self.events * 1e6

    @property
    def worker_cpu(self) -> float:
        """µs an event."""
        return self.worker_cpu_seconds / self.events * 1e6

    def latency(self, share: float) -> float:
        """A percentile, in ms."""
        return percentile(self.latencies, share) * 1e3


Pair = tuple[Measurement, Measurement]  # through the edge, then from the bare server
Figure = Callable[[Measurement], float]


@contextlib.contextmanager
def running_stack(model: str, max_streams: int) -> Iterator[Stack]:
    """Worker, edge and bare server, ready."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        pace_file = folder / "pace"
        pace = Pace(pace_file)
        bare = stack.enter_context(running("benchmarks.bare_server", pace_file=pace_file))
        worker, address = stack.enter_context(
            running_worker(
                "benchmarks.stamped_model",
                model=model,
                pace_file=pace_file,
                max_running=max_streams,
                max_batch_tokens=_BATCH_TOKENS,
                blocks=_BLOCKS,
                context_length=10**6,
            )
        )
        edge, edge_port = stack.enter_context(running_edge(address))
        bare_port = bare.await_line("listening")["port"]
        yield Stack(worker, edge, edge_port, bare, bare_port, pace, folder / "recording")


def chat_request(max_tokens: int) -> bytes:
    """A streamed chat."""
    body: dict[str, object] = {
        "model": "default",
        "messages": [{"role": "user", "content": "What time is it?"}],
        "max_tokens": max_tokens,
        "stream": True,
    }
    return post("/v1/chat/completions", body)


async def measure_edge(stack: Stack, streams: int, max_tokens: int, period: float) -> Measurement:
    """Streams of so many tokens from the worker through the edge."""
    requests = [chat_request(max_tokens)] * streams
    measurement = await _measure(stack, stack.edge, stack.edge_port, requests, period)
    for writes in measurement.writes:
        tokens = sum(len(write.stamps()) for write in writes)
        if tokens != max_tokens:
            raise StreamFailed(f"{tokens} tokens came in place of {max_tokens}")
    return measurement


async def measure_bare(stack: Stack, like: Measurement, period: float) -> Measurement:
    """The streams of a measurement once more, from the bare server."""
    recording = [[write.data.decode() for write in writes] for writes in like.writes]
    stack.recording.write_bytes(orjson.dumps(recording))  # nothing else runs now
    load = await open_streams(
        stack.bare_port, [post("/recording", bytes(stack.recording))], b"HTTP/1.1 204 "
    )
    await begun(load)
    await ended(load)
    requests = [get(f"/streams/{index}") for index in range(len(recording))]
    measurement = await _measure(stack, stack.bare, stack.bare_port, requests, period)
    if _sizes(measurement) != _sizes(like):
        raise StreamFailed("the bare server sent something else than the edge")
    return measurement


def _sizes(measurement: Measurement) -> list[list[int]]:
    """Bytes of every event: alike but for the time they tell."""
    return [[len(write.data) for write in writes] for writes in measurement.writes]


async def _measure(
    stack: Stack, server: Process, port: int, requests: Sequence[bytes], period: float
) -> Measurement:
    stack.pace.seconds = _OPENING_SECONDS  # slow, so that no stream is far when the last one begins
    with _no_garbage_collection():
        streams = await open_streams(port, requests, MARK)
        await begun(streams)
        if any(stream.has_ended.done() for stream in streams):
            raise TooShort("a stream ended before all were open")
        began_at = time.monotonic_ns()
        server_cpu, worker_cpu = server.cpu_seconds(), stack.worker.cpu_seconds()
        stack.pace.seconds = period
        await ended(streams)
        seconds = (time.monotonic_ns() - began_at) / 1e9
        server_cpu = server.cpu_seconds() - server_cpu
        worker_cpu = stack.worker.cpu_seconds() - worker_cpu
    return _summary(streams, began_at, seconds, server_cpu, worker_cpu)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _summary(
    streams: Sequence[Stream],
    began_at: int,
    seconds: float,
    server_cpu_seconds: float,
    worker_cpu_seconds: float,
) -> Measurement:
    writes = [read_writes(stream.receipts) for stream in streams]
    counted = [write for of_stream in writes for write in of_stream if write.received_at > began_at]
    latencies = [
        (write.received_at - made_at) / 1e9 for write in counted for made_at in write.stamps()
    ]
    return Measurement(
        events=sum(write.events for write in counted),
        tokens=len(latencies),
        seconds=seconds,
        server_cpu_seconds=server_cpu_seconds,
        worker_cpu_seconds=worker_cpu_seconds,
        latencies=latencies,
        writes=writes,
    )


async def _pairs(stack: Stack, plan: Plan, streams: int, period: float) -> AsyncIterator[Pair]:
    """Measurements of edge and bare server in turn, after one of each that warms up and shows how fast tokens come."""
    max_tokens = plan.warm_up_tokens
    done = 0
    while done <= plan.repetitions:
        try:
            edge = await measure_edge(stack, streams, max_tokens, period)
        except TooShort:
            max_tokens *= 2
            continue
        bare = await measure_bare(stack, edge, period)
        if done > 0:
            yield edge, bare
        else:
            opening = max_tokens - edge.tokens // streams
            max_tokens = 2 * opening + round(edge.tokens_per_second / streams * plan.seconds)
        done += 1


async def run(plan: Plan) -> list[Table]:
    """A table for each pace."""
    costs = ("Events/s", "Tokens/s", "Server CPU µs/event", "Worker CPU µs/event")
    latencies = ("Latency p50 ms", "Latency p99 ms")
    tables = [Table(("Streams", "Server", *costs, *latencies), labels=2) for _ in PERIODS]
    with running_stack(plan.model, max(plan.streams)) as stack:
        for streams in plan.streams:
            for table, period in zip(tables, PERIODS, strict=True):
                _add_rows(
                    table, streams, [pair async for pair in _pairs(stack, plan, streams, period)]
                )
    return tables


def _add_rows(table: Table, streams: int, pairs: Sequence[Pair]) -> None:
    """Edge, bare server, and how many times the one the other is."""
    figures: list[tuple[Figure, int]] = [
        (lambda m: m.events_per_second, 0),
        (lambda m: m.tokens_per_second, 0),
        (lambda m: m.server_cpu, 1),
        (lambda m: m.worker_cpu, 1),
        (lambda m: m.latency(50), 2),
        (lambda m: m.latency(99), 2),
    ]
    edge, bare, ratio = [], [], []
    for index, (figure, digits) in enumerate(figures):
        edge.append(spread([figure(pair[0]) for pair in pairs], digits))
        if index == _WORKER_CPU:  # it takes no part in the bare server's streams
            bare.append("–")
            ratio.append("–")
            continue
        bare.append(spread([figure(pair[1]) for pair in pairs], digits))
        ratio.append(spread([figure(pair[0]) / figure(pair[1]) for pair in pairs], 2))
    table.rows.append((str(streams), "edge", *edge))
    table.rows.append((str(streams), "bare", *bare))
    table.rows.append((str(streams), "edge ÷ bare", *ratio))


def report(plan: Plan) -> Report:
    """Run, and write it up."""
    load = os.getloadavg()[0]
    tables = uvloop.run(run(plan))
    paragraphs = [
        f"Chat streams, {plan.repetitions} × about {plan.seconds:g} s: median (lowest–highest). An event is one "
        "server-sent event, and holds several tokens when its reader was behind. `bare` sends the same bytes again "
        "without a worker. Latency runs from the end of the model's step to the arrival of the event."
    ]
    for period, table in zip(PERIODS, tables, strict=True):
        step = f"A step takes {period * 1e3:g} ms" if period else "A step takes no time"
        paragraphs += [f"{step}:", str(table)]
    return Report("Transport", tuple(paragraphs), load)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument(
        "--model", default=str(CHECKPOINT), help="checkpoint whose tokenizer to use"
    )
    parser.add_argument("--streams", type=int, nargs="+", help="numbers of streams")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of one measurement, about")
    parser.add_argument("--keep", type=Path, help="Markdown file that keeps the result")
    given = parser.parse_args()
    plan = Plan(given.model, tuple(given.streams or (1, 32, 256)), given.repetitions, given.seconds)
    if given.quick:
        plan = Plan(given.model, tuple(given.streams or (1, 4)), 1, seconds=0.1, warm_up_tokens=10)
    result = report(plan)
    print(result)
    if given.keep is not None:
        result.keep(given.keep)


if __name__ == "__main__":
    main()
