"""Several workers: who takes what, what is asked of all, and workers that come and go."""

import asyncio
from typing import Any

import grpc
import httpx
import pytest

from edge import refusals, worker_client, worker_pool
from edge.errors import overloaded
from edge.metrics import EdgeMetrics
from edge.settings import EdgeSettings
from edge.worker_pool import WorkerPool
from protos.sluice.v1 import generation_pb2 as pb
from tests.edge.edge_process import PATIENCE, running_edge
from tests.edge.pool import CHAT, Pool, running_pool, serving, until
from tests.edge.scripted_worker import (
    Script,
    ScriptedCall,
    ScriptedWorker,
    bad_field,
    error_info,
    failing,
    retry_in,
    start_server,
)
from tests.metrics_text import Scrape

FULL = failing(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", error_info("QUEUE_FULL"), retry_in(2))
LOST = failing(grpc.StatusCode.UNAVAILABLE)


def test_a_worker_is_missed_in_15_seconds_and_taken_back_in_2(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What gRPC is told, from which these times follow."""
    told: list[Any] = []
    monkeypatch.setattr(grpc.aio, "insecure_channel", lambda _, options: told.extend(options))
    worker_client.open_channel("127.0.0.1:1", None, EdgeSettings())
    options = dict(told)
    timeout = max(options["grpc.keepalive_timeout_ms"], options["grpc.http2.ping_timeout_ms"])
    assert options["grpc.keepalive_time_ms"] + timeout <= 15_000
    assert (
        options["grpc.http2.max_pings_without_data"] == 0
    )  # or the pings stop where little is sent
    # gRPC adds up to a fifth to each wait (its doc/connection-backoff.md)
    reconnect = 1.2 * options["grpc.max_reconnect_backoff_ms"] / 1000
    assert options["grpc.initial_reconnect_backoff_ms"] <= options["grpc.max_reconnect_backoff_ms"]
    assert reconnect + worker_client.WATCH_RETRY_SECONDS <= 2
    assert options["grpc.min_reconnect_backoff_ms"] <= 2000


async def hang(call: ScriptedCall) -> None:
    await call.started()
    await call.hang()


async def test_equal_workers_take_turns() -> None:
    async with running_pool(3) as pool:
        for _ in range(6):
            assert (await pool.ask()).status_code == 200
        assert pool.counts() == [2, 2, 2]


async def test_the_one_with_the_fewest_outstanding_requests_gets_the_next() -> None:
    async with running_pool(2) as pool:
        first, second = pool.workers
        ending = asyncio.Event()

        async def wait(call: ScriptedCall) -> None:
            await call.started()
            await ending.wait()
            await call.finished()

        first.script, second.script = hang, wait
        held = [asyncio.create_task(pool.ask()) for _ in range(4)]
        await until(lambda: pool.counts() == [2, 2])
        # the second one is done with its own; what follows is its, though it had as many
        ending.set()
        await until(lambda: sum(task.done() for task in held) == 2)
        more = [asyncio.create_task(pool.ask()) for _ in range(2)]
        await until(lambda: pool.counts() == [2, 4])
        for task in (*held, *more):
            task.cancel()


async def test_a_request_lost_before_its_first_message_is_begun_on_another_worker() -> None:
    async with running_pool(2) as pool:
        pool.workers[0].script = LOST
        for _ in range(2):
            assert (await pool.ask()).status_code == 200
        assert pool.counts() == [1, 2]
        # The one that was lost may have it nevertheless, and is told.
        (lost,) = pool.workers[0].calls
        await until(lambda: pool.workers[0].aborted == [lost.request.request_id])
        pool.workers[1].script = LOST
        assert (await pool.ask()).status_code == 503
        assert pool.counts() == [2, 3]  # each once


async def test_a_request_waits_for_one_of_several_workers_to_serve_again() -> None:
    async with running_pool(2, connect_timeout_seconds=PATIENCE) as pool:
        for worker in pool.workers:
            await worker.set_serving(False)
        await until_not_ready(pool.http)
        asked = asyncio.create_task(pool.ask())
        async with asyncio.timeout(PATIENCE):
            while Scrape((await pool.http.get("/metrics")).text)("sluice_edge_generations") < 1:
                await asyncio.sleep(0.01)
        await pool.workers[1].set_serving(True)
        assert (await asked).status_code == 200
        assert pool.counts() == [0, 1]


async def test_but_not_for_long() -> None:
    async with running_pool(2, connect_timeout_seconds=0.2) as pool:
        for worker in pool.workers:
            await worker.set_serving(False)
        await until_not_ready(pool.http)
        refused = await pool.ask()
        assert refused.status_code == 503
        assert "retry-after" in refused.headers


async def test_a_worker_that_stops_sends_requests_to_one_that_is_only_just_back() -> None:
    async with running_pool(2, connect_timeout_seconds=PATIENCE) as pool:
        stopping, back = pool.workers
        await back.set_serving(False)
        await pool.edge.line(lambda line: line.get("serving") is False)
        refuse = failing(grpc.StatusCode.UNAVAILABLE, "stopping", error_info("DRAINING"))
        refused = asyncio.Event()

        async def stop(call: ScriptedCall) -> None:
            await stopping.set_serving(False)
            refused.set()
            await refuse(call)

        async def come_back() -> None:
            await refused.wait()
            await asyncio.sleep(0.2)  # so that the edge, most likely, has the refusal first
            await back.set_serving(True)

        stopping.script = stop
        coming = asyncio.create_task(come_back())
        assert (await pool.ask()).status_code == 200
        assert pool.counts() == [1, 1]
        await coming


async def test_how_often_is_limited() -> None:
    async with running_pool(4, failover_attempts=1) as pool:
        for worker in pool.workers:
            worker.script = LOST
        assert (await pool.ask()).status_code == 503
        assert sum(pool.counts()) == 2
    async with running_pool(2, failover_attempts=0) as pool:
        pool.workers[0].script = LOST
        statuses = {(await pool.ask()).status_code for _ in range(2)}
        assert statuses == {200, 503}


async def test_a_full_worker_is_not_preferred_for_having_nothing_of_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(refusals, "_FULL_SECONDS", PATIENCE)
    workers = [ScriptedWorker(), ScriptedWorker()]
    servers = [await start_server(worker, "127.0.0.1:0") for worker in workers]
    targets = ",".join(f"127.0.0.1:{port}" for _, port in servers)
    pool = WorkerPool(EdgeSettings(worker=targets), EdgeMetrics())
    try:
        await pool.start()
        await until(
            lambda: {pool.pick(), pool.pick()}.isdisjoint({None}) and pool.pick() != pool.pick()
        )
        full, other = pool.pick(), pool.pick()
        assert full is not None
        assert other is not None
        call = other.generate(pb.GenerateRequest(), PATIENCE)
        assert pool.pick() is full
        full.refusals.note("", overloaded("full"))
        assert [pool.pick(), pool.pick()] == [other, other]
        other.refusals.note("", overloaded("full"))
        assert pool.pick() is full
        call.cancel()
    finally:
        await pool.close()
        await asyncio.gather(*(server.stop(0) for server, _ in servers))


@pytest.mark.parametrize("scripts", [(FULL,) * 4, (FULL, LOST), (LOST, FULL)])
async def test_where_all_are_full_or_lost_the_refusal_says_when_to_come_back(
    scripts: tuple[Script, ...],
) -> None:
    async with running_pool(len(scripts)) as pool:
        for worker, script in zip(pool.workers, scripts, strict=True):
            worker.script = script
        refused = await pool.ask()
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "2")
        assert sum(pool.counts()) == 2


@pytest.mark.parametrize(
    ("code", "details", "status"),
    [
        (grpc.StatusCode.RESOURCE_EXHAUSTED, [error_info("KEY_LIMIT"), retry_in(1)], 429),
        (grpc.StatusCode.INVALID_ARGUMENT, [bad_field("sampling.top_p")], 400),
        (grpc.StatusCode.INTERNAL, [error_info("INTERNAL")], 500),
    ],
)
async def test_what_another_worker_would_say_too_is_not_asked_twice(
    code: grpc.StatusCode, details: list[Any], status: int
) -> None:
    async with running_pool(2) as pool:
        for worker in pool.workers:
            worker.script = failing(code, "no", *details)
        assert (await pool.ask()).status_code == status
        assert sum(pool.counts()) == 1


async def test_an_abort_finds_the_worker_that_has_the_stream_even_if_it_drains() -> None:
    async with running_pool(3) as pool:
        for worker in pool.workers:
            worker.abort_outcome = pb.ABORT_OUTCOME_UNKNOWN
        assert (await pool.http.delete("/v1/streams/s-1")).status_code == 404
        assert [worker.aborted for worker in pool.workers] == [["s-1"]] * 3

        pool.workers[0].abort_outcome = pb.ABORT_OUTCOME_ALREADY_FINISHED
        answer = await pool.http.delete("/v1/streams/s-1")
        assert answer.json()["outcome"] == "already_finished"

        await pool.workers[2].set_serving(False)
        await pool.edge.line(lambda line: line.get("serving") is False)
        pool.workers[2].abort_outcome = pb.ABORT_OUTCOME_ABORTED
        assert (await pool.http.delete("/v1/streams/s-1")).json()["outcome"] == "aborted"


async def test_one_worker_is_enough_and_one_that_comes_back_is_used_again() -> None:
    workers = [ScriptedWorker(), ScriptedWorker()]
    first, port = await start_server(workers[0], "127.0.0.1:0")
    second, other_port = await start_server(workers[1], "127.0.0.1:0")
    target = f"127.0.0.1:{port}"
    try:
        async with (
            running_edge(f"{target},127.0.0.1:{other_port}") as edge,
            httpx.AsyncClient(base_url=edge.url, timeout=PATIENCE, trust_env=False) as http,
        ):
            pool = Pool(edge, workers, http)
            await serving(edge, target)
            await serving(edge, f"127.0.0.1:{other_port}")
            await first.stop(0)
            await serving(edge, target, is_serving=False)
            seen = len(edge.lines)
            for path in ("/ready", "/v1/models"):
                assert (await http.get(path)).status_code == 200
            for _ in range(3):
                assert (await pool.ask()).status_code == 200
            assert pool.counts() == [0, 3]

            first, _ = await start_server(workers[0], target)
            await serving(edge, target, since=seen)
            for _ in range(2):
                assert (await pool.ask()).status_code == 200
            assert pool.counts() == [1, 4]

            await asyncio.gather(first.stop(0), second.stop(0))
            await until_not_ready(http)
            assert (await http.delete("/v1/streams/s-1")).status_code == 503
    finally:
        await asyncio.gather(first.stop(0), second.stop(0))


async def until_not_ready(http: httpx.AsyncClient) -> None:
    async with asyncio.timeout(PATIENCE):
        while (answer := await http.get("/ready")).status_code == 200:
            await asyncio.sleep(0.01)
    assert answer.json()["reason"].startswith("none of 2 workers serves")


async def test_a_name_is_every_address_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = [ScriptedWorker(), ScriptedWorker()]
    first, port = await start_server(workers[0], "127.0.0.1:0")
    second, _ = await start_server(workers[1], f"127.0.0.2:{port}")
    here, there = f"ipv4:127.0.0.1:{port}", f"ipv4:127.0.0.2:{port}"
    answers: list[frozenset[str] | Exception] = [frozenset({here})]
    looked_up = 0

    async def resolve(name: str) -> frozenset[str]:
        nonlocal looked_up
        assert name == f"dns:///workers:{port}"
        looked_up += 1
        answer = answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(worker_pool, "resolve", resolve)
    pool = WorkerPool(
        EdgeSettings(worker=f"dns:///workers:{port}", resolve_seconds=0.01), EdgeMetrics()
    )

    def serving_targets() -> set[str]:
        picked = [pool.pick() for _ in range(4)]
        return {client.target for client in picked if client is not None}

    async def look_up_again() -> None:
        done = looked_up + 1
        await until(lambda: looked_up > done)

    try:
        await pool.start()
        assert (await pool.serving()).target == here  # waits for the first answer
        answers[0] = frozenset({here, there})
        await until(lambda: serving_targets() == {here, there})
        # a lookup that fails or finds nothing changes nothing
        for nothing in (OSError("no"), UnicodeError("label too long"), frozenset[str]()):
            answers[0] = nothing
            await look_up_again()
            assert serving_targets() == {here, there}

        # an address that is gone keeps what it has and gets nothing new
        workers[0].script = hang
        kept = next(c for c in (pool.pick(), pool.pick()) if c is not None and c.target == here)
        call = kept.generate(pb.GenerateRequest(request_id="kept"), PATIENCE)
        await call.read()
        answers[0] = frozenset({there})
        await until(lambda: serving_targets() == {there})
        workers[1].abort_outcome = pb.ABORT_OUTCOME_UNKNOWN
        assert await pool.abort(pb.AbortRequest(request_id="kept")) == pb.ABORT_OUTCOME_ABORTED
        assert not call.done()
        call.cancel()
    finally:
        await pool.close()
        await asyncio.gather(first.stop(0), second.stop(0))


async def test_a_name_is_looked_up_for_real() -> None:
    worker = ScriptedWorker()
    server, port = await start_server(worker, "127.0.0.1:0")
    try:
        async with (
            running_edge(f"dns:///localhost:{port}") as edge,
            httpx.AsyncClient(base_url=edge.url, timeout=PATIENCE, trust_env=False) as http,
        ):
            assert (await http.post("/v1/chat/completions", json=CHAT)).status_code == 200
            line = await edge.line(lambda line: line["event"] == "worker name")
            assert line["targets"] == [f"ipv4:127.0.0.1:{port}"]
        async with (
            running_edge("dns:///no-such-name.invalid:1") as edge,
            httpx.AsyncClient(base_url=edge.url, timeout=PATIENCE, trust_env=False) as http,
        ):
            assert (await http.post("/v1/chat/completions", json=CHAT)).status_code == 503
            assert (await http.get("/ready")).json()["reason"] == (
                "the workers' name has no address"
            )
    finally:
        await server.stop(0)
