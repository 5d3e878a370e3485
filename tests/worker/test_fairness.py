"""Keys share the worker: their order, their limits, their room in the queue, and whose request Abort may end."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from inference_worker.engine.engine import Engine
from inference_worker.engine.runner import Row
from inference_worker.scripted_model import ScriptedRunner
from protos.sluice.v1 import generation_pb2 as pb
from tests.worker.own_engines import Obedient
from tests.worker.own_worker import own_worker
from tests.worker.served_worker import (
    Call,
    Refusal,
    ServedWorker,
    generate_request,
    read_rest,
    read_until,
    refusal_of,
    serve_script,
)

EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


def caller(key_id: str, **limits: Any) -> pb.Caller:
    return pb.Caller(key_id=key_id, **limits)


async def waiting(worker: ServedWorker, request_id: str, **fields: Any) -> Call:
    """A call that has its place in the queue."""
    request = generate_request(request_id=request_id, max_tokens=4, **fields)
    call = worker.stub.Generate(request)
    await read_until(call, "started")
    return call


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids in the order in which they reach the scripted model."""
    seen: list[str] = []
    output = ScriptedRunner._output

    def note(runner: ScriptedRunner, row: Row) -> Any:
        if row.sequence.request.request_id not in seen:
            seen.append(row.sequence.request.request_id)
        return output(runner, row)

    monkeypatch.setattr(ScriptedRunner, "_output", note)
    return seen


async def test_keys_take_turns_and_priority_orders_within_a_key(order: list[str]) -> None:
    async with serve_script(max_running=1, step_milliseconds=5) as worker:
        blocker = worker.stub.Generate(generate_request(request_id="blocker", max_tokens=4000))
        await read_until(blocker, "delta")
        many, one = caller("many"), caller("one")
        calls = [await waiting(worker, f"many{i}", caller=many) for i in range(4)]
        calls.append(await waiting(worker, "urgent", caller=many, priority=1))
        call = worker.stub.Generate(generate_request(request_id="one", max_tokens=4, caller=one))
        (started,) = await read_until(call, "started")
        assert started.started.queue_position == 1  # of five that wait
        calls.append(call)
        await worker.wait_for(waiting=6)
        blocker.cancel()
        for call in calls:
            await read_rest(call)
    assert order == ["blocker", "urgent", "one", "many0", "many1", "many2", "many3"]


async def test_a_flood_of_the_highest_priority_passes_its_own_key_alone(order: list[str]) -> None:
    """And one of the lowest weight takes no more from others than its share."""
    async with serve_script(max_running=1, max_waiting=128, step_milliseconds=5) as worker:
        blocker = worker.stub.Generate(generate_request(request_id="blocker", max_tokens=4000))
        await read_until(blocker, "delta")
        flood = caller("flood", weight=0.001)
        calls = [
            await waiting(worker, f"{priority}:{number}", caller=flood, priority=priority)
            for number in range(15)
            for priority in (-100, 100)
        ]
        calls += [await waiting(worker, f"other{i}", caller=caller("other")) for i in range(5)]
        blocker.cancel()
        for call in calls:
            await read_rest(call)
    served = [name for name in order if name.startswith(("100", "-100"))]
    assert served == [f"{priority}:{i}" for priority in (100, -100) for i in range(15)]
    # Each of the flood's tokens counts for a thousand of the other's: it has one turn, and then the other all.
    others = [index for index, name in enumerate(order) if name.startswith("other")]
    assert others[0] <= 2
    assert others[-1] <= 7


async def test_a_weight_is_a_share_of_the_tokens(order: list[str]) -> None:
    async with serve_script(max_running=1, step_milliseconds=5) as worker:
        blocker = worker.stub.Generate(generate_request(request_id="blocker", max_tokens=4000))
        await read_until(blocker, "delta")
        calls = []
        for number in range(12):
            for name, weight in (("a", 1), ("b", 3)):
                key = caller(name, weight=weight)
                calls.append(await waiting(worker, f"{name}{number}", caller=key, ids=[5, 6]))
        await worker.wait_for(waiting=24)
        blocker.cancel()
        for call in calls:
            await read_rest(call)
    first = "".join(name[0] for name in order[1:17])
    assert (first.count("a"), first.count("b")) == (4, 12)


