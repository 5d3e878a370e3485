"""A kept stream whose worker is lost: what whoever resumed it is told, so that another worker goes on with it."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import grpc
import grpc.aio
import pytest

from inference_worker.replay import MESSAGE_OVERHEAD
from protos.sluice.v1 import generation_pb2 as pb
from tests.worker.kept_calls import SLOW, begin, kept, numbers, resume, untimed, window
from tests.worker.served_worker import (
    Call,
    ServedWorker,
    generate_request,
    kinds,
    read_rest,
    read_until,
    refusal_of,
    serve_script,
)
from tests.worker.stream_record import StreamRecord


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
        # room is made for a message while the limit is reached, and only then: one more may be there
        one_more = max(message.ByteSize() for message in messages) + MESSAGE_OVERHEAD
        assert worker.worker.num_kept[1] < settings.get("replay_bytes", 2**20) + one_more


async def test_who_resumes_sees_no_token_ids_that_were_for_a_continuation() -> None:
    async with serve_script() as worker:
        call = kept(worker, is_continuable=True, max_tokens=20)
        started = await begin(call)
        first = StreamRecord().add(await read_rest(call)).choices[0]
        assert len(first.token_ids) == 20
        again = StreamRecord().add(await read_rest(resume(worker, started.resume_id))).choices[0]
        assert (again.text, again.token_ids) == (first.text, [])
