"""What happens at ten times the capacity, beside a server whose queue has no end; and whether one key starves another.

`python -m benchmarks.overload` starts a worker around a scripted model, whose steps take the time of a GPU's and none
of the processor's, and an edge. First it measures the capacity: tokens a second with twice as many readers as slots,
each asking again once it is answered, from when all are there until the first goes. Then it offers ten times as many
requests as that, evenly, for a minute, on a connection each, whatever becomes of them. The peer is the same worker and
edge with every limit that a request or connection could meet out of reach: all that comes waits. Should that server
refuse one nevertheless, it is no peer, and the benchmark fails.

- Tokens/s: what the worker generated from the fifth second of the load to its end, as GetLoad counts it.
- First token and refusal: from the moment at which a request was due, so that a late client counts against the server.
  An accepted request has to wait for no more than the queue before it: `bound` is (waiting + running requests that
  there may be) ÷ the requests a second that the capacity is.
- Next request: one more when the load has ended, the accepted ones still waiting or running, and five after all have
  gone, beside five on the idle server before the load.
- Decision: from a request's arrival at the worker's service to its refusal there, as its log tells; and the time of a
  gRPC call of refused requests that go to the worker directly, five a second during the load.
- Longest queue: the most requests that waited at once, as GetLoad tells five times a second.
- Failed: told so by an event after the 200, where a refusal ought to have been a 429.
- Unanswered: accepted, but without a token when their client gave up, well after the load; like those that failed, they
  are in no percentile.
- Memory: resident, before the load, in its middle and at its end.

The fairness part is without the edge, at the worker whose queue has no end: a thousand requests of one key at once, and
half a second later one of another; with the keys told to the worker, and without.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc
import psutil
import uvloop

from benchmarks.load_watch import LoadWatch
from benchmarks.overload_client import Load
from benchmarks.overload_outcome import NEXT_SECONDS, Outcome, overload_tables
from benchmarks.processes import Process, running_edge, running_worker
from benchmarks.report import Report
from benchmarks.table import Table
from inference_worker.default_model import CHECKPOINT
from protos.sluice.v1 import generation_pb2 as pb
from protos.sluice.v1 import generation_pb2_grpc as pb_grpc

_UNBOUNDED: Final = 10**6
_NO_EDGE_LIMITS: Final[dict[str, float]] = {
    "max_connections": _UNBOUNDED,
    "max_connections_per_address": _UNBOUNDED,
    "request_timeout_seconds": 86_400,  # a queue of ten minutes is within it
}
_NO_WORKER_LIMITS: Final[dict[str, float]] = {
    "max_waiting": _UNBOUNDED,
    "max_waiting_tokens": 10**12,
    "max_waiting_kv": 1000,
    "max_calls": _UNBOUNDED,
    "max_streams": _UNBOUNDED,
}
_SPARE_FILES: Final = 256  # of the load's process, besides its connections
_PROBE_SECONDS: Final = 0.2
_FLOOD_LEAD_SECONDS: Final = 0.5


class PeerRefused(Exception):
    """The server without an end to its queue has one, or lost a request."""


@dataclass(frozen=True)
class Plan:
    """What is measured, and for how long."""

    model: str
    seconds: float = 60.0
    times_capacity: float = 10.0
    step_milliseconds: float = 20.0
    max_running: int = 16
    max_waiting: int = 32
    max_tokens: int = 64
    flood: int = 1000
    flood_tokens: int = 16

    @property
    def ramp_seconds(self) -> float:
        """After which slots and queue are full."""
        return min(5.0, self.seconds / 3)

    @property
    def most_requests_per_second(self) -> float:
        """That the slots can serve, were a step nothing but its time."""
        return self.max_running / (self.step_milliseconds / 1e3) / self.max_tokens

    def worker_settings(self, **limits: float) -> dict[str, object]:
        """Of a worker with these limits."""
        return {
            "model": self.model,
            "step_milliseconds": self.step_milliseconds,
            "max_running": self.max_running,
            "text": " one two three four",
            **limits,
        }


class Server:
    """A worker and an edge, and what a measurement asks of them."""

    def __init__(self, worker: Process, edge: Process, port: int, stub: Any) -> None:
        self.port = port
        self.stub: pb_grpc.GenerationServiceAsyncStub = stub
        self.watch = LoadWatch(self.stub)
        self.worker = worker
        self._memory = [psutil.Process(process.pid) for process in (worker, edge)]

    def memory(self) -> tuple[float, float]:
        """MB of worker and edge."""
        worker, edge = (process.memory_info().rss / 1e6 for process in self._memory)
        return worker, edge

    async def until_idle(self) -> None:
        """Wait until nothing is inside. Raises: TimeoutError."""
        await self.watch.until(lambda load: load.requests == 0)


@asynccontextmanager
async def serving(
    plan: Plan, worker_limits: dict[str, float], edge_limits: dict[str, float]
) -> AsyncIterator[Server]:
    """A server with these limits; the others are as by default."""
    settings = plan.worker_settings(**worker_limits)
    with (
        running_worker("inference_worker.scripted_model", **settings) as (worker, address),
        running_edge(address, **edge_limits) as (edge, port),
    ):
        async with grpc.aio.insecure_channel(address) as channel:
            yield Server(worker, edge, port, pb_grpc.GenerationServiceStub(channel))


async def measure(plan: Plan, name: str, server: Server, capacity: float) -> Outcome:
    """Offer too much to one server."""
    requests_per_second = capacity / plan.max_tokens
    bound = (plan.max_waiting + plan.max_running) / requests_per_second
    outcome = Outcome(name, capacity, bound)
    outcome.idle_before = await first_tokens(server)
    outcome.memory.append(server.memory())
    load = Load(server.port, plan.max_tokens)
    background = [
        asyncio.create_task(coroutine)
        for coroutine in (
            _count(plan, server, outcome),
            _probe(plan, server, outcome),
            _watch_queue(plan, server, outcome),
        )
    ]
    await load.offer(requests_per_second * plan.times_capacity, plan.seconds)
    await asyncio.gather(*background)
    outcome.memory.append(server.memory())
    outcome.next_one = await next_one(server)
    await load.settle(bound + 10)
    await server.until_idle()
    outcome.idle_after = await first_tokens(server)
    outcome.replies = load.replies
    outcome.decisions = [
        line["total_seconds"]
        for line in server.worker.lines("request")
        if line["status"] == "RESOURCE_EXHAUSTED"
    ]
    return outcome


async def _count(plan: Plan, server: Server, outcome: Outcome) -> None:
    """Tokens a second, and the memory in between."""
    await asyncio.sleep(plan.ramp_seconds)
    rest = plan.seconds - plan.ramp_seconds
    async with asyncio.TaskGroup() as group:
        counting = group.create_task(tokens_per_second(server, rest))
        await asyncio.sleep(rest / 2)
        outcome.memory.append(server.memory())
    outcome.tokens_per_second = counting.result()


async def _watch_queue(plan: Plan, server: Server, outcome: Outcome) -> None:
    """See how long the queue becomes."""
    end = time.perf_counter() + plan.seconds
    while time.perf_counter() < end:
        _, load = await server.watch.now()
        outcome.longest_queue = max(outcome.longest_queue, load.waiting)
        await asyncio.sleep(_PROBE_SECONDS)


async def tokens_per_second(server: Server, seconds: float) -> float:
    """What the worker generates in the next so many seconds."""
    began, before = await server.watch.now()
    await asyncio.sleep(seconds)
    ended, after = await server.watch.now()
    return (after.generated_tokens - before.generated_tokens) / (ended - began)


async def capacity_of(plan: Plan, server: Server) -> float:
    """Tokens a second while all slots are taken: neither the first readers' coming nor the last ones' going counts."""
    load = Load(server.port, plan.max_tokens)
    ramp, rest = plan.ramp_seconds / 2, plan.seconds / 3
    async with asyncio.TaskGroup() as group:
        group.create_task(load.saturate(2 * plan.max_running, ramp + rest))
        await asyncio.sleep(ramp)
        return await tokens_per_second(server, rest)


async def _probe(plan: Plan, server: Server, outcome: Outcome) -> None:
    """Time refusals without an edge in between."""
    await asyncio.sleep(plan.ramp_seconds)
    end = time.perf_counter() + plan.seconds - plan.ramp_seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        call = server.stub.Generate(_request(plan.max_tokens))
        try:
            await call.read()
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                outcome.probes.append(time.perf_counter() - began)
        finally:
            call.cancel()
        await asyncio.sleep(_PROBE_SECONDS)


def _request(max_tokens: int, key_id: str | None = None) -> pb.GenerateRequest:
    request = pb.GenerateRequest(prompt=pb.Prompt(text="Once"))
    request.stopping.max_tokens = max_tokens
    request.stopping.ignore_eos = True
    if key_id is not None:
        request.caller.key_id = key_id
    return request


async def first_tokens(server: Server) -> list[float]:
    """Seconds to the first token of five requests, one after another."""
    load = Load(server.port, max_tokens=1)
    return [(await load.ask()).first_token_seconds for _ in range(5)]


async def next_one(server: Server) -> float | None:
    """Seconds to the first token of one request, tried again as its refusals say; None after half a minute."""
    load = Load(server.port, max_tokens=1)
    began = time.perf_counter()
    try:
        async with asyncio.timeout(NEXT_SECONDS):
            while not (reply := await load.ask()).is_accepted:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
    except TimeoutError:
        return None
    return reply.first_token_at - began


async def run(plan: Plan) -> tuple[list[Outcome], list[tuple[float, float]]]:
    """What Sluice did, and the server without an end to its queue; and there: see `starvation`. Raises: PeerRefused."""
    async with serving(plan, {"max_waiting": plan.max_waiting}, {}) as server:
        capacity = await capacity_of(plan, server)
        bounded = await measure(plan, "Sluice", server, capacity)
    async with serving(plan, _NO_WORKER_LIMITS, _NO_EDGE_LIMITS) as server:
        unbounded = await measure(plan, "unbounded queue", server, capacity)
        if len(unbounded.accepted) < len(unbounded.replies) or unbounded.failed:
            statuses = dict(Counter(reply.status for reply in unbounded.replies))
            raise PeerRefused(
                f"the peer is to let everyone wait; statuses: {statuses}, failed after their 200:"
                f" {len(unbounded.failed)}, reasons: {unbounded.reasons()}"
            )
        return [bounded, unbounded], await starvation(plan, server.stub)


async def starvation(
    plan: Plan, stub: pb_grpc.GenerationServiceAsyncStub
) -> list[tuple[float, float]]:
    """With keys told to a worker that lets all wait, and without: see `_starve`."""
    return [await _starve(plan, stub, *keys) for keys in (("many", "one"), (None, None))]


async def _starve(
    plan: Plan, stub: pb_grpc.GenerationServiceAsyncStub, many: str | None, one: str | None
) -> tuple[float, float]:
    """Seconds to the first token of one request behind many, and of all of those to their end."""

    async def read() -> None:
        call = stub.Generate(_request(plan.flood_tokens, many))
        while await call.read() is not grpc.aio.EOF:
            pass

    began = time.perf_counter()
    flood = asyncio.gather(*(read() for _ in range(plan.flood)))
    await asyncio.sleep(_FLOOD_LEAD_SECONDS)
    asked = time.perf_counter()
    call = stub.Generate(_request(plan.flood_tokens, one))
    message: Any = await call.read()
    while not message.HasField("delta"):
        message = await call.read()
    waited = time.perf_counter() - asked
    call.cancel()
    await flood
    return waited, time.perf_counter() - began


def report(plan: Plan) -> Report:
    """Run, and write it up. Raises: PeerRefused."""
    load = os.getloadavg()[0]
    _allow_files(int(plan.seconds * plan.times_capacity * plan.most_requests_per_second))
    outcomes, starved = uvloop.run(run(plan))
    fairness = Table(("Keys", "First token of the one s", "End of the many s"), labels=1)
    for name, (waited, took) in zip(("told", "not told"), starved, strict=True):
        fairness.rows.append((name, f"{waited:.2f}", f"{took:.1f}"))
    return Report(
        "Overload",
        (
            f"{plan.times_capacity:g} times the capacity of {outcomes[0].capacity:.0f} tokens/s offered for "
            f"{plan.seconds:g} s: requests of {plan.max_tokens} tokens, {plan.max_running} slots, "
            f"{plan.max_waiting} may wait, steps of {plan.step_milliseconds:g} ms. `unbounded queue` is the same "
            "server with all of its limits out of reach, those of calls, streams and connections among them. `Other`"
            " had no answer, `Failed` were accepted and then told of a failure before any token, and `Unanswered` had"
            " no token when their client gave up, some time after the load.",
            *overload_tables(outcomes),
            f"{plan.flood} requests of one key at once, each of {plan.flood_tokens} tokens, and then one of another "
            "key:",
            str(fairness),
        ),
        load,
    )


def _allow_files(connections: int) -> None:
    """Let this process, and those it starts, hold so many connections, as far as the system allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + _SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument(
        "--model", default=str(CHECKPOINT), help="checkpoint whose tokenizer the script uses"
    )
    parser.add_argument("--seconds", type=float, default=Plan.seconds, help="of the load")
    parser.add_argument("--times-capacity", type=float, default=Plan.times_capacity)
    parser.add_argument("--step-milliseconds", type=float, default=Plan.step_milliseconds)
    parser.add_argument("--keep", type=Path, help="Markdown file that keeps the result")
    given = parser.parse_args()
    plan = Plan(given.model, given.seconds, given.times_capacity, given.step_milliseconds)
    if given.quick:
        plan = Plan(given.model, 1.0, 5, 10, max_running=4, max_waiting=4, max_tokens=16, flood=60)
    result = report(plan)
    print(result)
    if given.keep is not None:
        result.keep(given.keep)


if __name__ == "__main__":
    main()
