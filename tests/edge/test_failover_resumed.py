"""Streams that were resumed, from whichever edge, and then lose their worker."""

import json
from typing import Any

from protos.sluice.v1 import generation_pb2 as pb
from tests.edge.moved_streams import RESUME_ID, Code, continuations, end, text_of
from tests.edge.pool import Pool, running_pool
from tests.edge.scripted_worker import (
    ScriptedCall,
    bad_field,
    error_info,
    failing,
)
from tests.edge.sse import Event, parse


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
