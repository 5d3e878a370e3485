"""Streams that outlive their calls, over real connections: what whoever comes back is given."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import grpc
import grpc.aio
import pytest

from inference_worker.errors import StreamGone
from protos.sluice.v1 import generation_pb2 as pb
from tests.worker.kept_calls import (
    ENDLESS,
    SLOW,
    begin,
    end,
    kept,
    numbers,
    resume,
    untimed,
    window,
)
from tests.worker.served_worker import (
    LONG_STREAMS,
    Call,
    Refusal,
    kinds,
    read_rest,
    read_until,
    reasons,
    refusal_of,
    serve_script,
    stalled_call,
)
from tests.worker.stream_record import StreamRecord


async def test_a_resumed_stream_goes_on_where_it_was_cut() -> None:
    wanted: dict[str, Any] = {
        "n": 2,
        "max_tokens": 200,
        "output": pb.Output(logprobs=2, token_ids=True, echo=True),
    }
    async with serve_script() as worker:
        uncut = StreamRecord().add(await worker.generate(**wanted))
        rng = random.Random(5)
        for _ in range(10):
            call, read = kept(worker, **wanted), []
            while True:
                message = await call.read()
                if not isinstance(message, pb.GenerateResponse):
                    break
                read.append(message)
                if len(read) == 1 or rng.random() < 0.3:
                    call.cancel()
                    call = resume(worker, read[0].started.resume_id, len(read) - 1)
            assert numbers(read) == list(range(len(read)))
            assert untimed(StreamRecord().add(read)) == untimed(uncut)
            again = await read_rest(resume(worker, read[0].started.resume_id))
            assert again == read, "the same messages under the same numbers"


async def test_only_who_may_continue_a_stream_gets_token_ids_that_nobody_asked_for() -> None:
    async with serve_script() as worker:
        messages = await read_rest(kept(worker, max_tokens=30, is_continuable=True))
        assert len(StreamRecord().add(messages).choice(0).token_ids) == 30
        again = await read_rest(resume(worker, messages[0].started.resume_id))
        assert numbers(again) == numbers(messages)
        choice = StreamRecord().add(again).choice(0)
        assert (choice.num_tokens, choice.token_ids) == (30, [])


async def test_a_reader_who_went_away_finds_the_end() -> None:
    async with serve_script() as worker:
        call = kept(worker, max_tokens=500)
        started = await begin(call)
        call.cancel()
        await worker.wait_idle()  # it ended without a reader
        messages = await read_rest(resume(worker, started.resume_id, 0))
        assert reasons(messages) == ["LENGTH"]
        assert messages[-1].finished.completion_tokens == 500
        assert await read_rest(resume(worker, started.resume_id, numbers(messages)[-1])) == []


async def test_a_resume_takes_the_stream_over() -> None:
    async with serve_script(**SLOW) as worker:
        older = kept(worker, **ENDLESS)
        started = await begin(older)
        await read_until(older, "delta")
        newer = resume(worker, started.resume_id, 0)
        assert (await read_until(newer, "delta"))[0].sequence_number == 1
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read_rest(older)
        refusal = Refusal(caught.value)
        assert (refusal.code, refusal.info.reason) == (grpc.StatusCode.ABORTED, "TAKEN_OVER")
        assert isinstance(await newer.read(), pb.GenerateResponse)
        await end(worker, started)
        assert reasons(await read_rest(newer)) == ["CANCELLED"]


async def test_who_asks_for_what_is_gone_takes_the_stream_from_nobody() -> None:
    async with serve_script(replay_messages=2, **SLOW) as worker:
        call = kept(worker, **ENDLESS)
        started = await begin(call)
        while (await read_until(call, "delta"))[-1].sequence_number < 4:
            pass
        assert (await refusal_of(resume(worker, started.resume_id))).info.reason == "STREAM_GONE"
        stream = worker.worker._kept.get(started.resume_id, None)
        assert stream is not None
        first = stream.replay.first
        late = stream.resume(first, is_snapshot=False, is_continuable=False)
        while stream.replay.first == first:  # it is gone before it is read
            stream.replay.drop_oldest()
        with pytest.raises(StreamGone):
            await anext(late)
        assert stream.is_read
        await end(worker, started)
        assert reasons(await read_rest(call)) == ["CANCELLED"]


async def test_a_snapshot_leaves_the_stream_to_its_reader() -> None:
    async with serve_script(**SLOW) as worker:
        call = kept(worker, annotation=b"note", **ENDLESS)
        started = await begin(call)
        assert not started.HasField("annotation")
        await read_until(call, "delta")
        snapshot = await read_rest(resume(worker, started.resume_id, snapshot=True))
        assert kinds(snapshot)[:2] == ["started", "delta"]
        assert snapshot[0].started.annotation == b"note"
        await end(worker, started)
        assert reasons(await read_rest(call)) == ["CANCELLED"]
        assert reasons(await read_rest(resume(worker, started.resume_id, snapshot=True))) == [
            "CANCELLED"
        ]


async def test_what_is_no_longer_kept_is_out_of_range() -> None:
    async with serve_script(replay_messages=4) as worker:
        messages = await read_rest(kept(worker, n=8, max_tokens=3))
        resume_id = messages[0].started.resume_id
        last = messages[-1].sequence_number
        refusal = await refusal_of(resume(worker, resume_id, last - 5))
        assert (refusal.code, refusal.info.reason) == (grpc.StatusCode.OUT_OF_RANGE, "STREAM_GONE")
        assert refusal.field == "resume.after_sequence_number"
        assert await read_rest(resume(worker, resume_id, last - 3)) == messages[-3:]


async def test_a_number_that_is_not_there_yet_is_refused() -> None:
    async with serve_script() as worker:
        messages = await read_rest(kept(worker))
        for number in (messages[-1].sequence_number + 1, 2**64 - 1):
            refusal = await refusal_of(resume(worker, messages[0].started.resume_id, number))
            assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
            assert refusal.field == "resume.after_sequence_number"


async def test_a_slow_reader_holds_nobody_up_and_misses_nothing() -> None:
    async with (
        serve_script(**LONG_STREAMS) as worker,
        stalled_call(worker, resume_window=window()) as call,
    ):
        await worker.wait_idle()  # the generation is over, though hardly anything was read
        messages = await read_rest(call)
        assert numbers(messages) == list(range(1, len(messages) + 1))
        assert len(messages) < 4000, "what waited was joined"
        joined = StreamRecord().add(messages).choice(0)
        assert (joined.num_tokens, len(joined.logprobs), len(joined.token_ids)) == (8000,) * 3


async def refusal_of_read(call: Call) -> Refusal:
    """As refusal_of, for a call of which something was read."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read_rest(call)
    return Refusal(caught.value)


async def test_a_failure_is_kept_too() -> None:
    async with serve_script(failing_seed=7) as worker:
        call = kept(worker, sampling=pb.Sampling(seed=7))
        started = await begin(call)
        assert (await refusal_of_read(call)).code is grpc.StatusCode.INTERNAL
        again = resume(worker, started.resume_id, 0)
        assert (await refusal_of(again)).code is grpc.StatusCode.INTERNAL


async def test_a_drain_ends_streams_without_readers_and_tells_those_who_have_one() -> None:
    async with serve_script(**SLOW) as worker:
        left, read = kept(worker, **ENDLESS), kept(worker, **ENDLESS)
        gone, _ = await begin(left), await begin(read)
        left.cancel()
        worker.worker.stop_admitting()
        assert (await refusal_of(kept(worker))).code is grpc.StatusCode.UNAVAILABLE
        draining = asyncio.create_task(worker.worker.drain(0))
        assert reasons(await read_rest(read)) == ["SHUTDOWN"]
        await draining
        assert reasons(await read_rest(resume(worker, gone.resume_id, 0))) == ["SHUTDOWN"]
