"""The WebSocket: generations and conversations, through the client that Python people use."""

import asyncio
import json

import grpc
import pytest

from protos.sluice.v1 import generation_pb2 as pb
from tests.edge.edge_process import PATIENCE, EdgeProcess, fresh_id
from tests.edge.scripted_worker import (
    MODEL,
    ScriptedCall,
    ScriptedWorker,
    texts,
)
from tests.edge.socket_client import PATH, USER, chat, connected, echo, ended, hang


async def test_a_generation(edge: EdgeProcess, worker: ScriptedWorker) -> None:
    worker.script = texts(["Hi\n", "ö\u2028"])
    async with connected(edge) as client:
        await client.generate(id="a", prompt="x", temperature=0)
        started, *deltas, finished = await client.events()
    assert worker.call.request.prompt.text == "x"
    assert worker.call.request.sampling.temperature == 0
    assert (started["type"], started["id"], started["model"]) == ("started", "a", MODEL)
    assert started["request_id"] == worker.call.request.request_id
    assert "".join(delta["text"] for delta in deltas) == "Hi\nö\u2028"
    assert {delta["type"] for delta in deltas} == {"delta"}
    assert (finished["type"], finished["finish_reason"]) == ("finished", "stop")
    assert finished["usage"]["completion_tokens"] == 2
    events = [started, *deltas, finished]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert {event["id"] for event in events} == {"a"}


async def test_the_id_is_the_requests_where_none_is_given(
    edge: EdgeProcess, worker: ScriptedWorker
) -> None:
    async with connected(edge) as client:
        await client.generate(prompt="x")
        ids = {event["id"] for event in await client.events()}
    assert ids == {worker.call.request.request_id}


async def test_a_conversation_goes_on_by_its_next_message_alone(
    edge: EdgeProcess, worker: ScriptedWorker
) -> None:
    worker.script = echo
    system = {"role": "system", "content": "Be short."}
    async with connected(edge) as client:
        assert await client.said(messages=[system, USER]) == "heard 2"
        assert await client.said(message=USER) == "heard 4"
        assert chat(worker) == [system, USER, {"role": "assistant", "content": "heard 2"}, USER]
        assert await client.said(prompt="beside it") == "heard 0"
        assert await client.said(message=USER) == "heard 6"
        assert await client.said(messages=[USER]) == "heard 1"
        assert await client.said(message=USER) == "heard 3"
    async with connected(edge) as other:
        assert await other.said(message=USER) == "heard 1"


async def test_an_answer_is_kept_with_its_reasoning_and_calls(
    edge: EdgeProcess, worker: ScriptedWorker
) -> None:
    async def calling(call: ScriptedCall) -> None:
        await call.started()
        await call.delta("Let me ", reasoning="h")
        await call.delta("see.", reasoning="m")
        first = pb.ToolCallDelta(index=0, id="t1", name="f", arguments="{")
        await call.delta("", tool_calls=[first, pb.ToolCallDelta(index=0, arguments="}")])
        await call.finished(pb.FINISH_REASON_TOOL_CALLS)

    worker.script = calling
    async with connected(edge) as client:
        await client.said(messages=[USER], tools=[{"name": "f"}])
        worker.script = echo
        result = {"role": "tool", "content": "1", "tool_call_id": "t1"}
        await client.said(message=result)
    call = {"id": "t1", "name": "f", "arguments": "{}"}
    answer = {"role": "assistant", "content": "Let me see.", "tool_calls": [call]}
    assert chat(worker) == [USER, answer | {"reasoning": "hm"}, result]


@pytest.mark.parametrize("end", ["cancel", "fail", "shutdown"])
async def test_a_turn_without_an_answer_leaves_the_conversation_as_it_was(
    edge: EdgeProcess, worker: ScriptedWorker, end: str
) -> None:
    async def script(call: ScriptedCall) -> None:
        await call.started()
        await call.delta("more")
        if end == "fail":
            await call.fail(grpc.StatusCode.INTERNAL)
        if end == "shutdown":
            await call.finished(pb.FINISH_REASON_SHUTDOWN)
            return
        await call.hang()

    async with connected(edge) as client:
        worker.script = echo
        assert await client.said(messages=[USER]) == "heard 1"
        worker.script = script
        await client.generate(message=USER)
        if end == "cancel":
            assert (await client.event())["type"] == "started"
            await client.send({"type": "cancel"})
        await client.events()
        worker.script = echo
        assert await client.said(message=USER) == "heard 3"


