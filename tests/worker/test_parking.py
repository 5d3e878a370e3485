"""Streams whose generation is parked while nobody reads: memory free at once, and the rest exactly what it would be."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import grpc
import pytest

from inference_worker import parkable
from inference_worker.engine.runner import Row, RowOutput
from inference_worker.kept_streams import KeptStreams, ReplayLimits
from inference_worker.registry import Registry
from inference_worker.resume_terms import read_terms
from inference_worker.scripted_model import ScriptedRunner
from inference_worker.served_model import ServedModel
from inference_worker.settings import WorkerSettings
from protos.sluice.v1 import generation_pb2 as pb
from tests.patience import PATIENCE
from tests.worker.kept_calls import ENDLESS, SLOW, begin, numbers, resume, window
from tests.worker.parked_calls import LEISURELY, num_parked, parked, parking, scrape
from tests.worker.same_streams import assert_same
from tests.worker.served_worker import (
    generate_request,
    read_rest,
    read_until,
    reasons,
    refusal_of,
    serve_script,
)
from tests.worker.stream_record import StreamRecord


async def test_who_goes_away_frees_the_memory_and_finds_the_rest() -> None:
    wanted: dict[str, Any] = {"n": 2, "max_tokens": 60, "output": pb.Output(logprobs=2, echo=True)}
    async with serve_script() as worker:
        uncut = StreamRecord().add(await worker.generate(**wanted))
        for cuts in (1, 3):
            worker.set_pace(LEISURELY)
            call = worker.stub.Generate(parking(request_id="one", **wanted))
            read = await read_until(call, "started")
            assert read[0].started.while_unread == pb.WHILE_UNREAD_PARK
            for _ in range(cuts):
                read += await read_until(call, "delta")
                await parked(worker, call)
                call = resume(worker, read[0].started.resume_id, read[-1].sequence_number)
            worker.set_pace(0)
            read += await read_rest(call)
            assert numbers(read) == list(range(len(read)))
            assert_same(StreamRecord().add(read), uncut)
            assert read[-1].finished.usage.completion_tokens == 120
            assert num_parked(worker) == 0
            again = await read_rest(resume(worker, read[0].started.resume_id))
            assert again == read, "the same messages under the same numbers"
        metrics = scrape(worker)
        assert metrics.total("sluice_cancel_seconds_count") == 4, "one for each time"
        assert metrics("sluice_request_seconds_count", outcome="disconnected") == 4


@pytest.mark.parametrize("mode", pb.WhileUnread.values())
async def test_otherwise_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, mode: pb.WhileUnread.ValueType
) -> None:
    if mode == pb.WHILE_UNREAD_PARK:  # of an engine that would begin anew
        monkeypatch.setattr(ServedModel, "takes_continuations", False)
    async with serve_script() as worker:
        request = generate_request(resume_window=window(), max_tokens=500, while_unread=mode)
        call = worker.stub.Generate(request)
        started = await begin(call)
        assert started.while_unread == pb.WHILE_UNREAD_CONTINUE
        call.cancel()
        await worker.wait_idle()  # it ended without a reader
        assert num_parked(worker) == 0
        snapshot = await read_rest(resume(worker, started.resume_id, 0, snapshot=True))
        assert reasons(snapshot) == ["LENGTH"]


async def test_a_snapshot_leaves_it_parked() -> None:
    async with serve_script(**SLOW) as worker:
        call = worker.stub.Generate(parking(**ENDLESS))
        read = await read_until(call, "delta")
        await parked(worker, call)
        name = read[0].started.resume_id
        snapshot = await read_rest(resume(worker, name, snapshot=True))
        assert [each.WhichOneof("event") for each in snapshot[:2]] == ["started", "delta"]
        assert num_parked(worker) == 1
        await worker.wait_idle()


async def test_a_window_that_passes_leaves_nothing() -> None:
    async with serve_script(**SLOW) as worker:
        call = worker.stub.Generate(parking(0.05, request_id="one", **ENDLESS))
        started = await begin(call)
        call.cancel()
        async with asyncio.timeout(PATIENCE):
            while worker.worker.num_kept != (0, 0):
                await asyncio.sleep(0.01)
        assert (await refusal_of(resume(worker, started.resume_id))).code is (
            grpc.StatusCode.NOT_FOUND
        )
        await worker.generate(request_id="one")  # which is free again


async def test_it_keeps_its_id_and_can_be_aborted() -> None:
    async def abort(**fields: Any) -> pb.AbortOutcome.ValueType:
        return (await worker.stub.Abort(pb.AbortRequest(**fields))).outcome

    async with serve_script(**SLOW) as worker:
        for by_name in (False, True):
            caller = pb.Caller(key_id="alice")
            call = worker.stub.Generate(parking(request_id="one", caller=caller, n=2, **ENDLESS))
            read = await read_until(call, "delta")
            await parked(worker, call)
            taken = worker.stub.Generate(generate_request(request_id="one"))
            assert (await refusal_of(taken)).code is grpc.StatusCode.ALREADY_EXISTS
            name = read[0].started.resume_id
            named = {"resume_id": name} if by_name else {"request_id": "one"}
            assert await abort(key_id="bob", **named) == pb.ABORT_OUTCOME_UNKNOWN
            assert await abort(key_id="alice", **named) == pb.ABORT_OUTCOME_ABORTED
            assert await abort(key_id="alice", **named) == pb.ABORT_OUTCOME_ALREADY_FINISHED
            assert num_parked(worker) == 0
            whole = await read_rest(resume(worker, name, key="alice"))
            assert numbers(whole) == list(range(len(whole)))
            assert reasons(whole) == ["CANCELLED"] * 2
            counts = [each.finished.completion_tokens for each in whole[-2:]]
            assert whole[-1].finished.usage.completion_tokens == sum(counts) > 0
            forgotten = await abort(resume_id=name, forget=True)
            assert forgotten == pb.ABORT_OUTCOME_ALREADY_FINISHED
            assert (await refusal_of(resume(worker, name, key="alice"))).code is (
                grpc.StatusCode.NOT_FOUND
            )


async def test_an_abort_holds_whoever_leaves_before_it_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with serve_script(**SLOW) as worker:
        is_free, is_held = threading.Event(), threading.Event()
        is_free.set()
        execute = ScriptedRunner.execute

        def execute_when_free(runner: ScriptedRunner, rows: Sequence[Row]) -> list[RowOutput]:
            if not is_free.is_set():
                is_held.set()
                is_free.wait(PATIENCE)
            return execute(runner, rows)

        monkeypatch.setattr(ScriptedRunner, "execute", execute_when_free)
        call = worker.stub.Generate(parking(request_id="one", **ENDLESS))
        read = await read_until(call, "delta")
        is_free.clear()
        assert await asyncio.to_thread(is_held.wait, PATIENCE)
        aborted = await worker.stub.Abort(pb.AbortRequest(request_id="one"))
        assert aborted.outcome == pb.ABORT_OUTCOME_ABORTED
        name = read[0].started.resume_id
        stream = worker.worker._kept.get(name, None)
        assert stream is not None
        assert not stream.is_over
        call.cancel()
        async with asyncio.timeout(PATIENCE):
            while stream.is_read:
                await asyncio.sleep(0.01)
        is_free.set()
        await worker.wait_idle()
        assert num_parked(worker) == 0
        assert reasons(await read_rest(resume(worker, name))) == ["CANCELLED"]


async def test_a_draining_worker_goes_on_with_what_it_began() -> None:
    async with serve_script() as worker:
        worker.set_pace(LEISURELY)
        call = worker.stub.Generate(parking(max_tokens=40))
        read = await read_until(call, "delta")
        await parked(worker, call)
        worker.set_pace(0)
        worker.worker.stop_admitting()
        rest = resume(worker, read[0].started.resume_id, read[-1].sequence_number)
        assert reasons(await read_rest(rest)) == ["LENGTH"]


async def test_token_ids_are_for_who_asked() -> None:
    async with serve_script() as worker:
        for output in (pb.Output(), pb.Output(token_ids=True)):
            worker.set_pace(LEISURELY)
            call = worker.stub.Generate(parking(max_tokens=40, output=output))
            read = await read_until(call, "delta")
            await parked(worker, call)
            worker.set_pace(0)
            read += await read_rest(
                resume(worker, read[0].started.resume_id, read[-1].sequence_number)
            )
            choice = StreamRecord().add(read).choice(0)
            assert choice.num_tokens == 40
            assert len(choice.token_ids) == (40 if output.token_ids else 0)


@pytest.mark.parametrize(
    "request_",
    [
        generate_request(while_unread=pb.WHILE_UNREAD_PARK),
        generate_request(while_unread=pb.WHILE_UNREAD_CONTINUE),
        generate_request(while_unread=9, resume_window=window()),
    ],
)
async def test_bad_fields_are_named(request_: pb.GenerateRequest) -> None:
    async with serve_script() as worker:
        refusal = await refusal_of(worker.stub.Generate(request_))
        assert (refusal.code, refusal.field) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "while_unread",
        )


async def test_what_another_worker_began_is_parked_too() -> None:
    request = parking(max_tokens=60, is_continuable=True, output=pb.Output(logprobs=1))
    async with serve_script() as first, serve_script() as second:
        uncut = StreamRecord().add(await read_rest(first.stub.Generate(request)))
        for worker in (first, second):
            worker.set_pace(LEISURELY)
        call = first.stub.Generate(request)
        read = await read_until(call, "delta")
        call.cancel()
        name = read[0].started.resume_id
        rest = StreamRecord().add(read).going_on(request)
        rest.continuation.sequence_number = read[-1].sequence_number
        rest.continuation.resume_id = name
        call = second.stub.Generate(rest)
        header, *more = await read_until(call, "delta")
        assert header.started.resume_id == name
        await parked(second, call)
        second.set_pace(0)
        more += await read_rest(resume(second, name, more[-1].sequence_number))
        assert numbers(read + more) == list(range(len(read + more)))
        joined = StreamRecord().add(read).add(more)
        joined.choice(0).token_ids = uncut.choice(0).token_ids  # which a Resume did not ask for
        assert_same(joined, uncut)


def limits() -> ReplayLimits:
    return ReplayLimits.of(WorkerSettings(port=0))


async def test_one_that_ends_before_it_could_be_parked_is_over() -> None:
    """Its reader leaves before it begins, and all of its messages come at once."""

    async def generate(*_: object) -> AsyncGenerator[pb.GenerateResponse, None]:
        yield pb.GenerateResponse(started=pb.Started(request_id="one", n=1))
        yield pb.GenerateResponse(finished=pb.Finished(usage=pb.Usage()))

    registry, streams = Registry(), KeptStreams(limits())
    request = parking(resume_tag="chat")
    terms = read_terms(request)
    assert terms is not None
    stream = streams.open(terms)
    assert stream is not None
    stream.start(parkable.Parkable(request, None, generate, registry))
    reading = anext(stream.read())
    reading.send(None)  # it waits for the first message now
    with pytest.raises(asyncio.CancelledError):
        reading.throw(asyncio.CancelledError)
    async with asyncio.timeout(PATIENCE):
        while not stream.is_over:
            await asyncio.sleep(0)
    assert (stream.is_parked, streams.num_parked) == (False, 0)
    registry.check_free("one")
    resumed = stream.resume(0, is_snapshot=False, is_continuable=False)
    again = [message async for message in resumed]
    assert reasons(again) == ["UNSPECIFIED"]
    streams.close()
