"""How fast Sluice streams beside llama.cpp's own server: the same weights, the same load, through HTTP.

`python -m benchmarks.llama_cpp_server --server llama-server` writes the Llama of 10 million random parameters once as
a checkpoint and once as GGUF (float32, which needs the package `gguf`), starts a worker and an edge for the one and
the server for the other, gives each as many threads (`--threads 2`), and lets them take turns: a repetition is one
measurement of each with the same prompts, and ratios are taken within it. All run at the same time, but only one has
requests. Who begins changes from repetition to repetition.

llama.cpp is given a slot for each reader and a cache of float32, and keeps no prompts for later: none comes twice.

The CPU time of a token is that of all processes of a server, prompts included. The server's program comes from
llama.cpp's sources: `cmake -B build && cmake --build build --target llama-server`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import httpx
import uvloop

from benchmarks.gguf_checkpoint import write_gguf
from benchmarks.processes import Process, StartFailed, running_edge, running_worker
from benchmarks.random_llama import TEN_MILLION, write_random_llama
from benchmarks.report import Report
from benchmarks.serving_load import Load, Measurement, NoServer, Plan, Sender, first_model
from benchmarks.sse_client import Endpoint
from benchmarks.table import Table, spread

SLUICE, LLAMA_CPP = "Sluice", "llama.cpp's server"
_CONTEXT: Final = 512  # tokens of a slot
_START_SECONDS: Final = 60.0
_POLL_SECONDS: Final = 0.1
_HTTP_OK: Final = 200


@dataclass(frozen=True)
class Contender:
    """A running server."""

    name: str
    url: str
    cpu_seconds: Callable[[], float]  # of all its processes


@dataclass(frozen=True)
class Turn:
    """One contender, one repetition."""

    measurement: Measurement
    cpu_seconds: float

    @property
    def cpu_ms_per_token(self) -> float:
        tokens = sum(answer.tokens for answer in self.measurement.good)
        return 1e3 * self.cpu_seconds / tokens if tokens else float("nan")


Repetition = dict[str, Turn]  # by contender


@contextlib.contextmanager
def sluice(folder: Path, threads: int) -> Iterator[Contender]:
    """A worker and an edge."""
    with (
        running_worker(
            "inference_worker", model=folder, dtype="float32", device="cpu", threads=threads
        ) as (worker, address),
        running_edge(address) as (edge, port),
    ):
        yield Contender(
            SLUICE,
            f"http://127.0.0.1:{port}/v1",
            lambda: worker.cpu_seconds() + edge.cpu_seconds(),
        )


@contextlib.contextmanager
def llama_cpp(server: Path, model: Path, threads: int, slots: int) -> Iterator[Contender]:
    """llama.cpp's server. Raises: StartFailed."""
    port = _free_port()
    flags: dict[str, object] = {
        "--model": model,
        "--port": port,
        "--threads": threads,
        "--threads-batch": threads,
        "--parallel": slots,
        "--ctx-size": slots * _CONTEXT,
        "--cache-type-k": "f32",
        "--cache-type-v": "f32",
        "--cache-ram": 0,
    }
    command = [str(server), *(str(part) for flag in flags.items() for part in flag)]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        with log.open("wb") as output:
            started = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
        process = Process(started, log)
        try:
            _await_health(started, port, log)
            yield Contender(LLAMA_CPP, f"http://127.0.0.1:{port}/v1", process.cpu_seconds)
        finally:
            process.stop()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _await_health(started: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and started.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"http://127.0.0.1:{port}/health").status_code == _HTTP_OK:
                return
        time.sleep(_POLL_SECONDS)
    raise StartFailed(f"{LLAMA_CPP} is not up; it says:\n{log.read_text()[-2000:]}")


async def run(plan: Plan, contenders: list[Contender]) -> dict[Load, list[Repetition]]:
    """Every load, in turns. Raises: NoServer."""
    senders = {
        each.name: Sender(plan, each.url, await first_model(Endpoint(each.url), None))
        for each in contenders
    }
    found: dict[Load, list[Repetition]] = {}
    for load in plan.loads:
        found[load] = []
        for number in range(plan.repetitions + 1):
            turn = number % len(contenders)
            repetition: Repetition = {}
            for each in [*contenders[turn:], *contenders[:turn]]:
                before = each.cpu_seconds()
                measurement = await senders[each.name].measure(load, number)
                repetition[each.name] = Turn(measurement, each.cpu_seconds() - before)
            if number > 0:  # the first round warms up
                found[load].append(repetition)
    return found


