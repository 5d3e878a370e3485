"""What the edge asks of another worker when a stream loses its own, and what the client sees of it: nothing."""

from typing import Any

import pytest

from protos.sluice.v1 import generation_pb2 as pb
from tests.edge.moved_streams import (
    RESUME_ID,
    Code,
    begin,
    calls,
    continuations,
    end,
    is_continuation,
    lost_after,
    set_scripts,
    stream,
    text_of,
)
from tests.edge.pool import running_pool, until
from tests.edge.scripted_worker import (
    ScriptedCall,
    bad_field,
    error_info,
    failing,
    retry_in,
)


async def test_the_other_worker_is_told_what_the_client_has() -> None:
    async def first(call: ScriptedCall) -> None:
        await begin(call)
        await call.delta(
            "",
            choice=1,
            token_ids=[7],
            reasoning="Hm.",
            tool_calls=[pb.ToolCallDelta(index=0, id="call_1", name="f", arguments='{"é')],
        )
        await call.finished(choice=2, completion_tokens=None)
        await call.fail(Code.UNAVAILABLE)

    async def then(call: ScriptedCall) -> None:
        await call.started(is_continuable=True)
        await call.delta("llo", token_ids=[3])
        await call.finished(choice=0, completion_tokens=None)
        await call.finished(choice=1, completion_tokens=3)

    async with running_pool(2) as pool:
        set_scripts(pool, first, then)
        events = await stream(pool, n=3, top_p=0.5)
        assert [event.type for event in events] == [
            "started",
            "delta",
            "delta",
            "finished",
            "delta",
            "finished",
            "finished",
        ]
        numbers = [event.last_event_id.removesuffix("-end").split("-")[-1] for event in events]
        assert numbers == [str(number) for number in range(7)]
        assert text_of(events) == "Héllo"
        assert not any("token_ids" in event.json() for event in events)

        begun, rest = (call.request for call in sorted(calls(pool), key=is_continuation))
        assert begun.is_continuable
        assert rest.is_continuable
        assert rest.request_id == begun.request_id
        assert rest.prompt == begun.prompt
        assert (rest.sampling.seed, rest.stopping.max_tokens, rest.n) == (42, 16, 3)
        assert rest.timeout.ToNanoseconds() < begun.timeout.ToNanoseconds()
        expected = pb.Continuation(
            sequence_number=3,
            choices=[
                pb.DeliveredChoice(choice_index=0, token_ids=[1, 2], text_characters=2),
                pb.DeliveredChoice(
                    choice_index=1,
                    token_ids=[7],
                    reasoning_characters=3,
                    tool_calls=1,
                    argument_characters=3,
                ),
                pb.DeliveredChoice(choice_index=2, completion_tokens=0),
            ],
        )
        assert rest.continuation == expected
        line = await pool.edge.line(lambda line: line.get("failovers") == 1)
        assert line["status"] == 200


async def test_ids_are_shown_to_who_asked_for_them() -> None:
    async with running_pool(2) as pool:
        set_scripts(pool, lost_after(begin), end)
        events = await stream(pool, return_token_ids=True)
        shown = [event.json().get("token_ids") for event in events if event.type == "delta"]
        assert shown == [[1, 2], [3]]


async def test_one_worker_alone_is_not_asked_for_more_than_the_client_wants() -> None:
    async with running_pool(1) as pool:
        set_scripts(pool, lost_after(begin), end)
        assert (await stream(pool))[-1].type == "failed"
        assert not calls(pool)[0].request.is_continuable


@pytest.mark.parametrize(
    "loss",
    [
        lost_after(begin, Code.UNAVAILABLE),
        lost_after(begin, Code.UNAVAILABLE, error_info("SHUTDOWN"), retry_in(1)),
        # as a server ends its calls when it stops
        lost_after(begin, Code.CANCELLED),
    ],
)
async def test_whatever_way_a_worker_goes_another_one_goes_on(loss: Any) -> None:
    async with running_pool(2) as pool:
        set_scripts(pool, loss, end)
        assert text_of(await stream(pool)) == "Héllo"


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_stream_that_lacks_its_status_alone_is_over(workers: int) -> None:
    async with running_pool(workers) as pool:
        for number, code in enumerate((Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED), 1):
            set_scripts(pool, lost_after(end, code), end)
            assert (await stream(pool))[-1].type == "finished"
            assert len(calls(pool)) == number


async def test_what_is_no_loss_is_not_tried_again() -> None:
    async def is_not_continuable(call: ScriptedCall) -> None:
        await call.started()
        await call.fail(Code.UNAVAILABLE)

    async with running_pool(2) as pool:
        for first in (
            is_not_continuable,
            lost_after(begin, Code.INTERNAL, error_info("INTERNAL")),
            lost_after(begin, Code.ABORTED, error_info("SLOW_READER")),
        ):
            set_scripts(pool, first, end)
            assert (await stream(pool))[-1].type == "failed"
        assert not continuations(pool)


async def test_a_continuation_that_is_refused_is_the_failure_of_the_stream() -> None:
    async with running_pool(3) as pool:
        refusal = failing(Code.INVALID_ARGUMENT, "no", bad_field("continuation"))
        set_scripts(pool, lost_after(begin), refusal)
        failed = (await stream(pool))[-1]
        assert failed.json()["error"]["type"] == "unavailable"  # which is the truth about it
        assert len(continuations(pool)) == 1


@pytest.mark.parametrize("window", [None, 60])
async def test_a_worker_that_lost_a_stream_is_told_to_end_it(window: int | None) -> None:
    """It may be there, and know of nothing: until a resume window has passed it would go on."""

    async def first(call: ScriptedCall) -> None:
        await call.started(is_continuable=True, resume_id=RESUME_ID if window else None)
        await call.fail(Code.UNAVAILABLE)

    async with running_pool(2) as pool:
        stopping = (Code.UNAVAILABLE, error_info("SHUTDOWN"), retry_in(1))
        set_scripts(pool, lost_after(begin, *stopping), end)
        assert text_of(await stream(pool)) == "Héllo"  # such a one has ended it

        set_scripts(pool, first, end)
        await stream(pool, resume_window=window)
        await until(lambda: any(worker.aborts for worker in pool.workers))
        (lost,) = (worker for worker in pool.workers if worker.aborts)
        begun = [call.request for call in lost.calls if not is_continuation(call)]
        request_id = begun[-1].request_id
        expected = pb.AbortRequest(resume_id=RESUME_ID, forget=True)
        assert lost.aborts == [expected if window else pb.AbortRequest(request_id=request_id)]
        assert sum(len(worker.aborts) for worker in pool.workers) == 1
