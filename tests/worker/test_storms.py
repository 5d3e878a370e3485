"""Many of the same at once: take-overs, tags and aborts. Whoever streams meanwhile goes on, and nothing is left."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio

from protos.sluice.v1 import generation_pb2 as pb
from tests.patience import PATIENCE
from tests.worker.kept_calls import begin, kept, numbers, resume, window
from tests.worker.served_worker import (
    Call,
    Refusal,
    generate_request,
    read_rest,
    read_until,
    reasons,
    serve_script,
)

SLOW: dict[str, Any] = {"step_milliseconds": 20}
STORM = 200


async def ending(call: Call) -> str:
    """How a stream ends: the reason of its refusal, or that of its end."""
    try:
        return reasons(await read_rest(call))[0]
    except grpc.aio.AioRpcError as error:
        reason: str = Refusal(error).info.reason
        return reason


async def test_of_many_who_take_a_stream_over_at_once_one_goes_on() -> None:
    async with serve_script(**SLOW) as worker:
        tasks = len(asyncio.all_tasks())
        first = kept(worker, max_tokens=4000)
        started = await begin(first)
        storm = [resume(worker, started.resume_id) for _ in range(STORM)]
        reading = [asyncio.ensure_future(ending(call)) for call in (first, *storm)]
        async with asyncio.timeout(PATIENCE):
            while sum(task.done() for task in reading) < STORM:
                await asyncio.sleep(0.01)
        ended = [task.result() for task in reading if task.done()]
        assert ended == ["TAKEN_OVER"] * STORM, "all but one, and it is still read"
        # Whoever comes next finds every message from the first on: none was lost on the way.
        last = resume(worker, started.resume_id)
        whole = await read_until(last, "delta")
        await worker.stub.Abort(pb.AbortRequest(request_id=started.request_id))
        whole += await read_rest(last)
        assert numbers(whole) == list(range(len(whole)))
        assert reasons(whole) == ["CANCELLED"]
        assert sorted(await asyncio.gather(*reading)) == ["TAKEN_OVER"] * (STORM + 1)
        await worker.stub.Abort(pb.AbortRequest(resume_id=started.resume_id, forget=True))
        assert worker.worker.num_kept == (0, 0)
        async with asyncio.timeout(PATIENCE):
            while len(asyncio.all_tasks()) > tasks:
                await asyncio.sleep(0.01)


async def test_tags_without_number_mean_no_more_streams_than_are_kept() -> None:
    async with serve_script(replay_streams=4) as worker:
        for number in range(STORM):
            tag = f"tag-{number}" if number % 2 else "always the same"
            await worker.generate(max_tokens=1, resume_window=window(), resume_tag=tag)
            assert worker.worker.num_kept[0] <= 4
        for tag, is_there in (
            (f"tag-{STORM - 1}", True),
            ("always the same", True),
            ("tag-1", False),
        ):
            request = pb.GenerateRequest(resume=pb.Resume(resume_tag=tag))
            found = await ending(worker.stub.Generate(request))
            assert found == ("LENGTH" if is_there else "STREAM_NOT_FOUND")


async def test_aborts_of_what_is_not_there_harm_nobody_who_is() -> None:
    async with serve_script(**SLOW) as worker:
        witness = worker.stub.Generate(generate_request(max_tokens=4000, request_id="witness"))
        await read_until(witness, "delta")
        requests = [
            pb.AbortRequest(request_id=f"nobody-{number}", key_id="somebody")
            if number % 2
            else pb.AbortRequest(resume_id=f"rs_{number:048x}", forget=True)
            for number in range(2000)
        ]
        requests += [pb.AbortRequest(request_id="witness", key_id="another")] * 100
        answers = await asyncio.gather(*map(worker.stub.Abort, requests))
        assert {answer.outcome for answer in answers} == {pb.ABORT_OUTCOME_UNKNOWN}
        assert (await worker.load()).requests == 1
        aborted = await worker.stub.Abort(pb.AbortRequest(request_id="witness"))
        assert aborted.outcome == pb.ABORT_OUTCOME_ABORTED
        assert reasons(await read_rest(witness)) == ["CANCELLED"]
