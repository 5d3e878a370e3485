"""What the edge asks of another worker when a stream loses its own, and what the client sees of it: nothing."""

import asyncio
import contextlib
import json
from typing import Any

import grpc
import httpx
import pytest

from protos.sluice.v1 import generation_pb2 as pb
from tests.edge.pool import Pool, running_pool, until
from tests.edge.scripted_worker import (
    ScriptedCall,
    bad_field,
    error_info,
    failing,
    retry_in,
)
from tests.edge.sse import Event, parse

Code = grpc.StatusCode
STREAM = {"prompt": "go", "max_tokens": 16}


async def begin(call: ScriptedCall) -> None:
    await call.started(is_continuable=True)
    await call.delta("Hé", token_ids=[1, 2], token_count=2)


async def end(call: ScriptedCall) -> None:
    await call.started(is_continuable=call.request.is_continuable)
    await call.delta("llo", token_ids=[3])
    await call.finished(completion_tokens=3)


def set_scripts(pool: Pool, first: Any, then: Any) -> None:
    """Whichever worker begins the stream, and whichever continues it."""

    async def script(call: ScriptedCall) -> None:
        await (then if call.request.HasField("continuation") else first)(call)

    for worker in pool.workers:
        worker.script = script


def lost_after(script: Any, code: grpc.StatusCode = Code.UNAVAILABLE, *details: Any) -> Any:
    async def lost(call: ScriptedCall) -> None:
        await script(call)
        await call.fail(code, "gone", *details)

    return lost


def calls(pool: Pool) -> list[ScriptedCall]:
    return [call for worker in pool.workers for call in worker.calls]


def continuations(pool: Pool) -> list[pb.GenerateRequest]:
    return [call.request for call in calls(pool) if call.request.HasField("continuation")]


async def stream(pool: Pool, **fields: Any) -> list[Event]:
    data = b""
    async with pool.http.stream("POST", "/v1/streams", json=STREAM | fields) as response:
        assert response.status_code == 200
        with contextlib.suppress(httpx.RemoteProtocolError):  # how one ends that failed
            async for piece in response.aiter_bytes():
                data += piece
    return parse(data).events


def text_of(events: list[Event]) -> str:
    return "".join(event.json()["text"] for event in events if event.type == "delta")


async def test_the_other_worker_is_told_what_the_client_has() -> None:
    async def first(call: ScriptedCall) -> None:
        await begin(call)
        await call.delta(
            "",
            choice=1,
            token_ids=[7],
            reasoning="Hm.",
            tool_calls=[pb.ToolCallDelta(index=0, id="call_1", name="f", arguments='{"é')],
        )
        await call.finished(choice=2, completion_tokens=None)
        await call.fail(Code.UNAVAILABLE)

    async def then(call: ScriptedCall) -> None:
        await call.started(is_continuable=True)
        await call.delta("llo", token_ids=[3])
        await call.finished(choice=0, completion_tokens=None)
        await call.finished(choice=1, completion_tokens=3)

    async with running_pool(2) as pool:
        set_scripts(pool, first, then)
        events = await stream(pool, n=3, top_p=0.5)
        assert [event.type for event in events] == [
            "started",
            "delta",
            "delta",
            "finished",
            "delta",
            "finished",
            "finished",
        ]
        numbers = [event.last_event_id.removesuffix("-end").split("-")[-1] for event in events]
        assert numbers == [str(number) for number in range(7)]
        assert text_of(events) == "Héllo"
        assert not any("token_ids" in event.json() for event in events)

        begun, rest = (call.request for call in sorted(calls(pool), key=_is_continuation))
        assert begun.is_continuable
        assert rest.is_continuable
        assert rest.request_id == begun.request_id
        assert rest.prompt == begun.prompt
        assert (rest.sampling.seed, rest.stopping.max_tokens, rest.n) == (42, 16, 3)
        assert rest.timeout.ToNanoseconds() < begun.timeout.ToNanoseconds()
        expected = pb.Continuation(
            sequence_number=3,
            choices=[
                pb.DeliveredChoice(choice_index=0, token_ids=[1, 2], text_characters=2),
                pb.DeliveredChoice(
                    choice_index=1,
                    token_ids=[7],
                    reasoning_characters=3,
                    tool_calls=1,
                    argument_characters=3,
                ),
                pb.DeliveredChoice(choice_index=2, completion_tokens=0),
            ],
        )
        assert rest.continuation == expected
        line = await pool.edge.line(lambda line: line.get("failovers") == 1)
        assert line["status"] == 200


def _is_continuation(call: ScriptedCall) -> bool:
    return call.request.HasField("continuation")


async def test_ids_are_shown_to_who_asked_for_them() -> None:
    async with running_pool(2) as pool:
        set_scripts(pool, lost_after(begin), end)
        events = await stream(pool, return_token_ids=True)
        shown = [event.json().get("token_ids") for event in events if event.type == "delta"]
        assert shown == [[1, 2], [3]]


