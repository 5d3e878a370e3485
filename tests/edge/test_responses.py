"""POST /v1/responses: what messages become, and that the document is true of it."""

from typing import Any

import grpc
import httpx
import jsonschema
import pytest
import pytest_asyncio

from edge.dialects import responses
from edge.dialects.dialect import PromptLimits
from edge.dialects.responses_answer_schema import EVENTS
from edge.errors import EdgeError
from protos.sluice.v1 import generation_pb2 as pb
from tests.edge.scripted_worker import CREATED, MODEL, ScriptedCall, ScriptedWorker, error_info
from tests.edge.sse import Event, parse

LIMITS = PromptLimits(
    max_body_bytes=4 << 20, max_json_depth=32, max_json_values=65536, max_prompts=32
)
WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "Tells the weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": True,
}


async def thinking_and_calling(call: ScriptedCall) -> None:
    """Reasoning, text, two calls; the second comes in pieces."""
    await call.started()
    await call.delta("", reasoning="I should ")
    await call.delta("Let me see.", reasoning="look.", token_count=3)
    await call.delta(
        "", tool_calls=[pb.ToolCallDelta(index=0, id="call_a", name="weather", arguments="{}")]
    )
    await call.delta("", tool_calls=[pb.ToolCallDelta(index=1, id="call_b", name="weather")])
    for piece in ('{"city": ', '"Bonn"}'):
        await call.delta("", tool_calls=[pb.ToolCallDelta(index=1, arguments=piece)])
    await call.finished(pb.FINISH_REASON_TOOL_CALLS, completion_tokens=9)


async def cut(call: ScriptedCall) -> None:
    await call.started()
    await call.delta("", reasoning="Hm")
    await call.delta("One, two")
    await call.finished(pb.FINISH_REASON_LENGTH)


async def silent(call: ScriptedCall) -> None:
    await call.started()
    await call.finished()


async def breaking(call: ScriptedCall) -> None:
    await call.started()
    await call.delta("part")
    await call.fail(grpc.StatusCode.INTERNAL)


async def aborted(call: ScriptedCall) -> None:
    await call.started()
    await call.delta("part")
    await call.finished(pb.FINISH_REASON_CANCELLED)


async def test_a_response_that_cannot_be_asked_for_has_not_failed_for_that(
    http: httpx.AsyncClient, worker: ScriptedWorker
) -> None:
    name = "A" * 32

    async def stuck(call: ScriptedCall) -> None:
        await call.started(request_id="resp_1", resume_id=name)
        await call.delta("part")
        await call.hang()  # for longer than a call may take that only asks

    async def failed(call: ScriptedCall) -> None:
        await call.started(request_id="resp_1", resume_id=name)
        await call.delta("part")
        await call.fail(grpc.StatusCode.INTERNAL, "the worker's words", error_info("INTERNAL"))

    async def resumes() -> list[str]:
        lines = (await http.get("/metrics")).text.splitlines()
        return [line for line in lines if line.startswith("sluice_edge_resumes_total")]

    before = await resumes()
    worker.script = stuck
    answer = await http.get(f"/v1/responses/resp_{name}")
    assert (answer.status_code, answer.json()["error"]["type"]) == (504, "timeout")
    going_on = {"input": "x", "previous_response_id": f"resp_{name}"}
    assert (await http.post("/v1/responses", json=going_on)).status_code == 504
    worker.script = failed
    answer = await http.get(f"/v1/responses/resp_{name}")
    assert (answer.status_code, answer.json()["status"]) == (200, "failed")
    # nor is anybody a client that came back
    assert await resumes() == before


async def events_of(http: httpx.AsyncClient, **fields: Any) -> list[Event]:
    """A stream, to its end or to where the connection broke off."""
    raw = b""
    async with http.stream(
        "POST", "/v1/responses", json={"input": "x", **fields, "stream": True}
    ) as r:
        assert r.status_code == 200
        try:
            async for chunk in r.aiter_bytes():
                raw += chunk
        except httpx.RemoteProtocolError:
            assert b"event: error" in raw
    events = parse(raw).events
    assert [event.type for event in events] == [event.json()["type"] for event in events]
    assert [event.json()["sequence_number"] for event in events] == list(range(len(events)))
    assert not any(event.last_event_id for event in events)
    return events


@pytest_asyncio.fixture(loop_scope="session")
async def document(http: httpx.AsyncClient) -> dict[str, Any]:
    document: dict[str, Any] = (await http.get("/openapi.json")).json()
    return document


def check(document: dict[str, Any], name: str, value: Any) -> None:
    schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    jsonschema.validate(value, schema)


