"""Everything at once, for a long time: is anything lost, wrong or left over?

`python -m benchmarks.soak --minutes 30` starts an edge with two workers and is itself all of their clients: streams
read to the end, at once or slowly; streams left in the middle; streams that break off and are resumed; streams that are
aborted by name; Anthropic's messages; JSON of a schema; conversations over a WebSocket; useChat's answers, parked and
fetched again; bursts far beyond capacity; bad input. One worker is killed every minute, counted from the kill before,
by SIGKILL or, every third time, by SIGTERM, and started anew. Each text is compared with what one undisturbed worker
had given for the same request beforehand; a request may end in its right text, in a refusal that says so (429, or 4xx
for bad input), or in nothing if its client left. A kill harms no request that is read, for the first time or again. Two
endings cannot be helped, and are told apart from any other by the moment of the kill: a stream that nobody read when
its worker died, and one whose reader broke off with events on their way to it that came before the kill.

Memory, tasks and descriptors are read while nothing runs: after a first minute of the same traffic, and after the
last. The exit status is 1 if a request failed or something is left over: a task, a descriptor, a block of the KV cache,
or more memory than what a process may grow by.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc.aio
import httpx
import psutil
import uvloop

from benchmarks.load_watch import LoadWatch
from benchmarks.processes import Process, running, running_edge
from benchmarks.report import Report
from benchmarks.soak_known import Knowledge, ask_beforehand
from benchmarks.soak_losses import Losses
from benchmarks.soak_tally import Tally
from benchmarks.soak_traffic import Client
from benchmarks.table import Table
from protos.sluice.v1 import generation_pb2 as pb
from protos.sluice.v1 import generation_pb2_grpc as pb_grpc

_WHAT: Final = (
    "An edge and two workers with the embedded model; one worker is killed and started again now and then. What every"
    " client did, and how its requests ended; then what the lasting processes held while nothing ran, before and after."
)
_MIB: Final = 2**20
_DESCRIPTOR_READINGS: Final = 20
_READING_SECONDS: Final = 0.1
_MOST_GROWTH_MIB: Final = 32.0  # of a lasting process, whatever the number of requests
_SEED: Final = 11
_SETTLE_SECONDS: Final = 8.0  # for tasks that clean up
_WORKER: Final[dict[str, object]] = {
    "max_running": 8,
    "max_waiting": 16,
    "deterministic": True,  # or a batch could change a logit's last bits, and, rarely, a token
    "threads": 1,
    "kv_cache_mib": 64,
    "drain_seconds": 5,
    "send_timeout_seconds": 30,
}
# On a machine that is busy with other things a client or a worker may stand still for some seconds: that is no failure.
_EDGE: Final[dict[str, object]] = {
    "resume_window_seconds": 20,
    "send_timeout_seconds": 30,
    "failover_seconds": 60,
}
CLIENTS: Final = {
    "read": 4,
    "read slowly": 2,
    "leave": 4,
    "resume": 3,
    "abort": 2,
    "messages": 2,
    "constrain": 2,
    "talk by socket": 2,
    "chat": 3,
    "burst": 1,
    "err": 1,
}


class Restarted:
    """A worker that is killed now and then, and comes back at the same address."""

    def __init__(self, port: int, stack: ExitStack) -> None:
        self._port = port
        self._stack = stack
        self._process = self._start()
        self.kills = 0
        self.losses = Losses()

    async def kill_every(self, seconds: float, until: asyncio.Event) -> None:
        """Kill it so often and start it again, until told to stop; at once if a start took longer than that."""
        due = time.monotonic() + seconds
        while not await _is_set_within(until, max(0.0, due - time.monotonic())):
            due = time.monotonic() + seconds
            self.kills += 1
            gently = self.kills % 3 == 0
            end = self._process.end
            with self.losses.one():
                await asyncio.to_thread(end, signal.SIGTERM if gently else signal.SIGKILL)
            self._process = await asyncio.to_thread(self._start)

    def _start(self) -> Process:
        process = self._stack.enter_context(
            running("inference_worker", host="127.0.0.1", port=self._port, **_WORKER)
        )
        process.await_line("ready")
        return process


@dataclass(frozen=True)
class Subject:
    """A process that lives as long as the soak, and where it tells of itself."""

    name: str
    process: Process
    metrics_url: str

    async def state(self) -> State:
        """What it holds now."""
        async with httpx.AsyncClient(timeout=10, trust_env=False) as http:
            text = (await http.get(self.metrics_url)).text
        tasks = re.search(r"^sluice_tasks (\S+)$", text, re.MULTILINE)
        assert tasks is not None
        found = psutil.Process(self.process.pid)
        descriptors = found.num_fds()
        for _ in range(_DESCRIPTOR_READINGS):  # the connection of just now is still one, or not
            await asyncio.sleep(_READING_SECONDS)
            descriptors = min(descriptors, found.num_fds())
        return State(found.memory_info().rss / _MIB, descriptors, int(float(tasks[1])))


@dataclass(frozen=True)
class State:
    """What a process holds while nothing runs."""

    resident_mib: float
    descriptors: int
    tasks: int

    def row(self, name: str, end: State) -> list[str]:
        """A table's row: this one at the beginning, another one at the end."""
        return [
            name,
            f"{self.resident_mib:,.0f}",
            f"{end.resident_mib:,.0f}",
            f"{end.tasks - self.tasks:+d}",
            f"{end.descriptors - self.descriptors:+d}",
        ]

    def is_left_over(self, end: State) -> bool:
        """Whether there is more of what must not grow, or too much more memory."""
        return (
            end.tasks > self.tasks
            or end.descriptors > self.descriptors
            or end.resident_mib > self.resident_mib + _MOST_GROWTH_MIB
        )


