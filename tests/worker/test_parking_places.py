"""What it costs to come back to a parked generation: a slot, a key's share, a place among those that are kept, time."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from inference_worker import parkable
from protos.sluice.v1 import generation_pb2 as pb
from tests.patience import PATIENCE
from tests.worker.kept_calls import ENDLESS, SLOW, begin, numbers, resume, window
from tests.worker.parked_calls import LEISURELY, num_parked, parked, parking
from tests.worker.served_worker import (
    generate_request,
    read_rest,
    read_until,
    reasons,
    refusal_of,
    serve_script,
)
from tests.worker.stream_record import StreamRecord


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