def table_of(found: dict[Load, list[Repetition]]) -> Table:
    """One row for each load and contender."""
    columns = ("Tokens/s", "Sluice ÷ this", "First token p50 ms", "Gap p50 ms", "p99 ms")
    table = Table(("Load", "Server", *columns, "CPU ms/token", "Failures"), labels=2)
    for load, repetitions in found.items():
        for name in (SLUICE, LLAMA_CPP):
            turns = [repetition[name] for repetition in repetitions]
            measured = [turn.measurement for turn in turns]
            ratios = [
                each[SLUICE].measurement.tokens_per_second
                / each[name].measurement.tokens_per_second
                for each in repetitions
            ]
            table.rows.append(
                (
                    str(load),
                    name,
                    spread([m.tokens_per_second for m in measured], 0),
                    "" if name == SLUICE else spread(ratios, 2),
                    spread([m.first_token_ms(50) for m in measured], 1),
                    spread([m.gap_ms(50) for m in measured], 2),
                    spread([m.gap_ms(99) for m in measured], 2),
                    spread([turn.cpu_ms_per_token for turn in turns], 2),
                    str(sum(m.failures.total() for m in measured)),
                )
            )
    return table


def report(plan: Plan, server: Path, threads: int) -> Report:
    """Start both, measure, and write it up. Raises: StartFailed, NoServer."""
    load = os.getloadavg()[0]
    gguf = importlib.import_module("gguf")
    slots = max(each.readers or 1 for each in plan.loads)
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        folder, model = Path(scratch, "model"), Path(scratch, "model.gguf")
        write_random_llama(folder)
        write_gguf(gguf, folder, model, "float32", has_tokenizer=True)
        contenders = [
            stack.enter_context(sluice(folder, threads)),
            stack.enter_context(llama_cpp(server, model, threads, slots)),
        ]
        found = uvloop.run(run(plan, contenders))
    introduction = (
        f"The {TEN_MILLION}, float32, through HTTP; {threads} thread(s) each; chat, at least {plan.requests} "
        f"requests a measurement, {plan.max_tokens} tokens each; {plan.repetitions} repetitions: median "
        f"(lowest–highest). {LLAMA_CPP} is {_version(server)}. Tokens are the servers' own count."
    )
    return Report("Serving beside llama.cpp", (introduction, str(table_of(found))), load)


def _version(server: Path) -> str:
    """What it says of itself, in one line."""
    result = subprocess.run([server, "--version"], capture_output=True, text=True, check=True)
    line = next(x for x in (result.stdout + result.stderr).splitlines() if "version" in x)
    return line.strip()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    plan = Plan(urls=(), loads=(), repetitions=5)
    add = parser.add_argument
    add("--server", type=Path, required=True, help="the program llama-server")
    add("--threads", type=int, default=2)
    add("--concurrency", type=int, nargs="+", default=(1, 8, 32))
    add("--requests", type=int, default=plan.requests, help="of one measurement, at least")
    add("--repetitions", type=int, default=plan.repetitions)
    add("--max-tokens", type=int, default=plan.max_tokens)
    add("--keep", type=Path, help="Markdown file that keeps the result")
    given = parser.parse_args()
    plan = replace(
        plan,
        loads=tuple(Load(readers=count) for count in given.concurrency),
        requests=given.requests,
        repetitions=given.repetitions,
        max_tokens=given.max_tokens,
        extra={"ignore_eos": True},
    )
    try:
        result = report(plan, given.server, given.threads)
    except ImportError as error:
        sys.exit(f"the package gguf writes the weights, and cannot be imported: {error}")
    except (StartFailed, NoServer) as error:
        sys.exit(str(error))
    print(result)
    if given.keep is not None:
        result.keep(given.keep)


if __name__ == "__main__":
    main()