async def test_one_worker_alone_is_not_asked_for_more_than_the_client_wants() -> None:
    async with running_pool(1) as pool:
        set_scripts(pool, lost_after(begin), end)
        assert (await stream(pool))[-1].type == "failed"
        assert not calls(pool)[0].request.is_continuable


@pytest.mark.parametrize(
    "loss",
    [
        lost_after(begin, Code.UNAVAILABLE),
        lost_after(begin, Code.UNAVAILABLE, error_info("SHUTDOWN"), retry_in(1)),
        # as a server ends its calls when it stops
        lost_after(begin, Code.CANCELLED),
    ],
)
async def test_whatever_way_a_worker_goes_another_one_goes_on(loss: Any) -> None:
    async with running_pool(2) as pool:
        set_scripts(pool, loss, end)
        assert text_of(await stream(pool)) == "Héllo"


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_stream_that_lacks_its_status_alone_is_over(workers: int) -> None:
    async with running_pool(workers) as pool:
        for number, code in enumerate((Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED), 1):
            set_scripts(pool, lost_after(end, code), end)
            assert (await stream(pool))[-1].type == "finished"
            assert len(calls(pool)) == number


async def test_what_is_no_loss_is_not_tried_again() -> None:
    async def is_not_continuable(call: ScriptedCall) -> None:
        await call.started()
        await call.fail(Code.UNAVAILABLE)

    async with running_pool(2) as pool:
        for first in (
            is_not_continuable,
            lost_after(begin, Code.INTERNAL, error_info("INTERNAL")),
            lost_after(begin, Code.ABORTED, error_info("SLOW_READER")),
        ):
            set_scripts(pool, first, end)
            assert (await stream(pool))[-1].type == "failed"
        assert not continuations(pool)


async def test_a_continuation_that_is_refused_is_the_failure_of_the_stream() -> None:
    async with running_pool(3) as pool:
        refusal = failing(Code.INVALID_ARGUMENT, "no", bad_field("continuation"))
        set_scripts(pool, lost_after(begin), refusal)
        failed = (await stream(pool))[-1]
        assert failed.json()["error"]["type"] == "unavailable"  # which is the truth about it
        assert len(continuations(pool)) == 1


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


@pytest.mark.parametrize("window", [None, 60])
async def test_a_worker_that_lost_a_stream_is_told_to_end_it(window: int | None) -> None:
    """It may be there, and know of nothing: until a resume window has passed it would go on."""

    async def first(call: ScriptedCall) -> None:
        await call.started(is_continuable=True, resume_id=RESUME_ID if window else None)
        await call.fail(Code.UNAVAILABLE)

    async with running_pool(2) as pool:
        stopping = (Code.UNAVAILABLE, error_info("SHUTDOWN"), retry_in(1))
        set_scripts(pool, lost_after(begin, *stopping), end)
        assert text_of(await stream(pool)) == "Héllo"  # such a one has ended it

        set_scripts(pool, first, end)
        await stream(pool, resume_window=window)
        await until(lambda: any(worker.aborts for worker in pool.workers))
        (lost,) = (worker for worker in pool.workers if worker.aborts)
        begun = [call.request for call in lost.calls if not _is_continuation(call)]
        request_id = begun[-1].request_id
        expected = pb.AbortRequest(resume_id=RESUME_ID, forget=True)
        assert lost.aborts == [expected if window else pb.AbortRequest(request_id=request_id)]
        assert sum(len(worker.aborts) for worker in pool.workers) == 1


FULL = failing(Code.RESOURCE_EXHAUSTED, "full", error_info("QUEUE_FULL"), retry_in(1))


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


RESUME_ID = "rs_" + "0123456789abcdef" * 3


def resumed(call: ScriptedCall, created: int = 1) -> pb.Resumed:
    """What a worker tells of a stream of two choices, of which whoever resumes it has three messages."""
    started = pb.Started(
        request_id="stream-of-another-edge",
        sampling=pb.Sampling(temperature=0.7, seed=42),
        max_tokens=16,
        n=2,
        resume_id=RESUME_ID,
        is_continuable=True,
    )
    request = pb.GenerateRequest(
        prompt=pb.Prompt(text="go"),
        is_continuable=True,
        resume_tag="t",
        annotation=b'["msg_1",false]',
    )
    request.resume_window.seconds = 60
    request.timeout.seconds = 30
    told = pb.Resumed(request=request, started=started)
    told.created_at.seconds = created
    if call.request.resume.HasField("after_sequence_number"):
        told.choices.add(choice_index=0, token_ids=[1, 2], text_characters=2)
        told.choices.add(choice_index=1, completion_tokens=5)
    return told


def set_resume_scripts(pool: Pool, resume: Any, then: Any) -> None:
    """The first worker keeps the stream; any goes on with it."""

    async def script(call: ScriptedCall) -> None:
        if call.request.HasField("continuation"):
            await then(call)
        elif call in pool.workers[0].calls:
            await resume(call)
        else:
            await call.fail(Code.NOT_FOUND, "no such stream", error_info("STREAM_NOT_FOUND"))

    for worker in pool.workers:
        worker.script = script