async def test_a_key_leaves_room_in_the_queue_to_others() -> None:
    async with serve_script(max_running=1, max_waiting=18, step_milliseconds=5) as worker:
        blocker = worker.stub.Generate(generate_request(max_tokens=4000))
        await read_until(blocker, "delta")
        many = caller("many")
        calls = [await waiting(worker, f"r{i}", caller=many) for i in range(16)]
        refusal = await refusal_of(worker.stub.Generate(generate_request(caller=many)))
        assert (refusal.code, refusal.info.reason) == (EXHAUSTED, "QUEUE_FULL")
        assert 1 <= refusal.retry_seconds <= 5
        calls.append(await waiting(worker, "other", caller=caller("one")))
        calls.append(await waiting(worker, "nobody"))
        refusal = await refusal_of(worker.stub.Generate(generate_request(caller=caller("late"))))
        assert refusal.info.reason == "QUEUE_FULL"
        for call in (blocker, *calls):
            call.cancel()


async def refused(worker: ServedWorker, **fields: Any) -> Refusal:
    refusal = await refusal_of(worker.stub.Generate(generate_request(**fields)))
    assert (refusal.code, refusal.info.reason) == (EXHAUSTED, "KEY_LIMIT")
    return refusal


async def test_a_keys_own_limits_are_nobody_elses() -> None:
    async with serve_script(step_milliseconds=5) as worker:
        two = caller("two", max_concurrent=2)
        calls = [worker.stub.Generate(generate_request(caller=two, max_tokens=4000)) for _ in "ab"]
        for call in calls:
            await read_until(call, "delta")
        assert 1 <= (await refused(worker, caller=two)).retry_seconds <= 5
        assert len(await worker.generate(caller=caller("other", max_concurrent=2))) > 1
        calls[0].cancel()
        await worker.wait_for(requests=1)
        await worker.generate(caller=two)
        calls[1].cancel()


def continued(tokens: list[int], **fields: Any) -> pb.GenerateRequest:
    """The rest of a request that another worker began; its first choice was over by then."""
    return generate_request(
        n=2,
        sampling=pb.Sampling(temperature=0),
        continuation=pb.Continuation(
            choices=[
                pb.DeliveredChoice(choice_index=0, completion_tokens=50),
                pb.DeliveredChoice(choice_index=1, token_ids=tokens),
            ]
        ),
        **fields,
    )


async def tokens_of(worker: ServedWorker, num_tokens: int) -> list[int]:
    messages = await worker.generate(max_tokens=num_tokens, output=pb.Output(token_ids=True))
    return [token for message in messages for token in message.delta.token_ids]


async def test_what_another_worker_began_finds_room_and_goes_first(order: list[str]) -> None:
    async with serve_script(max_running=1, max_waiting=1, step_milliseconds=5) as worker:
        tokens = await tokens_of(worker, 10)
        order.clear()
        one = caller("one", max_concurrent=1)
        blocker = worker.stub.Generate(generate_request(max_tokens=4000))
        await read_until(blocker, "delta")
        new = await waiting(worker, "new", caller=one)
        refusal = await refusal_of(worker.stub.Generate(generate_request()))
        assert refusal.info.reason == "QUEUE_FULL"
        moved = []
        for name in ("moved0", "moved1"):
            request = continued(tokens, request_id=name, max_tokens=60, caller=one)
            moved.append(worker.stub.Generate(request))
            assert (await read_until(moved[-1], "started"))[-1].started.queue_position == 0
        surplus = worker.stub.Generate(continued(tokens, max_tokens=60))
        assert (await refusal_of(surplus)).info.reason == "QUEUE_FULL", "there is an end to it"
        blocker.cancel()
        for call in (*moved, new):
            await read_rest(call)
        assert order[-3:] == ["moved0", "moved1", "new"]


async def test_what_another_worker_began_was_paid_there() -> None:
    async with serve_script() as worker:
        tokens = await tokens_of(worker, 40)
        key = caller("one", tokens_per_minute=60)
        messages = await read_rest(
            worker.stub.Generate(continued(tokens, max_tokens=52, caller=key))
        )
        assert messages[-1].finished.usage.completion_tokens == 50 + 52
        # 12 were made here, which leaves 48 of the bucket; it fills by one a second
        await worker.generate(ids=[5] * 40, max_tokens=1, caller=key)
        await refused(worker, ids=[5] * 40, caller=key)


async def test_tokens_are_counted_as_usage_counts_them() -> None:
    async with serve_script(repeats=1, text="a b") as worker:
        spent = caller("spent", tokens_per_minute=600)
        messages = await worker.generate(caller=spent, ids=[5] * 500, n=3, max_tokens=50)
        usage = messages[-1].finished.usage
        used = usage.prompt_tokens + usage.completion_tokens
        assert used > 500 + 3 * 2  # with the tokens that ended the choices
        # a bucket of 600 that gets 10 a second; little of a second has passed
        wait = (await refused(worker, caller=spent, ids=[5] * 300)).retry_seconds
        assert (300 + used - 600) / 10 - 5 < wait <= (300 + used - 600) / 10
        await worker.generate(ids=[5] * 300)  # nobody's