class Soak:
    """The processes, their clients, and the figures."""

    def __init__(
        self,
        subjects: Sequence[Subject],
        restarted: Restarted,
        workers: Sequence[pb_grpc.GenerationServiceAsyncStub],
        port: int,
    ) -> None:
        self._subjects = subjects
        self._restarted = restarted
        self._workers = workers
        self._port = port
        self.tally = Tally()
        self.has_passed = False

    async def run(self, seconds: float, warm_up_seconds: float, kill_seconds: float) -> Report:
        """Traffic for so long after a warm-up, with kills. Raises: TimeoutError, if the workers do not come to rest."""
        load = os.getloadavg()[0]
        known = await ask_beforehand(self._workers[0])
        await self._traffic(known, warm_up_seconds, kill_seconds)
        begin = await self._states()
        before = self._restarted.kills
        self.tally.clear()
        await self._traffic(known, seconds, kill_seconds)
        end = await self._states()
        leaked_blocks = await self._count_held_blocks()
        kills = self._restarted.kills - before
        states = Table(["process", "MiB before", "MiB after", "tasks", "descriptors"], labels=1)
        states.rows += [
            first.row(subject.name, last)
            for subject, first, last in zip(self._subjects, begin, end, strict=True)
        ]
        self.has_passed = (
            not self.tally.failures
            and not leaked_blocks
            and not any(a.is_left_over(b) for a, b in zip(begin, end, strict=True))
        )
        summary = (
            f"{seconds / 60:,.1f} minutes, {kills} kills of a worker, {self.tally.requests:,} requests,"
            f" {self.tally.failures.total():,} failures, {leaked_blocks} leaked blocks."
            f" A process may grow by {_MOST_GROWTH_MIB:g} MiB."
        )
        parts = [_WHAT, summary, str(self.tally.table()), str(states)]
        if self.tally.details:
            parts.append("\n".join(f"- {detail}" for detail in self.tally.details))
        return Report("Soak", tuple(parts), load)

    async def _traffic(self, known: Knowledge, seconds: float, kill_seconds: float) -> None:
        until = asyncio.Event()
        seeds = itertools.count(_SEED)
        async with asyncio.TaskGroup() as group:
            for action, number in CLIENTS.items():
                for _ in range(number):
                    client = Client(
                        self._port, known, self.tally, self._restarted.losses, next(seeds)
                    )
                    group.create_task(client.run(action, until))
            group.create_task(self._restarted.kill_every(kill_seconds, until))
            await asyncio.sleep(seconds)
            until.set()

    async def _states(self) -> list[State]:
        for worker in self._workers:
            await LoadWatch(worker).until(lambda load: load.requests == 0)
        await asyncio.sleep(_SETTLE_SECONDS)
        return [await subject.state() for subject in self._subjects]

    async def _count_held_blocks(self) -> int:
        loads = [await worker.GetLoad(pb.GetLoadRequest()) for worker in self._workers]
        return sum(load.total_blocks - load.free_blocks for load in loads)


@contextmanager
def running_soak() -> Iterator[Soak]:
    """An edge and two workers, one of which is killed now and then."""
    with ExitStack() as stack:
        lasting = stack.enter_context(
            running("inference_worker", host="127.0.0.1", port=0, metrics_port=0, **_WORKER)
        )
        ready = lasting.await_line("ready")
        other_port = _free_port()
        restarted = Restarted(other_port, stack)
        addresses = [ready["address"], f"127.0.0.1:{other_port}"]
        edge, port = stack.enter_context(running_edge(",".join(addresses), **_EDGE))
        subjects = [
            Subject("edge", edge, f"http://127.0.0.1:{port}/metrics"),
            Subject("lasting worker", lasting, f"http://127.0.0.1:{ready['metrics_port']}/metrics"),
        ]
        stubs = [
            pb_grpc.GenerationServiceStub(grpc.aio.insecure_channel(address))
            for address in addresses
        ]
        yield Soak(subjects, restarted, stubs, port)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def _is_set_within(event: asyncio.Event, seconds: float) -> bool:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()


async def _soak(seconds: float, warm_up_seconds: float, kill_seconds: float) -> tuple[Report, bool]:
    with running_soak() as soak:
        report = await soak.run(seconds, warm_up_seconds, kill_seconds)
        return report, soak.has_passed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30, help="of traffic after the warm-up")
    parser.add_argument("--warm-up-minutes", type=float, default=1)
    parser.add_argument("--kill-seconds", type=float, default=60, help="between kills of a worker")
    parser.add_argument("--keep", type=Path, help="Markdown file that keeps the result")
    given = parser.parse_args()
    report, has_passed = uvloop.run(
        _soak(given.minutes * 60, given.warm_up_minutes * 60, given.kill_seconds)
    )
    print(report)
    if given.keep is not None:
        given.keep.parent.mkdir(parents=True, exist_ok=True)
        report.keep(given.keep)
    if not has_passed:
        sys.exit(1)


if __name__ == "__main__":
    main()
