"""Streams whose generation is parked while nobody reads: memory free at once, and the rest exactly what it would be."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import generate_latest

from inference_worker import parkable
from inference_worker.engine.runner import Row, RowOutput
from inference_worker.kept_streams import KeptStreams, ReplayLimits
from inference_worker.registry import Registry
from inference_worker.resume_terms import read_terms
from inference_worker.scripted_model import ScriptedRunner
from inference_worker.served_model import ServedModel
from inference_worker.settings import WorkerSettings
from protos.sluice.v1 import generation_pb2 as pb
from tests.metrics_text import Scrape
from tests.patience import PATIENCE
from tests.worker.kept_calls import ENDLESS, SLOW, begin, numbers, resume, window
from tests.worker.served_worker import (
    Call,
    ServedWorker,
    generate_request,
    read_rest,
    read_until,
    reasons,
    refusal_of,
    serve,
    serve_script,
)
from tests.worker.stream_record import StreamRecord
from tests.worker.test_continuation import (
    MODELS,
    Stops,
    assert_same,
    requests,
    serve_embedded,
    serve_random,
    stops,
    tiny_llama,
)

# Milliseconds of a step: what is to be left before its end takes seconds, and then `set_pace(0)` ends it at once.
LEISURELY = 50


def parking(seconds: float = 60, **fields: Any) -> pb.GenerateRequest:
    return generate_request(
        resume_window=window(seconds), while_unread=pb.WHILE_UNREAD_PARK, **fields
    )


def scrape(worker: ServedWorker) -> Scrape:
    return Scrape(generate_latest(worker.worker.metrics.registry).decode())


def num_parked(worker: ServedWorker) -> int:
    return int(scrape(worker)("sluice_parked_streams"))


async def parked(worker: ServedWorker, call: Call, count: int = 1) -> None:
    """Leave the call, and wait until its generation has left the engine: no slot, no block, no place."""
    call.cancel()
    await worker.wait_idle()
    assert num_parked(worker) == count


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


async def test_who_comes_back_pays_for_what_is_computed_again() -> None:
    async with serve_script(prefix_cache=False, **SLOW) as worker:
        caller = pb.Caller(key_id="alice", tokens_per_minute=1)
        call = worker.stub.Generate(parking(caller=caller, ids=[5] * 1000, max_tokens=3000))
        read = await read_until(call, "delta")
        for _ in range(3):
            await parked(worker, call)
            before = (await worker.load()).generated_tokens
            call = resume(worker, read[0].started.resume_id, read[-1].sequence_number, key="alice")
            read += await read_until(call, "delta")
            # which may have been there already; nothing is paid before something is computed
            async with asyncio.timeout(PATIENCE):
                while (await worker.load()).generated_tokens == before:
                    await asyncio.sleep(0.002)
        call.cancel()
        await worker.wait_idle()
        refusal = await refusal_of(
            worker.stub.Generate(generate_request(caller=caller, max_tokens=1))
        )
        assert refusal.info.reason == "KEY_LIMIT"
        assert refusal.retry_seconds > 60 * 3900  # a minute for each token


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


async def test_what_finds_no_place_again_stays_parked() -> None:
    async with serve_script(max_running=1, max_waiting=1) as worker:
        worker.set_pace(LEISURELY)
        left = []
        for count in range(1, 5):
            call = worker.stub.Generate(parking(max_tokens=40))
            left.append(await read_until(call, "delta"))
            await parked(worker, call, count)
        blocker = worker.stub.Generate(generate_request(**ENDLESS))
        await read_until(blocker, "delta")
        again = [(each[0].started.resume_id, each[-1].sequence_number) for each in left]
        waiting = [resume(worker, *place) for place in again[:3]]
        await worker.wait_for(waiting=3)
        refused = resume(worker, *again[3])
        refusal = await refusal_of(refused)
        assert (refusal.code, refusal.info.reason) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "QUEUE_FULL",
        )
        assert refusal.has_retry
        assert num_parked(worker) == 1
        blocker.cancel()
        worker.set_pace(0)
        for call in waiting:
            assert reasons(await read_rest(call)) == ["LENGTH"]
        read = left[3] + await read_rest(resume(worker, *again[3]))
        assert numbers(read) == list(range(len(read)))
        assert StreamRecord().add(read).choice(0).num_tokens == 40


async def test_those_of_one_key_come_back_as_its_limit_lets_them() -> None:
    async with serve_script(**SLOW) as worker:
        caller = pb.Caller(key_id="alice", max_concurrent=1, tokens_per_minute=1)
        names = []
        for count in range(1, 3):
            call = worker.stub.Generate(parking(caller=caller, **ENDLESS))
            # in debt from now on, which is no reason to refuse what goes on
            caller.ClearField("tokens_per_minute")
            names.append((await begin(call)).resume_id)
            await parked(worker, call, count)
        inside = resume(worker, names[0], key="alice")
        await worker.wait_for(running=1)
        refusal = await refusal_of(resume(worker, names[1], key="alice"))
        assert (refusal.code, refusal.info.reason) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "KEY_LIMIT",
        )
        assert refusal.has_retry
        await parked(worker, inside, 2)
        again = resume(worker, names[1], key="alice")
        await worker.wait_for(running=1)
        again.cancel()


async def test_of_the_key_that_has_most_the_longest_parked_makes_way() -> None:
    async def park(key: str, **fields: Any) -> str:
        call = worker.stub.Generate(parking(caller=pb.Caller(key_id=key), **fields))
        name = (await begin(call)).resume_id
        call.cancel()
        await worker.wait_idle()
        return name

    async def gone(names: dict[str, str]) -> set[str]:
        there = {name: worker.worker._kept.get(name, None) for name in names}
        return {label for name, label in names.items() if there[name] is None}

    async with serve_script(replay_streams=4, **SLOW) as worker:
        names = {await park("mallory", **ENDLESS): f"mallory {i}" for i in range(3)}
        ended = await worker.generate(
            resume_window=window(), caller=pb.Caller(key_id="alice"), max_tokens=1
        )
        names[ended[0].started.resume_id] = "alice 0"
        assert await gone(names) == set()
        names[await park("mallory", **ENDLESS)] = "mallory 3"
        assert await gone(names) == {"mallory 0"}, "for itself"
        names[await park("alice", **ENDLESS)] = "alice 1"
        assert await gone(names) == {"mallory 0", "mallory 1"}, "for who has less"
        names[await park("mallory", **ENDLESS)] = "mallory 4"
        assert await gone(names) == {"mallory 0", "mallory 1", "mallory 2"}, "for itself again"
        assert num_parked(worker) == 3
    async with serve_script(replay_total_bytes=64 * 1024, **SLOW) as worker:
        note = b"x" * 14 * 1024  # kept twice, with the request that waits
        names = {await park("mallory", annotation=note, **ENDLESS): f"mallory {i}" for i in (0, 1)}
        names[await park("alice", annotation=note, **ENDLESS)] = "alice 0"
        assert await gone(names) == {"mallory 0"}
        assert (num_parked(worker), worker.worker.num_kept[0]) == (2, 2)
        assert worker.worker.num_kept[1] <= 64 * 1024
    assert worker.worker.num_kept == (0, 0)


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


async def test_its_clock_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    clock = SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr(parkable, "time", clock)
    async with serve_script(**SLOW) as worker:
        call = worker.stub.Generate(parking(**ENDLESS), timeout=600)
        read = await read_until(call, "delta")
        await parked(worker, call)
        now += 1000
        call = resume(worker, read[0].started.resume_id, read[-1].sequence_number)
        read += await read_until(call, "delta")
        now += 1000  # and now it is over, though the engine has not noticed
        await parked(worker, call)
        call = resume(worker, read[0].started.resume_id, read[-1].sequence_number)
        read += await read_rest(call)
        assert numbers(read) == list(range(len(read)))
        assert reasons(read) == ["DEADLINE"]
        assert read[-1].finished.usage.completion_tokens == read[-1].finished.completion_tokens > 0


async def test_without_any_token_its_deadline_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    monkeypatch.setattr(parkable, "time", SimpleNamespace(monotonic=lambda: now))
    async with serve_script(max_running=1, **SLOW) as worker:
        blocker = worker.stub.Generate(generate_request(**ENDLESS))
        await read_until(blocker, "delta")
        call = worker.stub.Generate(parking(**ENDLESS), timeout=600)
        started = await begin(call)
        now += 1000
        call.cancel()
        await worker.wait_for(waiting=0, requests=1)
        assert num_parked(worker) == 1
        for _ in range(2):
            refusal = await refusal_of(resume(worker, started.resume_id))
            assert refusal.info.reason == "DEADLINE_PASSED"
        assert num_parked(worker) == 0
        blocker.cancel()


async def test_a_deadline_in_the_queue_ends_it_with_what_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = time.monotonic()
    monkeypatch.setattr(parkable, "time", SimpleNamespace(monotonic=lambda: now))
    async with serve_script(max_running=1, **SLOW) as worker:
        call = worker.stub.Generate(parking(**ENDLESS), timeout=600)
        read = await read_until(call, "delta")
        now += 599.0  # gRPC's margin taken off, next to nothing is left
        await parked(worker, call)
        blocker = worker.stub.Generate(generate_request(**ENDLESS))
        await read_until(blocker, "delta")
        read += await read_rest(resume(worker, read[0].started.resume_id, read[-1].sequence_number))
        assert reasons(read) == ["DEADLINE"]
        assert read[-1].finished.completion_tokens == sum(each.delta.token_count for each in read)
        blocker.cancel()


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


class Loop:
    """A worker with a real model, whose steps take long enough for readers to leave between them."""

    def __init__(self, name: str, runner: asyncio.Runner) -> None:
        options = {"max_running": 4, "max_batch_tokens": 256}
        if name == "random":
            served, worker_settings = serve_random(tiny_llama(), **options)
        else:
            served, worker_settings = serve_embedded(**options)
        launch = served.runner.launch

        def launch_slowly(rows: Any) -> Any:
            time.sleep(0.001)
            return launch(rows)

        served.runner.launch = launch_slowly  # type: ignore[method-assign]
        self.run = runner.run
        self.serving = serve(served, worker_settings)
        self.worker = self.run(self.serving.__aenter__())


@pytest.fixture(scope="module", params=MODELS)
def loop(request: pytest.FixtureRequest) -> Iterator[Loop]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with asyncio.Runner() as runner:
        loop = Loop(request.param, runner)
        yield loop
        loop.run(loop.serving.__aexit__(None, None, None))
    torch.set_num_threads(threads)


async def read_in_parts(
    worker: ServedWorker, request: pb.GenerateRequest, rng: random.Random
) -> list[pb.GenerateResponse]:
    """A stream whose reader leaves now and then, for a while or for no time at all."""
    call, read = worker.stub.Generate(request), list[pb.GenerateResponse]()
    while isinstance(message := await call.read(), pb.GenerateResponse):
        read.append(message)
        if rng.random() < 0.3:
            call.cancel()
            if rng.random() < 0.5:
                await worker.wait_idle()
            call = resume(worker, read[0].started.resume_id, message.sequence_number)
    return read


CONSTRAINTS = [None, None, pb.Constraint(regex="(ab|c)*[0-9]{9}"), pb.Constraint(regex="[^x]+")]


def test_a_stream_that_is_left_anywhere_is_the_uncut_one(loop: Loop) -> None:
    worker = loop.worker

    @settings(max_examples=8, deadline=None)
    @given(
        request=requests,
        stop=stops,
        constraint=st.sampled_from(CONSTRAINTS),
        others=st.lists(requests, max_size=1),
        rng=st.randoms(use_true_random=False),
    )
    def check(
        request: pb.GenerateRequest,
        stop: Stops,
        constraint: pb.Constraint | None,
        others: list[pb.GenerateRequest],
        rng: random.Random,
    ) -> None:
        async def run() -> None:
            request.ClearField("is_continuable")  # whoever reads need not be able to
            request.stopping.max_tokens *= 3
            request.constraint.CopyFrom(constraint or pb.Constraint())
            if constraint is None:
                request.ClearField("constraint")
            whole = [message async for message in worker.stub.Generate(request)]
            stop.add_to(request, StreamRecord().add(whole))
            uncut = [message async for message in worker.stub.Generate(request)]
            request.resume_window.CopyFrom(window())
            request.while_unread = pb.WHILE_UNREAD_PARK
            crowd = [read_rest(worker.stub.Generate(other)) for other in others]
            read, *_ = await asyncio.gather(read_in_parts(worker, request, rng), *crowd)
            assert numbers(read) == list(range(len(read)))
            assert_same(StreamRecord().add(read), StreamRecord().add(uncut))
            await worker.wait_idle()

        loop.run(run())

    check()
    metrics = scrape(worker)
    assert metrics("sluice_resumes_total", outcome="resumed") > 0
    assert metrics.total("sluice_cancel_seconds_count") > 0, "none was parked before its end"