async def test_abort_is_for_the_owner() -> None:
    async with serve_script(step_milliseconds=5) as worker:
        fields = {"request_id": "r", "caller": caller("mine"), "max_tokens": 4000}
        call = worker.stub.Generate(generate_request(**fields))
        await read_until(call, "delta")

        async def abort(key_id: str) -> pb.AbortOutcome.ValueType:
            request = pb.AbortRequest(request_id="r", key_id=key_id)
            return (await worker.stub.Abort(request)).outcome

        assert await abort("theirs") == pb.ABORT_OUTCOME_UNKNOWN
        await read_until(call, "delta")
        assert await abort("mine") == pb.ABORT_OUTCOME_ABORTED
        await read_rest(call)
        await worker.wait_idle()
        assert await abort("theirs") == pb.ABORT_OUTCOME_UNKNOWN
        assert await abort("mine") == pb.ABORT_OUTCOME_ALREADY_FINISHED
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await abort("a b")
        assert Refusal(caught.value).field == "key_id"


async def test_an_engine_of_a_users_own_serves_keys_in_turn() -> None:
    async with own_worker(max_running=1) as own:
        blocker = own.stub.Generate(generate_request(text="silent", request_id="blocker"))
        await read_until(blocker, "started")
        while not own.engine.requests:
            await asyncio.sleep(0.002)
        calls = []
        for name in ("a0", "a1", "a2", "b0"):
            fields: dict[str, Any] = {"request_id": name, "caller": caller(name[0])}
            call = own.stub.Generate(generate_request(text="say x", **fields))
            await read_until(call, "started")
            calls.append(call)
        priority = generate_request(text="say x", request_id="a3", caller=caller("a"), priority=100)
        calls.append(own.stub.Generate(priority))
        await read_until(calls[-1], "started")
        await own.served.wait_for(waiting=5)
        blocker.cancel()
        for call in calls:
            await read_rest(call)
        assert isinstance(own.engine, Obedient)
        assert [r.request_id for r in own.engine.requests] == [
            "blocker", "b0", "a3", "a0", "a1", "a2",
        ]  # fmt: skip


async def test_storms_of_keys_priorities_and_deadlines_lose_no_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Too little memory and too little time for most of them: every one ends, and every block is free."""
    step = Engine.step

    def checked(engine: Engine) -> None:
        step(engine)
        engine.check()

    monkeypatch.setattr(Engine, "step", checked)
    settings = {"max_running": 6, "max_waiting": 40, "blocks": 24, "block_size": 4}
    async with serve_script(**settings, step_milliseconds=1) as worker:

        async def one(number: int) -> str:
            request = generate_request(
                ids=[number % 7 + 1] * (number % 23 + 1),
                max_tokens=number % 31 + 1,
                n=number % 3 + 1,
                caller=caller(f"k{number % 5}", weight=number % 3 + 0.5),
                priority=number % 4,
            )
            request.timeout.FromMilliseconds(50 + number % 9 * 200)
            call = worker.stub.Generate(request)
            if number % 11 == 0:
                await read_until(call, "started")
                call.cancel()
                return "cancelled"
            try:
                messages = await read_rest(call)
            except grpc.aio.AioRpcError as error:
                return error.code().name
            return pb.FinishReason.Name(messages[-1].finished.finish_reason)

        async def guarded(number: int) -> str:
            try:
                return await one(number)
            except (grpc.aio.AioRpcError, asyncio.CancelledError):
                return "refused before it was cancelled"

        ends = await asyncio.gather(*(guarded(number) for number in range(150)))
        load = await worker.wait_idle()
        assert load.waiting_blocks == 0
        assert not worker.crashes
    assert "FINISH_REASON_LENGTH" in ends
    assert set(ends) <= {
        "FINISH_REASON_LENGTH",
        "FINISH_REASON_DEADLINE",
        "FINISH_REASON_PREEMPTED",
        "DEADLINE_EXCEEDED",
        "RESOURCE_EXHAUSTED",
        "cancelled",
        "refused before it was cancelled",
    }


@pytest.mark.parametrize("is_shared", [False, True])
async def test_keys_share_prompts_in_the_cache_only_where_a_setting_says_so(
    is_shared: bool,
) -> None:
    async with serve_script(prefix_cache_across_keys=is_shared) as worker:

        async def cached(**fields: Any) -> int:
            messages = await worker.generate(ids=[5] * 100, max_tokens=1, **fields)
            started, usage = messages[0].started, messages[-1].finished.usage
            assert started.cached_tokens == usage.cached_tokens
            return started.cached_tokens

        assert await cached(caller=caller("alice")) == 0
        assert await cached(caller=caller("alice")) == 96
        assert await cached(caller=caller("bob")) == await cached() == (96 if is_shared else 0)