async def reconnect(pool: Pool, number: int = 2) -> list[Event]:
    headers = {"last-event-id": f"{RESUME_ID}-{number}"}
    response = await pool.http.get("/v1/streams?prompt=x", headers=headers)
    assert response.status_code == 200, response.text
    return parse(response.content).events


async def test_a_stream_that_was_resumed_goes_on_elsewhere_too() -> None:
    async def resume(call: ScriptedCall) -> None:
        await call.context.write(pb.GenerateResponse(resumed=resumed(call)))
        call._sequence_number = 3
        await call.delta("llo", token_ids=[3])
        await call.fail(Code.UNAVAILABLE)

    async def then(call: ScriptedCall) -> None:
        await call.started(is_continuable=True)
        await call.delta("!", token_ids=[4])
        await call.finished(completion_tokens=9)

    async with running_pool(2) as pool:
        set_resume_scripts(pool, resume, then)
        events = await reconnect(pool)
        assert [event.last_event_id for event in events] == [
            f"{RESUME_ID}-3",
            f"{RESUME_ID}-4",
            f"{RESUME_ID}-5-end",
        ]
        assert text_of(events) == "llo!"
        assert not any("token_ids" in event.json() for event in events)
        (rest,) = continuations(pool)
        assert 0 < rest.timeout.ToNanoseconds() < 30 * 10**9
        rest.ClearField("timeout")
        expected = resumed(pool.workers[0].calls[0]).request
        expected.ClearField("timeout")
        expected.request_id = "stream-of-another-edge"
        expected.sampling.CopyFrom(pb.Sampling(temperature=0.7, seed=42))
        expected.stopping.max_tokens = 16
        expected.n = 2
        expected.continuation.sequence_number = 3
        expected.continuation.resume_id = RESUME_ID
        expected.continuation.choices.add(choice_index=0, token_ids=[1, 2, 3], text_characters=5)
        expected.continuation.choices.add(choice_index=1, completion_tokens=5)
        assert rest == expected


async def test_where_failover_is_off_nobody_asks_for_what_it_takes() -> None:
    async def resume(call: ScriptedCall) -> None:
        call._sequence_number = 3
        await call.finished(completion_tokens=9)

    async with running_pool(2, failover_attempts=0) as pool:
        set_resume_scripts(pool, resume, resume)
        await reconnect(pool)
        asked = [call.request.resume for worker in pool.workers for call in worker.calls]
        assert len(asked) == 2
        assert not any(resume.is_continuable for resume in asked)


async def test_a_worker_that_is_lost_before_a_stream_is_read_from_its_beginning() -> None:
    async def resume(call: ScriptedCall) -> None:
        await call.context.write(pb.GenerateResponse(resumed=resumed(call)))
        await call.fail(Code.UNAVAILABLE)

    async with running_pool(2) as pool:
        set_resume_scripts(pool, resume, end)
        response = await pool.http.get("/api/chat/c1/stream")
        assert response.status_code == 200
        (rest,) = continuations(pool)
        assert rest.continuation == pb.Continuation(sequence_number=0, resume_id=RESUME_ID)
        # the reader gets the header that was lost, with what was kept beside it
        parts = [json.loads(event.data) for event in parse(response.content).events[:-1]]
        assert parts[0] == {"type": "start", "messageId": "msg_1"}
        assert [part["delta"] for part in parts if part["type"] == "text-delta"] == ["llo"]
        assert parts[-1]["type"] == "finish"


async def test_of_two_workers_that_have_a_stream_the_one_that_began_it_later_goes_on() -> None:
    """The other one has not noticed that it was lost, and numbers what it goes on with in its own way."""
    texts = {1: "stale", 2: "true"}

    async with running_pool(2) as pool:
        for created, worker in enumerate(pool.workers, 1):

            async def script(call: ScriptedCall, created: int = created) -> None:
                await call.context.write(pb.GenerateResponse(resumed=resumed(call, created)))
                call._sequence_number = 3
                await call.delta(texts[created], token_ids=[3])
                await call.finished()

            worker.script = script
        for _ in range(3):
            assert text_of(await reconnect(pool)) == "true"


async def test_one_that_has_not_the_message_yet_says_nothing_of_the_stream() -> None:
    async def resume(call: ScriptedCall) -> None:
        call._sequence_number = 3
        await call.delta("llo")
        await call.finished()

    async with running_pool(2) as pool:
        set_resume_scripts(pool, resume, end)
        pool.workers[1].script = failing(Code.INVALID_ARGUMENT, "no", bad_field("resume"))
        assert text_of(await reconnect(pool)) == "llo"
        pool.workers[0].script = failing(
            Code.NOT_FOUND, "no such stream", error_info("STREAM_NOT_FOUND")
        )
        headers = {"last-event-id": f"{RESUME_ID}-2"}
        refused = await pool.http.get("/v1/streams?prompt=x", headers=headers)
        assert refused.status_code == 400  # which says more than that the other one has it not
