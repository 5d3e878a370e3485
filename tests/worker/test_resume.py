"""Streams that outlive their calls, over real connections."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import random
from collections.abc import Iterable
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf import duration_pb2

from inference_worker.errors import StreamGone
from protos.sluice.v1 import generation_pb2 as pb
from tests.patience import PATIENCE
from tests.worker.served_worker import (
    LONG_STREAMS,
    Call,
    Refusal,
    ServedWorker,
    generate_request,
    kinds,
    read_rest,
    read_until,
    reasons,
    refusal_of,
    serve_script,
    stalled_call,
)
from tests.worker.stream_record import ChoiceRecord, StreamRecord

ENDLESS: dict[str, Any] = {"max_tokens": 4000}
SLOW: dict[str, Any] = {"step_milliseconds": 2}


def window(seconds: float = 60) -> duration_pb2.Duration:
    duration = duration_pb2.Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration


def kept(worker: ServedWorker, seconds: float = 60, **fields: Any) -> Call:
    request = generate_request(resume_window=window(seconds), **fields)
    return worker.stub.Generate(request)


def resume(
    worker: ServedWorker, resume_id: str, after: int | None = None, key: str = "", **fields: Any
) -> Call:
    message = pb.Resume(resume_id=resume_id, after_sequence_number=after, **fields)
    request = pb.GenerateRequest(resume=message)
    if key:
        request.caller.key_id = key
    return worker.stub.Generate(request)


async def begin(call: Call) -> pb.Started:
    message = await call.read()
    assert isinstance(message, pb.GenerateResponse)
    assert message.started.resume_id
    return message.started


async def end(worker: ServedWorker, started: pb.Started) -> None:
    await worker.stub.Abort(pb.AbortRequest(request_id=started.request_id))
    await worker.wait_idle()


def numbers(messages: list[pb.GenerateResponse]) -> list[int]:
    return [message.sequence_number for message in messages]


def untimed(record: StreamRecord) -> dict[int, ChoiceRecord]:
    choices = copy.deepcopy(record.choices)
    for choice in choices.values():
        assert choice.finished is not None
        choice.finished.ClearField("timings")
    return choices


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


async def test_without_a_window_nothing_is_kept() -> None:
    async with serve_script(**SLOW) as worker:
        call = worker.stub.Generate(generate_request(**ENDLESS))
        started = (await read_until(call, "started"))[0].started
        assert not started.HasField("resume_id")
        assert not started.HasField("resume_window")
        call.cancel()
        await worker.wait_idle()


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


async def test_a_window_that_passes_ends_the_generation_and_frees_its_memory() -> None:
    async with serve_script(**SLOW) as worker:
        call = kept(worker, 0.05, **ENDLESS)
        started = await begin(call)
        assert started.resume_window.ToNanoseconds() == 50_000_000
        call.cancel()
        await worker.wait_idle()
        assert worker.worker.num_kept == (0, 0)
        refusal = await refusal_of(resume(worker, started.resume_id, 0))
        assert (refusal.code, refusal.info.reason) == (
            grpc.StatusCode.NOT_FOUND,
            "STREAM_NOT_FOUND",
        )


async def test_an_ended_stream_is_forgotten_when_its_window_has_passed() -> None:
    async with serve_script() as worker:
        messages = await read_rest(kept(worker, 0.05))
        async with asyncio.timeout(PATIENCE):
            while worker.worker.num_kept != (0, 0):
                await asyncio.sleep(0.01)
        refusal = await refusal_of(resume(worker, messages[0].started.resume_id))
        assert refusal.code is grpc.StatusCode.NOT_FOUND


async def test_a_reader_who_comes_back_stops_the_window() -> None:
    async with serve_script(**SLOW) as worker, asyncio.timeout(PATIENCE):
        loop = asyncio.get_running_loop()
        while True:
            call = kept(worker, 0.3, **ENDLESS)
            started = await begin(call)
            call.cancel()
            call = resume(worker, started.resume_id, 0)
            with contextlib.suppress(grpc.aio.AioRpcError):  # one who comes back too late
                assert isinstance(await call.read(), pb.GenerateResponse)
                break
        until = loop.time() + 0.6
        while loop.time() < until:
            assert isinstance(await call.read(), pb.GenerateResponse)
        await end(worker, started)


async def test_a_caller_who_leaves_before_the_name_is_told_ends_it_at_once() -> None:
    async with serve_script(**SLOW) as worker:
        request = generate_request(resume_window=window(), **ENDLESS)
        reading = asyncio.ensure_future(anext(worker.worker.generate(request)))
        await asyncio.sleep(0)  # it waits for the first message now
        assert not reading.done()
        assert worker.worker.num_kept == (1, 0)
        reading.cancel()
        await worker.wait_idle()
        assert worker.worker.num_kept == (0, 0)


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


async def test_only_the_key_that_began_it_resumes_it() -> None:
    async with serve_script() as worker:
        caller = pb.Caller(key_id="alice")
        messages = await read_rest(kept(worker, caller=caller, resume_tag="chat"))
        resume_id = messages[0].started.resume_id
        for key in ("", "bob", "alic"):
            refusal = await refusal_of(resume(worker, resume_id, key=key))
            assert refusal.code is grpc.StatusCode.NOT_FOUND
            refusal = await refusal_of(resume(worker, "", key=key, resume_tag="chat"))
            assert refusal.code is grpc.StatusCode.NOT_FOUND
        assert await read_rest(resume(worker, resume_id, key="alice")) == messages
        assert await read_rest(resume(worker, "", key="alice", resume_tag="chat")) == messages


async def test_a_tag_means_the_latest_stream_that_was_admitted() -> None:
    async with serve_script() as worker:
        await read_rest(kept(worker, resume_tag="chat", request_id="one"))
        await read_rest(kept(worker, resume_tag="chat", request_id="two"))
        refused = kept(worker, resume_tag="chat", request_id="three", n=1000)
        assert (await refusal_of(refused)).field == "n"
        messages = await read_rest(resume(worker, "", resume_tag="chat"))
        assert messages[0].started.request_id == "two"


async def test_ids_cannot_be_guessed() -> None:
    async with serve_script() as worker:
        ids = {(await worker.generate(resume_window=window()))[0].started.resume_id for _ in "abc"}
        assert len(ids) == 3
        assert all(len(name.removeprefix("rs_")) * 4 >= 128 for name in ids)
        for wrong in ("rs_", "rs_" + "0" * 48, next(iter(ids))[:-1], "x" * 10_000, "\0"):
            refusal = await refusal_of(resume(worker, wrong))
            assert refusal.code is grpc.StatusCode.NOT_FOUND


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


async def test_streams_and_bytes_are_bounded() -> None:
    async with serve_script(replay_streams=2, **SLOW) as worker:
        names = [
            (await worker.generate(resume_window=window()))[0].started.resume_id for _ in range(3)
        ]
        assert worker.worker.num_kept[0] == 2
        assert (await refusal_of(resume(worker, names[0]))).code is grpc.StatusCode.NOT_FOUND
        running = [kept(worker, **ENDLESS) for _ in range(2)]
        begun = [await begin(call) for call in running]
        surplus = kept(worker, **ENDLESS)  # runs like one without a window
        started = (await read_until(surplus, "started"))[0].started
        assert not started.HasField("resume_id")
        surplus.cancel()
        await worker.wait_for(requests=2)
        for one in begun:
            await worker.stub.Abort(pb.AbortRequest(request_id=one.request_id))
        await worker.wait_idle()
    async with serve_script(replay_bytes=2048) as worker:
        ended = await worker.generate(resume_window=window(), max_tokens=500, n=16)
        assert worker.worker.num_kept[1] <= 2048 + 256
        refusal = await refusal_of(resume(worker, ended[0].started.resume_id))
        assert refusal.code is grpc.StatusCode.OUT_OF_RANGE
    async with serve_script(replay_total_bytes=2048) as worker:
        for _ in range(20):
            await worker.generate(resume_window=window(), n=4)
            assert worker.worker.num_kept[1] <= 2048 + 256  # a message beside the limit
        big = kept(worker, n=16, max_tokens=50, output=pb.Output(logprobs=5, token_ids=True))
        whole = StreamRecord().add(await read_rest(big))
        assert [choice.num_tokens for _, choice in sorted(whole.choices.items())] == [50] * 16
        assert whole.started is not None
        refusal = await refusal_of(resume(worker, whole.started.resume_id))
        assert refusal.info.reason == "STREAM_GONE", "but not all of it is kept"


async def test_a_request_that_is_refused_makes_no_stream_go() -> None:
    async with serve_script(max_running=1, max_waiting=1, replay_streams=1, **SLOW) as worker:
        ended = await worker.generate(resume_window=window())
        filling = [worker.stub.Generate(generate_request(**ENDLESS)) for _ in range(2)]
        for call in filling:
            await read_until(call, "started")
        assert (await refusal_of(kept(worker))).info.reason == "QUEUE_FULL"
        assert await read_rest(resume(worker, ended[0].started.resume_id)) == ended
        for call in filling:
            call.cancel()


async def test_annotations_are_bounded_with_the_rest() -> None:
    async with serve_script(replay_total_bytes=64 * 1024, **SLOW) as worker:
        note = b"x" * 30 * 1024
        running = [kept(worker, annotation=note, **ENDLESS) for _ in range(2)]
        begun = [await begin(call) for call in running]
        surplus = kept(worker, annotation=note)
        assert not (await read_until(surplus, "started"))[0].started.HasField("resume_id")
        assert worker.worker.num_kept[0] == 2
        for started in begun:
            await worker.stub.Abort(pb.AbortRequest(request_id=started.request_id))


async def test_a_stream_that_went_on_at_another_worker_is_resumed_there_by_its_name() -> None:
    request = generate_request(
        max_tokens=200,
        is_continuable=True,
        resume_window=window(),
        output=pb.Output(token_ids=True),
    )
    async with serve_script(**SLOW) as first, serve_script(**SLOW) as second:
        uncut = StreamRecord().add(await read_rest(first.stub.Generate(request)))
        call = first.stub.Generate(request)
        begun = await read_until(call, "delta")
        call.cancel()
        joined = StreamRecord().add(begun)
        started = begun[0].started
        rest = joined.going_on(request)
        rest.continuation.sequence_number = begun[-1].sequence_number
        rest.continuation.resume_id = started.resume_id

        call = second.stub.Generate(rest)
        more = await read_until(call, "delta")
        call.cancel()
        assert numbers(more) == [begun[-1].sequence_number + i for i in range(len(more))]
        assert more[0].started.resume_id == started.resume_id
        last = more[-1].sequence_number
        end = await read_rest(resume(second, started.resume_id, last))
        assert numbers(end) == [last + 1 + i for i in range(len(end))]
        assert untimed(joined.add(more).add(end)) == untimed(uncut)

        # what the first worker sent is not here, and the header is not what it sent under this number
        for after in (None, begun[-1].sequence_number - 1):
            refusal = await refusal_of(resume(second, started.resume_id, after))
            assert refusal.code == grpc.StatusCode.OUT_OF_RANGE
        # nobody takes the name of a stream that is kept here
        taken = await begin(second.stub.Generate(rest))
        assert taken.resume_id != started.resume_id


async def resume_continuably(
    worker: ServedWorker, resume_id: str, after: int | None, key: str = ""
) -> tuple[Call, pb.Resumed]:
    call = resume(worker, resume_id, after, key, is_continuable=True)
    message = await call.read()
    assert isinstance(message, pb.GenerateResponse)
    assert message.HasField("resumed")
    return call, message.resumed


def going_on(
    resumed: pb.Resumed, after: int | None, caller: pb.Caller | None = None
) -> pb.GenerateRequest:
    """The request for what is missing, made from nothing but what who resumed was told."""
    rest = pb.GenerateRequest()
    rest.CopyFrom(resumed.request)
    rest.request_id = resumed.started.request_id
    rest.sampling.CopyFrom(resumed.started.sampling)
    rest.stopping.max_tokens = resumed.started.max_tokens
    rest.n = resumed.started.n
    rest.continuation.choices.extend(resumed.choices)
    rest.continuation.sequence_number = after or 0
    rest.continuation.resume_id = resumed.started.resume_id
    if caller is not None:
        rest.caller.CopyFrom(caller)
    return rest


@pytest.mark.parametrize("replay_messages", [16, 65536])
async def test_who_resumes_can_go_on_elsewhere_from_wherever_it_was_cut(
    replay_messages: int,
) -> None:
    """With a small ring most of what was read is no longer kept, and is told all the same."""
    caller = pb.Caller(key_id="a")
    request = generate_request(
        n=2,
        max_tokens=300,
        is_continuable=True,
        resume_window=window(),
        resume_tag="chat",
        annotation=b"note",
        caller=caller,
        output=pb.Output(logprobs=2, token_ids=True, echo=True),
    )
    settings = SLOW | {"replay_messages": replay_messages, "prefix_cache": False}
    async with serve_script(**settings) as first, serve_script(**settings) as second:
        workers = [first, second]
        uncut = StreamRecord().add(await read_rest(first.stub.Generate(request)))
        rng = random.Random(3)
        call = first.stub.Generate(request)
        read = await read_until(call, "delta")
        started = read[0].started
        for turn in range(4):
            wanted = rng.randrange(20, 60)  # tokens, of which a slow reader gets many in a message
            while wanted > 0:
                message = await call.read()
                assert isinstance(message, pb.GenerateResponse)
                read.append(message)
                wanted -= message.delta.token_count
            call.cancel()
            last = read[-1].sequence_number
            call, resumed = await resume_continuably(
                workers[turn % 2], started.resume_id, last, key="a"
            )
            record = StreamRecord().add(read)
            assert sorted_choices(resumed.choices) == sorted_choices(
                record.going_on(request).continuation.choices
            )
            assert resumed.request.resume_tag == "chat"
            assert resumed.request.annotation == b"note"
            assert not resumed.request.HasField("caller")
            # this worker is lost, and the other one goes on: with the stream, its name and all that is told of it
            call.cancel()
            call = workers[(turn + 1) % 2].stub.Generate(going_on(resumed, last, caller))
            header = (await begin(call)).resume_id
            assert header == started.resume_id
            abort = pb.AbortRequest(resume_id=started.resume_id, forget=True)
            await workers[turn % 2].stub.Abort(abort)
        read += await read_rest(call)
        assert numbers(read) == list(range(len(read)))
        assert untimed(StreamRecord().add(read)) == untimed(uncut)


def sorted_choices(choices: Iterable[pb.DeliveredChoice]) -> list[pb.DeliveredChoice]:
    return sorted(choices, key=lambda choice: choice.choice_index)


async def test_what_is_told_of_a_stream_leaves_it_the_time_that_it_has() -> None:
    timeout = window(600)
    async with serve_script() as worker:
        call = kept(worker, is_continuable=True, timeout=timeout)
        started = await begin(call)
        await read_rest(call)
        _, resumed = await resume_continuably(worker, started.resume_id, None)
        left = resumed.request.timeout.ToNanoseconds() / 1e9
        assert 0 < left < 600
        assert resumed.created_at == started.created_at
        assert not resumed.choices


@pytest.mark.parametrize(
    ("settings", "fields"),
    [
        ({}, {}),  # nobody said that it would be gone on with
        ({"replay_bytes": 16 * 1024}, {"is_continuable": True, "text": "word " * 1000}),
        ({"replay_bytes": 1024, "replay_messages": 4}, {"is_continuable": True, "max_tokens": 400}),
    ],
)
async def test_what_is_kept_for_other_workers_is_bounded(
    settings: dict[str, Any], fields: dict[str, Any]
) -> None:
    async with serve_script(**settings) as worker:
        call = kept(worker, **fields)
        messages = await read_rest(call)
        last = messages[-2].sequence_number
        call, resumed = await resume_continuably(worker, messages[0].started.resume_id, last)
        assert resumed.HasField("created_at")
        assert not resumed.HasField("request")
        rest = await read_rest(call)
        assert kinds(rest) == ["finished"]
        assert worker.worker.num_kept[1] <= settings.get("replay_bytes", 2**20)


async def test_who_resumes_sees_no_token_ids_that_were_for_a_continuation() -> None:
    async with serve_script() as worker:
        call = kept(worker, is_continuable=True, max_tokens=20)
        started = await begin(call)
        first = StreamRecord().add(await read_rest(call)).choices[0]
        assert len(first.token_ids) == 20
        again = StreamRecord().add(await read_rest(resume(worker, started.resume_id))).choices[0]
        assert (again.text, again.token_ids) == (first.text, [])


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


async def test_abort_ends_a_stream_without_a_reader() -> None:
    async with serve_script(**SLOW) as worker:
        call = kept(worker, **ENDLESS)
        started = await begin(call)
        call.cancel()
        await end(worker, started)
        messages = await read_rest(resume(worker, started.resume_id, 0))
        assert reasons(messages) == ["CANCELLED"]


async def test_what_is_to_be_forgotten_is_ended_and_gone() -> None:
    async with serve_script(**SLOW) as worker:

        async def forget(resume_id: str, **fields: Any) -> pb.AbortOutcome.ValueType:
            request = pb.AbortRequest(resume_id=resume_id, forget=True, **fields)
            return (await worker.stub.Abort(request)).outcome

        call = kept(worker, caller=pb.Caller(key_id="alice"), resume_tag="chat", **ENDLESS)
        resume_id = (await begin(call)).resume_id
        for wrong in ({"key_id": "bob"}, {"key_id": "alic"}):
            assert await forget(resume_id, **wrong) == pb.ABORT_OUTCOME_UNKNOWN
        assert await forget(resume_id, key_id="alice") == pb.ABORT_OUTCOME_ABORTED
        for name, tag in ((resume_id, ""), ("", "chat")):
            refusal = await refusal_of(resume(worker, name, key="alice", resume_tag=tag))
            assert refusal.code is grpc.StatusCode.NOT_FOUND
        assert await forget(resume_id) == pb.ABORT_OUTCOME_UNKNOWN
        assert reasons(await read_rest(call)) == ["CANCELLED"], "who reads it hears its end"

        unread = kept(worker, **ENDLESS)
        resume_id = (await begin(unread)).resume_id
        unread.cancel()
        assert await forget(resume_id) == pb.ABORT_OUTCOME_ABORTED

        ended = await worker.generate(resume_window=window())
        resume_id = ended[0].started.resume_id
        request = pb.AbortRequest(resume_id=resume_id)
        outcome = (await worker.stub.Abort(request)).outcome
        assert outcome == pb.ABORT_OUTCOME_ALREADY_FINISHED
        assert await read_rest(resume(worker, resume_id)) == ended, "it was to end, no more"
        assert await forget(resume_id) == pb.ABORT_OUTCOME_ALREADY_FINISHED
        assert (await refusal_of(resume(worker, resume_id))).code is grpc.StatusCode.NOT_FOUND
        await worker.wait_idle()
        assert worker.worker.num_kept == (0, 0)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("request_id", pb.AbortRequest()),
        ("request_id", pb.AbortRequest(request_id="one", resume_id="two")),
        ("forget", pb.AbortRequest(request_id="one", forget=True)),
    ],
)
async def test_what_an_abort_means_is_said_once(field: str, message: pb.AbortRequest) -> None:
    async with serve_script() as worker:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await worker.stub.Abort(message)
        refusal = Refusal(caught.value)
        assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)


async def test_the_deadline_of_the_first_call_ends_the_generation() -> None:
    async with serve_script(**SLOW) as worker:
        request = generate_request(resume_window=window(), **ENDLESS)
        while True:
            call = worker.stub.Generate(request, timeout=1)
            with contextlib.suppress(grpc.aio.AioRpcError):  # it passed before there was a stream
                started = await begin(call)
                break
        call.cancel()
        await worker.wait_idle()
        assert reasons(await read_rest(resume(worker, started.resume_id, 0))) == ["DEADLINE"]


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


@pytest.mark.parametrize(
    ("field", "request_"),
    [
        ("resume.resume_id", pb.GenerateRequest(resume=pb.Resume())),
        (
            "resume.resume_id",
            pb.GenerateRequest(resume=pb.Resume(resume_id="rs_", resume_tag="t")),
        ),
        ("n", pb.GenerateRequest(resume=pb.Resume(resume_id="rs_"), n=1)),
        (
            "resume.is_continuable",
            pb.GenerateRequest(
                resume=pb.Resume(resume_id="rs_", snapshot=True, is_continuable=True)
            ),
        ),
        (
            "caller.key_id",
            pb.GenerateRequest(resume=pb.Resume(resume_id="rs_"), caller=pb.Caller(key_id="a b")),
        ),
        ("resume_window", generate_request(resume_window=window(0))),
        ("resume_window", generate_request(resume_window=window(-1))),
        ("resume_window", generate_request(resume_window=window(86_401))),
        ("resume_tag", generate_request(resume_tag="t")),
        ("resume_tag", generate_request(resume_tag="", resume_window=window())),
        ("resume_tag", generate_request(resume_tag="t" * 257, resume_window=window())),
        ("annotation", generate_request(annotation=b"a")),
        ("annotation", generate_request(annotation=b"a" * (2**20 + 1), resume_window=window())),
        ("caller.key_id", generate_request(caller=pb.Caller())),
        ("caller.key_id", generate_request(caller=pb.Caller(key_id="a" * 65))),
    ],
)
async def test_bad_fields_are_named(field: str, request_: pb.GenerateRequest) -> None:
    async with serve_script() as worker:
        refusal = await refusal_of(worker.stub.Generate(request_))
        assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)
        assert worker.worker.num_kept == (0, 0)


async def test_a_window_is_cut_to_the_workers() -> None:
    async with serve_script(max_resume_seconds=5) as worker:
        started = (await worker.generate(resume_window=window(60)))[0].started
        assert started.resume_window.seconds == 5
    async with serve_script(max_resume_seconds=0) as worker:
        started = (await worker.generate(resume_window=window(60)))[0].started
        assert not started.HasField("resume_id")