async def test_of_several_choices_the_first_is_kept(
    edge: EdgeProcess, worker: ScriptedWorker
) -> None:
    async def script(call: ScriptedCall) -> None:
        await call.started()
        for choice in (1, 0):
            await call.delta(f"choice {choice}", choice)
        await call.finished(choice=0, completion_tokens=None)
        await call.finished(choice=1)

    worker.script = script
    async with connected(edge) as client:
        await client.generate(messages=[USER], n=2)
        assert (await client.events())[-1]["choice_index"] == 0
        assert (await client.event())["choice_index"] == 1
        worker.script = echo
        await client.said(message=USER)
    assert chat(worker)[1] == {"role": "assistant", "content": "choice 0"}


async def test_cancel_ends_every_choice_and_the_call(
    edge: EdgeProcess, worker: ScriptedWorker
) -> None:
    async def script(call: ScriptedCall) -> None:
        await call.started()
        await call.finished(choice=1, completion_tokens=None)
        await call.hang()

    worker.script = script
    async with connected(edge) as client:
        await client.generate(id="a", prompt="x", n=3)
        assert [(await client.event())["type"] for _ in range(2)] == ["started", "finished"]
        await client.send({"type": "cancel", "id": "another"})  # which does not run
        await client.send({"type": "cancel", "id": "a"})
        last = [await client.event() for _ in range(2)]
        assert [event["choice_index"] for event in last] == [0, 2]
        assert {event["finish_reason"] for event in last} == {"cancelled"}
        assert [event["sequence_number"] for event in last] == [2, 3]
        assert (await ended(worker)).was_cancelled
        await client.send({"type": "cancel"})  # too late, and no harm
        worker.script = texts(["again"])
        assert await client.said(prompt="x") == "again"


async def test_cancel_before_the_first_message(edge: EdgeProcess, worker: ScriptedWorker) -> None:
    worker.script = ScriptedCall.hang
    async with connected(edge) as client:
        await client.generate(id="a", prompt="x")
        async with asyncio.timeout(PATIENCE):
            while not worker.calls:
                await asyncio.sleep(0.01)
        await client.send({"type": "cancel"})
        (event,) = await client.events()
        assert (event["type"], event["finish_reason"]) == ("finished", "cancelled")
    assert (await ended(worker)).was_cancelled


async def test_a_second_generation_is_refused_while_one_runs(
    edge: EdgeProcess, worker: ScriptedWorker
) -> None:
    worker.script = hang
    async with connected(edge) as client:
        await client.generate(id="a", prompt="x")
        assert [(await client.event())["id"] for _ in range(2)] == ["a", "a"]
        event = await client.refused({"type": "generate", "id": "b", "prompt": "y"})
        assert (event["id"], event["status"]) == ("b", 409)
        assert event["error"]["code"] == "generation_running"
        await client.send({"type": "cancel"})
        assert (await client.event())["finish_reason"] == "cancelled"
    assert len(worker.calls) == 1


async def test_many_generations_one_after_another(
    edge: EdgeProcess, worker: ScriptedWorker
) -> None:
    async with connected(edge) as client:
        for number in range(50):  # each sent as soon as the end before it is heard of
            worker.script = texts([str(number)])
            assert await client.said(prompt="x") == str(number)


async def test_generations_are_in_the_log(edge: EdgeProcess, worker: ScriptedWorker) -> None:
    client_id = fresh_id("socket-log")
    headers = {"x-request-id": client_id}
    async with connected(edge, additional_headers=headers) as client:
        assert client.socket.response is not None
        assert client.socket.response.headers["x-request-id"] == client_id
        await client.said(prompt="secret words")
        await client.generate(id="secret words", prompt=1)
        await client.event()
    turn = await edge.line(
        lambda line: line["event"] == "generation" and line["client_request_id"] == client_id
    )
    assert turn["generation_id"] == worker.call.request.request_id
    assert (turn["completion_tokens"], turn["finish_reasons"]) == (3, ["stop"])
    line = await edge.line(
        lambda line: line["event"] == "request" and line["client_request_id"] == client_id
    )
    assert (line["status"], line["route"], line["generations"]) == (101, PATH, 1)
    assert "secret words" not in json.dumps(edge.lines)
