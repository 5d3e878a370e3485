"""Who aborts a stream that the edge reads ends it, wherever it is: at its worker, or on its way to another one."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc
import httpx
import pytest
import pytest_asyncio

from edge.api_keys import ApiKey, digest_of, line_of
from protos.sluice.v1 import generation_pb2 as pb
from tests.edge.pool import Pool, running_pool, until
from tests.edge.scripted_worker import ScriptedCall, ScriptedWorker, error_info, failing, retry_in
from tests.edge.sse import Event, parse

ALICE, BOB = "sluice_alices-key", "sluice_bobs-key"
KEYS = ";".join(
    line_of(ApiKey(name, (digest_of(key),))) for name, key in (("alice", ALICE), ("bob", BOB))
)
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
FULL = failing(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", error_info("QUEUE_FULL"), retry_in(1))


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def shared_pool() -> AsyncIterator[Pool]:
    async with running_pool(2, failover_seconds=600, api_keys=KEYS) as pool:
        yield pool


@pytest.fixture
def pool(shared_pool: Pool) -> Pool:
    for worker in shared_pool.workers:
        worker.reset()
        worker.abort_outcome = pb.ABORT_OUTCOME_UNKNOWN
    return shared_pool


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def begin(call: ScriptedCall) -> None:
    await call.started(is_continuable=call.request.is_continuable)
    await call.delta("Hé", token_ids=[1, 2], token_count=2)


async def hang(call: ScriptedCall) -> None:
    await call.hang()


class Reader:
    """A stream that is read to its end beside the test."""

    def __init__(self, pool: Pool, key: str = ALICE) -> None:
        self._pool, self._key = pool, key
        self._data = b""
        self._task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        body = {"prompt": "go", "max_tokens": 16}
        async with self._pool.http.stream(
            "POST", "/v1/streams", json=body, headers=bearer(self._key)
        ) as response:
            assert response.status_code == 200
            with contextlib.suppress(httpx.RemoteProtocolError):  # how one ends that failed
                async for piece in response.aiter_bytes():
                    self._data += piece

    async def begun(self) -> None:
        """Returns once it has a token, and so the edge has it too."""
        await until(lambda: b"event: delta" in self._data)

    async def events(self) -> list[Event]:
        """All of them."""
        await self._task
        return parse(self._data).events


def calls(pool: Pool) -> list[ScriptedCall]:
    return [call for worker in pool.workers for call in worker.calls]


def continuations(pool: Pool) -> list[ScriptedCall]:
    return [call for call in calls(pool) if call.request.HasField("continuation")]


def owner(pool: Pool) -> ScriptedWorker:
    """The worker that began the one stream there is."""
    (worker,) = (worker for worker in pool.workers if worker.calls)
    return worker


async def abort(pool: Pool, key: str = ALICE) -> httpx.Response:
    request_id = calls(pool)[0].request.request_id
    return await pool.http.delete(f"/v1/streams/{request_id}", headers=bearer(key))


def assert_cancelled_with_what_there_was(events: list[Event]) -> None:
    assert [event.type for event in events] == ["started", "delta", "finished"]
    assert events[-1].last_event_id.endswith("-2-end")
    last = events[-1].json()
    assert last["finish_reason"] == "cancelled"
    assert last["usage"] == {"prompt_tokens": 7, "completion_tokens": 2, "cached_tokens": 2}


@pytest.mark.parametrize("then", [FULL, hang], ids=["none takes it", "one has not let it in yet"])
async def test_a_stream_between_two_workers_ends_at_once(
    pool: Pool, then: Callable[[ScriptedCall], Awaitable[None]]
) -> None:
    async def script(call: ScriptedCall) -> None:
        if call.request.HasField("continuation"):
            await then(call)
        else:
            await begin(call)
            await call.fail(UNAVAILABLE)

    for worker in pool.workers:
        worker.script = script
    reader = Reader(pool)
    await reader.begun()
    await until(lambda: bool(continuations(pool)))
    assert (await abort(pool, BOB)).status_code == 404  # for whom there is no such stream
    answer = await abort(pool)
    assert (answer.status_code, answer.json()["outcome"]) == (200, "aborted")
    assert_cancelled_with_what_there_was(await reader.events())
    await until(lambda: all(call.ended.is_set() for call in calls(pool)))
    asked = len(calls(pool))
    request_id = calls(pool)[0].request.request_id
    line = await pool.edge.line(lambda line: line.get("request_id") == request_id)
    assert line["outcome"] == "aborted"
    await pool.edge.line(lambda line: line.get("generation_id") == request_id)
    assert (await abort(pool)).status_code == 404  # since nobody reads it any more
    assert len(calls(pool)) == asked


@pytest.mark.parametrize("failure", [None, UNAVAILABLE])
async def test_a_stream_whose_worker_does_not_say_that_it_has_it_ends_too(
    pool: Pool, failure: grpc.StatusCode | None
) -> None:
    async def script(call: ScriptedCall) -> None:
        await begin(call)
        await call.hang()

    for worker in pool.workers:
        worker.script = script
    reader = Reader(pool)
    await reader.begun()
    worker = owner(pool)
    worker.abort_failure = failure
    assert (await abort(pool)).json()["outcome"] == "aborted"
    assert_cancelled_with_what_there_was(await reader.events())
    worker.abort_failure = None
    (call,) = calls(pool)
    await call.ended.wait()
    assert call.was_cancelled
    # It may have it nevertheless, and is told again.
    await until(lambda: worker.aborted.count(call.request.request_id) >= 2)


@pytest.mark.parametrize("is_lost", [False, True])
async def test_a_stream_that_its_worker_aborts_goes_to_no_other(pool: Pool, is_lost: bool) -> None:
    async def script(call: ScriptedCall) -> None:
        await begin(call)
        await until(lambda: call.request.request_id in owner(pool).aborted)
        if is_lost:
            await call.fail(UNAVAILABLE)
        else:
            await call.finished(pb.FINISH_REASON_CANCELLED, completion_tokens=2)

    for worker in pool.workers:
        worker.script = script
    reader = Reader(pool)
    await reader.begun()
    owner(pool).abort_outcome = pb.ABORT_OUTCOME_ABORTED
    assert (await abort(pool)).json()["outcome"] == "aborted"
    last = (await reader.events())[-1].json()
    assert last["finish_reason"] == "cancelled"
    assert ("timings" in last) is not is_lost  # which the worker alone knows
    assert not continuations(pool)


async def test_where_there_is_no_other_worker_it_ends_as_a_failure() -> None:
    async def script(call: ScriptedCall) -> None:
        await begin(call)
        await call.hang()

    async with running_pool(1) as pool:
        pool.workers[0].script = script
        pool.workers[0].abort_outcome = pb.ABORT_OUTCOME_UNKNOWN
        reader = Reader(pool)
        await reader.begun()
        assert (await abort(pool)).json()["outcome"] == "aborted"
        failed = (await reader.events())[-1]
        assert (failed.type, failed.json()["error"]["type"]) == ("failed", "cancelled")


async def test_a_stream_that_another_edge_may_have_is_not_said_to_be_unknown(pool: Pool) -> None:
    pool.workers[0].abort_failure = UNAVAILABLE
    refused = await pool.http.delete("/v1/streams/stream-1", headers=bearer(ALICE))
    assert refused.status_code == 503
    assert "retry-after" in refused.headers
    pool.workers[1].abort_outcome = pb.ABORT_OUTCOME_ABORTED
    answer = await pool.http.delete("/v1/streams/stream-1", headers=bearer(ALICE))
    assert answer.json()["outcome"] == "aborted"
