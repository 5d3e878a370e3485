"""The engine on its own thread: commands take effect within a step, slow readers cost one delta, crashes are told."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from inference_worker.engine.engine_thread import EngineThread
from inference_worker.engine.event import (
    Delta,
    EngineStopped,
    Event,
    Failed,
    Finished,
    FinishReason,
    Scheduled,
    Started,
)
from inference_worker.engine.event_stream import EventStream, is_last
from inference_worker.engine.runner import Row
from tests.patience import PATIENCE
from tests.worker.engine.engines import completion, make_engine, make_request
from tests.worker.engine.hash_runner import HashRunner, reference_completion

pytestmark = pytest.mark.usefixtures("runs_ahead")


@asynccontextmanager
async def running(runner: HashRunner, **options: int) -> AsyncIterator[EngineThread]:
    crashes: list[BaseException] = []
    thread = EngineThread(make_engine(runner, **options), crashes.append)
    thread.start()
    try:
        yield thread
    finally:
        await thread.stop()
        assert crashes == []
        assert runner.is_closed


async def read_all(stream: EventStream) -> list[Event]:
    events: list[Event] = []
    while not events or not is_last(events[-1]):
        events += await stream.next()
    return events


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.001)


async def test_requests_run_together_and_end() -> None:
    async with running(HashRunner(64, 4)) as thread:
        streams = [thread.submit(make_request(f"r{i}", [i, 2, 3], 20)) for i in range(6)]
        for i, stream in enumerate(streams):
            events = await read_all(stream)
            assert isinstance(events[0], Started)
            assert completion(events) == reference_completion([i, 2, 3], 20)
        await until(lambda: thread.load.free_blocks == 64)


async def test_a_slow_reader_gets_one_merged_delta() -> None:
    async with running(HashRunner(64, 4)) as thread:
        heard: list[Event] = []
        stream = thread.submit(make_request("a", [1, 2], 50), heard.append)
        await until(lambda: bool(heard) and is_last(heard[-1]))
        events = await stream.next()
        assert [type(event).__name__ for event in events] == [
            "Started",
            "Scheduled",
            "Delta",
            "Finished",
        ]
        assert completion(events) == reference_completion([1, 2], 50)


class PausedRunner(HashRunner):
    """Lets a step through at a time."""

    def __init__(self) -> None:
        super().__init__(64, 4, before_row=self.wait)
        self.tickets = threading.Semaphore(0)

    def wait(self, _: Row) -> None:
        assert self.tickets.acquire(timeout=PATIENCE)


async def test_the_header_does_not_wait_for_the_first_step() -> None:
    runner = PausedRunner()
    async with running(runner) as thread:
        stream = thread.submit(make_request("a", [1, 2], 2))
        events = await stream.next()  # the first step waits for its ticket
        assert isinstance(events[0], Started)
        # where the engine runs ahead, launching a step does not wait for it, so that its launch may be told by now
        assert all(isinstance(event, Scheduled) for event in events[1:])
        runner.tickets.release(2)
        assert completion(await read_all(stream)) == reference_completion([1, 2], 2)


async def test_cancel_takes_effect_before_the_next_step() -> None:
    runner = PausedRunner()
    async with running(runner) as thread:
        request = make_request("gone", [1, 2], 50)
        thread.submit(request)
        runner.tickets.release(3)
        await until(lambda: thread.load.steps == 3)
        thread.cancel(request)  # the fourth step is under way, waiting for its ticket
        runner.tickets.release(1)
        await until(lambda: thread.load.running == 0)
        assert thread.load.steps == 4
        assert thread.load.free_blocks == 64
        runner.tickets.release(1)  # one more may be in flight


async def test_cancel_with_a_reason_tells_the_reader() -> None:
    runner = PausedRunner()
    async with running(runner) as thread:
        request = make_request("a", [1, 2], 50)
        stream = thread.submit(request)
        runner.tickets.release(2)
        await until(lambda: thread.load.steps == 2)
        thread.cancel(request, FinishReason.DEADLINE)
        runner.tickets.release(1)
        events = await read_all(stream)
        assert isinstance(events[-1], Finished)
        assert events[-1].reason is FinishReason.DEADLINE
        runner.tickets.release(1)  # one more may be in flight


async def test_what_an_old_request_still_sends_never_reaches_a_new_one_of_its_id() -> None:
    runner = PausedRunner()
    async with running(runner) as thread:
        old = make_request("same", [1, 2], 50)
        thread.submit(old)
        runner.tickets.release(2)
        await until(lambda: thread.load.steps == 2)
        thread.cancel(old)  # its third step is under way
        stream = thread.submit(make_request("same", [3], 4))
        runner.tickets.release(10)
        events = await read_all(stream)
        assert isinstance(events[0], Started)
        assert completion(events) == reference_completion([3], 4)
        await until(lambda: thread.load.free_blocks == 64)


async def test_stop_ends_what_runs_with_shutdown() -> None:
    async with running(HashRunner(100_000, 4), context_length=400_000) as thread:
        stream = thread.submit(make_request("a", [1], 300_000))  # far more than it can do meanwhile
        await stream.next()
    events = await read_all(stream)
    assert isinstance(events[-1], Finished)
    assert events[-1].reason is FinishReason.SHUTDOWN


async def test_a_crash_fails_every_stream_and_is_told_once() -> None:
    crashes: list[BaseException] = []
    engine = make_engine(HashRunner(64, 4))
    thread = EngineThread(engine, crashes.append)
    engine.load = lambda: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    thread.start()
    stream = thread.submit(make_request("a", [1], 5))
    events = await read_all(stream)
    assert isinstance(events[-1], Failed)
    assert [type(error) for error in crashes] == [ZeroDivisionError]
    await thread.stop()
    with pytest.raises(EngineStopped):
        thread.submit(make_request("b", [1], 5))


def test_merging_keeps_the_order_of_each_choice() -> None:
    events: list[Event] = [
        Delta(0, "p", (), is_prompt=True),
        Delta(0, "a", ()),
        Delta(1, "x", ()),
        Delta(0, "b", ()),
        Finished(0, FinishReason.STOP),
        Delta(1, "y", ()),
    ]
    stream = EventStream()
    for event in events:
        stream.put(event)
    merged = asyncio.run(stream.next())
    assert merged == [events[0], Delta(0, "ab", ()), Delta(1, "xy", ()), events[4]]


def test_observers_hear_before_readers_read() -> None:
    heard: list[Event] = []
    stream = EventStream(heard.append)
    stream.put(Finished(0, FinishReason.STOP))
    assert heard == [Finished(0, FinishReason.STOP)]


def test_a_woken_reader_may_find_nothing() -> None:
    stream = EventStream()
    stream.wake()
    assert asyncio.run(stream.next()) == []
