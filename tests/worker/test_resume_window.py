"""How long a stream is kept, and how much of all of them: the window, the deadline and the limits."""

from __future__ import annotations

import asyncio
import contextlib

import grpc
import grpc.aio

from protos.sluice.v1 import generation_pb2 as pb
from tests.patience import PATIENCE
from tests.worker.kept_calls import ENDLESS, SLOW, begin, end, kept, resume, window
from tests.worker.served_worker import (
    generate_request,
    read_rest,
    read_until,
    reasons,
    refusal_of,
    serve_script,
)
from tests.worker.stream_record import StreamRecord


async def test_without_a_window_nothing_is_kept() -> None:
    async with serve_script(**SLOW) as worker:
        call = worker.stub.Generate(generate_request(**ENDLESS))
        started = (await read_until(call, "started"))[0].started
        assert not started.HasField("resume_id")
        assert not started.HasField("resume_window")
        call.cancel()
        await worker.wait_idle()


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


async def test_a_window_is_cut_to_the_workers() -> None:
    async with serve_script(max_resume_seconds=5) as worker:
        started = (await worker.generate(resume_window=window(60)))[0].started
        assert started.resume_window.seconds == 5
    async with serve_script(max_resume_seconds=0) as worker:
        started = (await worker.generate(resume_window=window(60)))[0].started
        assert not started.HasField("resume_id")