async def test_a_text_is_told_as_openai_does(http: httpx.AsyncClient) -> None:
    events = await events_of(http)
    assert [event.type for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * 3,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    first, last = events[0].json()["response"], events[-1].json()["response"]
    assert (first["status"], first["output"], first["usage"]) == ("in_progress", [], None)
    number = first["id"].removeprefix("resp_")
    place = {"item_id": f"msg_{number}_0", "output_index": 0, "content_index": 0}
    delta = events[4].json()
    assert delta == {
        "type": "response.output_text.delta",
        **place,
        "delta": "Hel",
        "logprobs": [],
        "sequence_number": 4,
    }
    part = {"type": "output_text", "annotations": [], "logprobs": [], "text": "Hello wörld"}
    assert events[8].json() == {
        "type": "response.content_part.done",
        **place,
        "part": part,
        "sequence_number": 8,
    }
    assert events[2].json()["item"]["content"] == []
    assert last["output"] == [
        {
            "id": place["item_id"],
            "type": "message",
            "status": "completed",
            "role": "assistant",
            "content": [part],
        }
    ]
    assert last["output"] == [events[9].json()["item"]]
    assert (last["status"], last["created_at"], last["model"]) == ("completed", CREATED, MODEL)
    assert (last["temperature"], last["error"], last["incomplete_details"]) == (0.7, None, None)
    assert last["usage"] == {
        "input_tokens": 7,
        "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
        "output_tokens": 3,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 10,
    }


async def test_reasoning_and_calls_are_items_of_their_own(
    http: httpx.AsyncClient, worker: ScriptedWorker
) -> None:
    worker.script = thinking_and_calling
    events = await events_of(http, tools=[WEATHER])
    assert [event.type.removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    response = events[-1].json()["response"]
    number = response["id"].removeprefix("resp_")
    thought, message, first, second = response["output"]
    assert thought["content"] == [{"type": "reasoning_text", "text": "I should look."}]
    assert message["content"][0]["text"] == "Let me see."
    assert [first["call_id"], first["arguments"]] == ["call_a", "{}"]
    assert second == {
        "id": f"fc_{number}_3",
        "type": "function_call",
        "status": "completed",
        "call_id": "call_b",
        "name": "weather",
        "arguments": '{"city": "Bonn"}',
    }
    done = [event.json()["item"] for event in events if event.type == "response.output_item.done"]
    assert done == response["output"]
    ids = {item["id"] for item in response["output"]}
    assert {event.json()["item_id"] for event in events if "item_id" in event.json()} == ids
    # all of the delta in which the reasoning ended
    assert response["usage"]["output_tokens_details"] == {"reasoning_tokens": 4}


@pytest.mark.parametrize("script", [thinking_and_calling, cut, silent])
async def test_a_stream_ends_with_what_is_answered_without_one(
    http: httpx.AsyncClient, worker: ScriptedWorker, document: dict[str, Any], script: Any
) -> None:
    worker.script = script
    fields: dict[str, Any] = {
        "tools": [WEATHER],
        "tool_choice": {"type": "function", "name": "weather"},
        "parallel_tool_calls": False,
        "metadata": {"a": "b"},
        "reasoning": {"effort": "low"},
        "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}},
        "instructions": "Be brief.",
        "max_output_tokens": 5,
    }
    events = await events_of(http, **fields)
    for event in events:
        check(document, EVENTS[event.type].__name__, event.json())
    whole = (await http.post("/v1/responses", json={"input": "x", **fields})).json()
    check(document, "ResponsesAnswer", whole)
    streamed = events[-1].json()["response"]
    assert events[-1].type == f"response.{whole['status']}"
    for response in (whole, streamed):
        number = response.pop("id").removeprefix("resp_")
        for item in response["output"]:
            item["id"] = item["id"].replace(number, "")
    assert whole == streamed
    given = {**fields, "reasoning": {"effort": "low", "summary": None}}
    assert {name: whole[name] for name in given} == given


async def test_a_cut_answer_is_incomplete(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    worker.script = cut
    response = (await http.post("/v1/responses", json={"input": "x"})).json()
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert [item["status"] for item in response["output"]] == ["completed", "incomplete"]


async def test_an_answer_without_tokens_has_a_message(
    http: httpx.AsyncClient, worker: ScriptedWorker
) -> None:
    worker.script = silent
    response = (await http.post("/v1/responses", json={"input": "x"})).json()
    assert [item["content"][0]["text"] for item in response["output"]] == [""]


@pytest.mark.parametrize(
    ("script", "status", "kind"),
    [(breaking, "failed", "server_error"), (aborted, "cancelled", "cancelled")],
)
async def test_a_failure_midway(
    http: httpx.AsyncClient,
    worker: ScriptedWorker,
    document: dict[str, Any],
    script: Any,
    status: str,
    kind: str,
) -> None:
    worker.script = script
    events = await events_of(http)
    for event in events:
        check(document, EVENTS[event.type].__name__, event.json())
    failed, error = events[-2:]
    assert (failed.type, error.type) == ("response.failed", "error")
    response = failed.json()["response"]
    assert response["status"] == status
    assert response["error"] == {"code": "server_error", "message": error.json()["message"]}
    assert response["output"][0]["status"] == "incomplete"
    assert response["output"][0]["content"][0]["text"] == "part"
    assert error.json()["error"]["type"] == kind


def test_a_failure_before_anything_was_created_is_an_error_alone() -> None:
    encoder = responses.parse({"input": "x"}, LIMITS).encoder()
    raw = encoder.error(EdgeError(503, "unavailable", "gone"))
    (event,) = parse(raw).events
    assert (event.type, event.json()["sequence_number"]) == ("error", 0)


async def test_cancelling(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    response_id = f"resp_{'0' * 32}"

    async def cancel(response_id: str) -> httpx.Response:
        return await http.post(f"/v1/responses/{response_id}/cancel")

    assert (await cancel(response_id)).json() == {
        "id": response_id,
        "object": "response",
        "status": "cancelled",
    }
    assert worker.aborted == [response_id]
    worker.abort_outcome = pb.ABORT_OUTCOME_ALREADY_FINISHED
    ended = await cancel(response_id)
    assert (ended.status_code, ended.json()["error"]["code"]) == (400, "already_finished")
    worker.abort_outcome = pb.ABORT_OUTCOME_UNKNOWN
    assert (await cancel(response_id)).status_code == 404
    worker.aborted.clear()
    assert (await cancel("chatcmpl-1")).status_code == 404
    assert worker.aborted == []
