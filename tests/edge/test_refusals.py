"""A refusal that holds for a moment is repeated for its key, and no longer than it holds."""

import asyncio

import grpc
import httpx

from edge.api_keys import ApiKey, digest_of, line_of
from edge.errors import EdgeError, overloaded
from edge.refusals import Refusals
from tests.edge.edge_process import PATIENCE, EdgeProcess, running_edge
from tests.edge.pool import running_pool
from tests.edge.scripted_worker import (
    ScriptedCall,
    ScriptedWorker,
    error_info,
    failing,
    hello,
    retry_in,
)

FOR_EVER = "600000"
HELD = failing(
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    "overloaded",
    error_info("QUEUE_FULL", hold_ms=FOR_EVER),
    retry_in(3),
)
BODY = {"prompt": "hi"}


class Clock:
    """A clock that the test moves."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def held_error(milliseconds: int | None) -> EdgeError:
    error = overloaded("full")
    error.hold_ms = milliseconds
    return error


def test_it_is_repeated_for_its_key_until_its_time_is_over() -> None:
    clock = Clock()
    refusals = Refusals(clock)
    refusals.note("a", held_error(40))
    clock.now += 0.039
    first, second = refusals.repeated("a"), refusals.repeated("a")
    assert first is not None
    assert second is not None
    assert first is not second
    assert first.headers is not second.headers
    assert (first.status, first.message, first.retry_after_ms) == (429, "full", 1000)
    assert refusals.repeated("b") is None
    clock.now += 0.002
    assert refusals.repeated("a") is None
    assert refusals.is_full  # for a second, where another may be asked
    clock.now += 1
    assert not refusals.is_full


def test_it_is_not_repeated_where_the_worker_did_not_say_so_or_room_was_made() -> None:
    refusals = Refusals(Clock())
    for hold in (None, 0):
        refusals.note("a", held_error(hold))
        assert refusals.repeated("a") is None
    refusals.note("a", held_error(40))
    refusals.forget()
    assert refusals.repeated("a") is None


def test_keys_that_are_remembered_are_few() -> None:
    refusals = Refusals(Clock())
    for number in range(5000):
        refusals.note(str(number), held_error(40))
    kept = [number for number in range(5000) if refusals.repeated(str(number))]
    assert 0 < len(kept) <= 1024
    assert kept[-1] == 4999


async def refused(edge: EdgeProcess, path: str, **headers: str) -> httpx.Response:
    async with httpx.AsyncClient(base_url=edge.url, timeout=PATIENCE, trust_env=False) as http:
        return await http.post(path, json=BODY, headers=headers)


async def test_the_answer_is_the_same_in_words_and_the_worker_is_spared(
    worker: ScriptedWorker, target: str
) -> None:
    worker.script = HELD
    async with running_edge(target) as edge:
        asked = await refused(edge, "/v1/streams")
        answers = [await refused(edge, "/v1/streams") for _ in range(3)]
        other = await refused(edge, "/v1/completions")
        scraped = await refused_count(edge)
    assert len(worker.calls) == 1
    for answer in (*answers, other):
        assert answer.status_code == asked.status_code == 429
        assert answer.json() == asked.json()
        assert answer.json()["error"]["code"] == "queue_full"
        assert answer.headers["retry-after"] == asked.headers["retry-after"] == "3"
        assert answer.headers["x-request-id"] != asked.headers["x-request-id"]
    assert scraped == 4


async def refused_count(edge: EdgeProcess) -> float:
    async with httpx.AsyncClient(base_url=edge.url, timeout=PATIENCE, trust_env=False) as http:
        text = (await http.get("/metrics")).text
    name = "sluice_edge_refusals_repeated_total "
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(name))


async def test_another_key_is_asked_about(worker: ScriptedWorker, target: str) -> None:
    keys = [ApiKey(name, (digest_of(f"{name}-key"),)) for name in ("alice", "bob")]

    async def script(call: ScriptedCall) -> None:
        await (HELD if call.request.caller.key_id == "alice" else hello)(call)

    worker.script = script
    async with running_edge(target, api_keys="; ".join(map(line_of, keys))) as edge:
        for _ in range(2):
            for key, status in (("alice-key", 429), ("bob-key", 200)):
                assert (
                    await refused(edge, "/v1/streams", **{"x-api-key": key})
                ).status_code == status
            # bob's end may have made room, so alice's next request is asked about
    assert [call.request.caller.key_id for call in worker.calls] == ["alice", "bob"] * 2


async def test_a_generation_that_ends_makes_room(worker: ScriptedWorker, target: str) -> None:
    may_end = asyncio.Event()

    async def script(call: ScriptedCall) -> None:
        await call.started()
        await call.delta("a")
        await may_end.wait()
        await call.finished()

    worker.script = script
    async with (
        running_edge(target) as edge,
        httpx.AsyncClient(base_url=edge.url, timeout=PATIENCE, trust_env=False) as http,
        http.stream("POST", "/v1/streams", json=BODY) as running,
    ):
        lines = running.aiter_lines()
        while await anext(lines) != "event: delta":
            pass
        worker.script = HELD
        for _ in range(2):
            assert (await refused(edge, "/v1/streams")).status_code == 429
        assert len(worker.calls) == 2
        worker.script = hello
        may_end.set()
        assert [line async for line in lines if line == "event: finished"]
        assert (await refused(edge, "/v1/streams")).status_code == 200


async def test_another_worker_is_asked_once_and_then_both_are_spared() -> None:
    async with running_pool(2) as pool:
        for worker in pool.workers:
            worker.script = HELD
        for _ in range(4):
            assert (await pool.ask()).status_code == 429
        assert pool.counts() == [1, 1]
