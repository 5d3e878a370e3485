"""The search for a worker that goes on with a stream: whom it asks again, and what ends it."""

import asyncio
from typing import Any

import pytest

from tests.edge.moved_streams import (
    FULL,
    STREAM,
    Code,
    begin,
    calls,
    continuations,
    end,
    lost_after,
    set_scripts,
    stream,
    text_of,
)
from tests.edge.pool import Pool, running_pool, until
from tests.edge.scripted_worker import (
    ScriptedCall,
    error_info,
    failing,
    retry_in,
)


async def test_a_worker_that_is_full_is_asked_again_and_crashes_are_counted() -> None:
    async with running_pool(2, failover_attempts=1) as pool:
        refusals = [
            failing(Code.RESOURCE_EXHAUSTED, "full", error_info("QUEUE_FULL"), retry_in(1)),
            failing(Code.ALREADY_EXISTS, "still there", error_info("REQUEST_EXISTS")),
            failing(Code.UNAVAILABLE, "stops", error_info("DRAINING"), retry_in(1)),
        ]

        async def then(call: ScriptedCall) -> None:
            await (refusals.pop(0) if refusals else end)(call)

        set_scripts(pool, lost_after(begin), then)
        assert text_of(await stream(pool)) == "Héllo"
        assert len(continuations(pool)) == 4

        set_scripts(pool, lost_after(begin), failing(Code.UNAVAILABLE))
        before = len(calls(pool))
        assert (await stream(pool))[-1].type == "failed"
        assert len(calls(pool)) == before + 2


async def test_there_is_a_limit_to_the_search() -> None:
    async with running_pool(2, failover_seconds=0.5) as pool:
        full = failing(Code.RESOURCE_EXHAUSTED, "full", error_info("QUEUE_FULL"), retry_in(1))
        set_scripts(pool, lost_after(begin), full)
        assert (await stream(pool))[-1].type == "failed"
        assert continuations(pool)


async def test_a_deadline_that_passes_during_the_search_ends_the_stream_with_what_it_has() -> None:
    async def first(call: ScriptedCall) -> None:
        await begin(call)
        await call.delta("x", choice=1, token_ids=[7])
        await call.finished(choice=2, completion_tokens=None)
        await call.fail(Code.UNAVAILABLE)

    async with running_pool(2, failover_seconds=600) as pool:
        set_scripts(pool, first, FULL)
        events = await stream(pool, timeout=1.5, n=3)
        assert continuations(pool)
        assert text_of(events) == "Héx"
        last = [event.json() for event in events[-2:]]
        assert [event.type for event in events[-2:]] == ["finished", "finished"]
        assert [(one["choice_index"], one["finish_reason"]) for one in last] == [
            (0, "deadline"),
            (1, "deadline"),
        ]
        usage = {"prompt_tokens": 7, "completion_tokens": 3, "cached_tokens": 2}
        assert last[1]["usage"] == usage
        assert "usage" not in last[0]
        numbers = [event.last_event_id.removesuffix("-end").split("-")[-1] for event in events]
        assert numbers == [str(number) for number in range(6)]


async def too_slow(call: ScriptedCall) -> None:
    """As a worker does with a request that has waited until its deadline."""
    await asyncio.sleep(call.request.timeout.ToNanoseconds() / 1e9)
    await call.fail(Code.DEADLINE_EXCEEDED)


@pytest.mark.parametrize("then", [FULL, too_slow])
async def test_a_deadline_that_passes_before_any_token_is_told_as_one(then: Any) -> None:
    async def first(call: ScriptedCall) -> None:
        await call.started(is_continuable=True)
        await call.fail(Code.UNAVAILABLE)

    async with running_pool(2, failover_seconds=600) as pool:
        set_scripts(pool, first, then)
        failed = (await stream(pool, timeout=1))[-1]
        assert failed.json()["error"]["type"] == "timeout"


async def test_a_deadline_that_passes_before_any_worker_began_is_a_504() -> None:
    async with running_pool(2, connect_timeout_seconds=60) as pool:
        for worker in pool.workers:
            worker.script = failing(Code.UNAVAILABLE, "stops", error_info("DRAINING"), retry_in(1))
        body = STREAM | {"timeout": 0.5}
        assert (await pool.http.post("/v1/streams", json=body)).status_code == 504
        for worker in pool.workers:
            await worker.set_serving(False)
        await until(lambda: not_serving(pool) == 2)
        assert (await pool.http.post("/v1/streams", json=body)).status_code == 504


def not_serving(pool: Pool) -> int:
    lines = [line for line in pool.edge.lines if line["event"] == "worker health"]
    last = {line["target"]: line["serving"] for line in lines}
    return sum(not is_serving for is_serving in last.values())


async def test_a_client_that_leaves_meanwhile_ends_the_search() -> None:
    async with running_pool(2, failover_seconds=600) as pool:
        full = failing(Code.RESOURCE_EXHAUSTED, "full", error_info("QUEUE_FULL"), retry_in(1))
        set_scripts(pool, lost_after(begin), full)
        leaving = asyncio.create_task(pool.http.post("/v1/streams", json=STREAM))
        await until(lambda: bool(continuations(pool)))
        leaving.cancel()
        await pool.edge.line(lambda line: line["event"] == "request" and line["status"] == 499)
        await until(lambda: all(call.ended.is_set() for call in calls(pool)))
        count = len(calls(pool))
        await asyncio.sleep(1)  # some rounds of the search
        assert len(calls(pool)) == count
