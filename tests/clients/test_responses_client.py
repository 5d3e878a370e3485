"""The openai package's `responses`, unchanged: before real processes, and before a script where no model would obey."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, Literal

import grpc
import openai
import pydantic
import pytest
from openai.types.responses import ResponseCompletedEvent, ResponseFailedEvent

from protos.sluice.v1 import generation_pb2 as pb
from tests.clients.contract import ENDLESS, occupied
from tests.edge.edge_process import PATIENCE, EdgeProcess
from tests.edge.scripted_worker import (
    ScriptedCall,
    ScriptedWorker,
    bad_field,
    failing,
    hello,
    retry_in,
)
from tests.integration.stack import Stack

COUNT = "Count to 10"
ANSWER = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10"
STORY = "Tell me a story"


class Weather(pydantic.BaseModel):
    """Tells the weather."""

    city: str


class Colour(pydantic.BaseModel):
    """What is asked for."""

    colour: Literal["red", "green"]
    count: int = pydantic.Field(ge=1, le=9)


def client_of(stack: Stack) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    with client_of(stack) as client:
        yield client


@pytest.fixture
def slow_client(slow_stack: Stack) -> Iterator[openai.OpenAI]:
    with client_of(slow_stack) as client:
        yield client


def scripted_client(edge: EdgeProcess) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url=f"{edge.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE
    )


def test_an_answer_whole(client: openai.OpenAI) -> None:
    response = client.responses.create(model="default", input=COUNT)
    assert response.output_text == ANSWER
    assert (response.status, response.model) == ("completed", "sluice-tiny")
    assert response.id.startswith("resp_")
    assert response.usage
    assert response.usage.input_tokens > 5
    assert response.usage.output_tokens > 10
    assert response._request_id


def test_a_stream_is_the_same(client: openai.OpenAI) -> None:
    whole = client.responses.create(model="default", input=COUNT)
    text, ids, last = "", set(), None
    with client.responses.create(model="default", input=COUNT, stream=True) as stream:
        for number, event in enumerate(stream):
            assert event.sequence_number == number
            last = event
            if event.type == "response.output_text.delta":
                text += event.delta
                ids.add(event.item_id)
    assert isinstance(last, ResponseCompletedEvent)
    assert text == last.response.output_text == ANSWER
    assert ids == {last.response.output[0].id}
    assert last.response.usage
    assert whole.usage
    assert last.response.usage.output_tokens == whole.usage.output_tokens


def test_the_accumulating_stream_helper(client: openai.OpenAI) -> None:
    snapshot = ""
    with client.responses.stream(model="default", input=COUNT) as stream:
        for event in stream:
            if event.type == "response.output_text.delta":
                snapshot = event.snapshot
        final = stream.get_final_response()
    assert snapshot == final.output_text == ANSWER


def test_a_cut_answer_is_incomplete(client: openai.OpenAI) -> None:
    response = client.responses.create(model="default", input=COUNT, max_output_tokens=3)
    assert response.status == "incomplete"
    assert response.incomplete_details
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output_text
    assert ANSWER.startswith(response.output_text)
    stream = client.responses.create(model="default", input=COUNT, max_output_tokens=3, stream=True)
    events = list(stream)
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == response.output_text


def test_an_answer_goes_back_as_it_came(client: openai.OpenAI) -> None:
    first = client.responses.create(
        model="default", instructions="You are a helpful assistant.", input="My name is Anna."
    )
    question: Any = {"role": "user", "content": [{"type": "input_text", "text": COUNT}]}
    greeting: Any = {"role": "user", "content": "My name is Anna."}
    turns: list[Any] = [greeting, *first.output, question]
    second = client.responses.create(model="default", input=turns)
    assert second.output_text == ANSWER
    assert first.usage
    assert second.usage
    assert second.usage.input_tokens > first.usage.input_tokens


def test_parse_gives_the_model(client: openai.OpenAI) -> None:
    response = client.responses.parse(
        model="default", input="Which colour?", text_format=Colour, max_output_tokens=100
    )
    assert isinstance(response.output_parsed, Colour)
    with client.responses.stream(
        model="default", input="Which colour?", text_format=Colour, max_output_tokens=100
    ) as stream:
        streamed = stream.get_final_response()
    assert streamed.output_parsed == response.output_parsed


def test_a_call_that_is_required_and_the_turn_after_it(client: openai.OpenAI) -> None:
    paint: Any = {
        "type": "function",
        "name": "paint",
        "description": "Paints.",
        "parameters": Colour.model_json_schema() | {"additionalProperties": False},
        "strict": True,
    }
    only: Any = {"type": "function", "name": "paint"}
    with client.responses.stream(
        model="default", input="Paint!", tools=[paint], tool_choice=only, parallel_tool_calls=False
    ) as stream:
        pieces = [
            event.delta
            for event in stream
            if event.type == "response.function_call_arguments.delta"
        ]
        response = stream.get_final_response()
    assert response.status == "completed"
    (call,) = response.output
    assert call.type == "function_call"
    assert call.name == "paint"
    assert "".join(pieces) == call.arguments
    Colour.model_validate_json(call.arguments)
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
    turns: list[Any] = [{"role": "user", "content": "Paint!"}, call, result]
    after = client.responses.create(model="default", input=turns, tools=[paint], tool_choice="none")
    assert after.status == "completed"
    assert [item.type for item in after.output] == ["message"]


def test_a_stored_response_is_retrieved_resumed_and_gone_on_with(client: openai.OpenAI) -> None:
    asked: Any = {"model": "default", "input": "What is 2 + 3?", "temperature": 0}
    events = list(client.responses.create(stream=True, **asked))
    first = events[-1].response
    assert client.responses.retrieve(first.id) == first
    assert list(client.responses.retrieve(first.id, stream=True)) == events
    for number in (0, 3, len(events) - 1):
        rest = client.responses.retrieve(first.id, stream=True, starting_after=number)
        assert list(rest) == events[number + 1 :]
    follow = {**asked, "input": "And plus 4?"}
    second = client.responses.create(previous_response_id=first.id, **follow)
    assert second.output_text == "5 + 4 = 9"
    assert (second.store, second.previous_response_id) == (True, first.id)
    client.responses.delete(first.id)
    for gone in (client.responses.retrieve, client.responses.delete):
        with pytest.raises(openai.NotFoundError):
            gone(first.id)
    assert client.responses.retrieve(second.id) == second
    lost = client.responses.create(store=False, **asked)
    assert lost.store is False
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(lost.id)


def test_each_refusal_is_its_own_exception(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.responses.create(model="default", input=COUNT, temperature=200.0)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as unknown:
        client.responses.create(model="default", input=COUNT, previous_response_id="resp_1")
    assert unknown.value.param == "previous_response_id"
    with pytest.raises(openai.BadRequestError) as bad:
        client.responses.create(model="default", input=COUNT, background=True)
    assert (bad.value.param, bad.value.code) == ("background", "unsupported")
    with pytest.raises(openai.BadRequestError) as bad:
        client.responses.create(model="default", input=COUNT, tools=[{"type": "web_search"}])
    assert bad.value.param == "tools[0].type"
    with pytest.raises(openai.NotFoundError) as absent:
        client.responses.create(model="gpt-99", input=COUNT)
    assert absent.value.code == "model_not_found"
    schema = {"type": "array", "uniqueItems": True}
    with pytest.raises(openai.BadRequestError) as bad:
        client.responses.create(
            model="default",
            input=COUNT,
            text={"format": {"type": "json_schema", "name": "x", "schema": schema}},
        )
    assert bad.value.param == "text.format.schema"


def test_overload_is_a_429(slow_client: openai.OpenAI, slow_stack: Stack) -> None:
    with occupied(slow_stack), pytest.raises(openai.RateLimitError) as refused:
        slow_client.responses.create(model="default", input=COUNT)
    assert 1 <= int(refused.value.response.headers["retry-after"]) <= 5


def test_leaving_one_that_is_not_stored_frees_the_sequence(
    slow_client: openai.OpenAI, slow_stack: Stack
) -> None:
    before = slow_stack.load().generated_tokens
    with slow_client.responses.create(
        model="default", input=STORY, stream=True, store=False, max_output_tokens=ENDLESS
    ) as stream:
        assert next(event for event in stream if event.type == "response.output_text.delta")
        assert slow_stack.load().running == 1
    slow_stack.wait_idle()
    assert slow_stack.load().generated_tokens - before < ENDLESS, "it ended by itself"


def test_cancelling_ends_the_stream_and_frees_the_sequence(
    slow_client: openai.OpenAI, slow_stack: Stack
) -> None:
    stream = slow_client.responses.create(
        model="default", input=STORY, stream=True, max_output_tokens=ENDLESS
    )
    created = next(stream)
    assert created.type == "response.created"
    assert slow_client.responses.cancel(created.response.id).status == "cancelled"
    events: list[Any] = []

    def read() -> None:
        events.extend(stream)

    with pytest.raises(openai.APIError, match="aborted"):
        read()
    assert events[-1].type == "response.failed"
    assert events[-1].response.status == "cancelled"
    slow_stack.wait_idle()
    with pytest.raises(openai.BadRequestError) as ended:
        slow_client.responses.cancel(created.response.id)
    assert ended.value.code == "already_finished"
    with pytest.raises(openai.NotFoundError):
        slow_client.responses.cancel("resp_unknown")


async def test_the_asynchronous_client(stack: Stack) -> None:
    async with openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="none") as client:
        response = await client.responses.create(model="default", input=COUNT)
        assert response.output_text == ANSWER
        async with client.responses.stream(model="default", input=COUNT) as stream:
            text = [e.delta async for e in stream if e.type == "response.output_text.delta"]
            final = await stream.get_final_response()
    assert "".join(text) == final.output_text == ANSWER


async def test_calls_and_reasoning(edge: EdgeProcess, worker: ScriptedWorker) -> None:
    async def script(call: ScriptedCall) -> None:
        await call.started()
        await call.delta("", reasoning="Bonn, then.")
        await call.delta("Let me see.")
        await call.delta("", tool_calls=[pb.ToolCallDelta(index=0, id="call_a", name="Weather")])
        for piece in ('{"city":', ' "Bonn"}'):
            await call.delta("", tool_calls=[pb.ToolCallDelta(index=0, arguments=piece)])
        await call.finished(pb.FINISH_REASON_TOOL_CALLS)

    worker.script = script
    tools: list[Any] = [openai.pydantic_function_tool(Weather)["function"] | {"type": "function"}]
    async with scripted_client(edge) as client:
        async with client.responses.stream(model="default", input="x", tools=tools) as stream:
            snapshot = ""
            async for event in stream:
                if event.type == "response.function_call_arguments.delta":
                    snapshot = event.snapshot
            final = await stream.get_final_response()
        thought, message, call = final.output
        assert thought.type == "reasoning"
        assert [part.text for part in thought.content or []] == ["Bonn, then."]
        assert message.type == "message"
        assert final.output_text == "Let me see."
        assert call.type == "function_call"
        assert snapshot == call.arguments == '{"city": "Bonn"}'
        assert (call.name, call.call_id) == ("Weather", "call_a")
        # the documented next turn: the output and what the function gave
        worker.script = hello
        answer: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
        question: Any = {"role": "user", "content": "x"}
        turns: list[Any] = [question, *final.output, answer]
        await client.responses.create(model="default", input=turns, tools=tools)
    messages = worker.calls[-1].request.prompt.chat.messages
    assert [message.role for message in messages] == ["user", "assistant", "tool"]
    assert (messages[1].reasoning, messages[1].content) == ("Bonn, then.", "Let me see.")
    assert messages[1].tool_calls[0].arguments == '{"city": "Bonn"}'
    assert messages[2].tool_call_id == "call_a"


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, openai.BadRequestError),
        (grpc.StatusCode.UNAUTHENTICATED, openai.AuthenticationError),
        (grpc.StatusCode.NOT_FOUND, openai.NotFoundError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, openai.RateLimitError),
        (grpc.StatusCode.UNAVAILABLE, openai.InternalServerError),
        (grpc.StatusCode.INTERNAL, openai.InternalServerError),
    ],
)
async def test_errors_raise_their_exceptions(
    edge: EdgeProcess,
    worker: ScriptedWorker,
    code: grpc.StatusCode,
    expected: type[openai.APIStatusError],
    streamed: bool,
) -> None:
    worker.script = failing(code, "no", bad_field("prompt.chat.messages[0].role"), retry_in(1))
    async with scripted_client(edge) as client:
        with pytest.raises(expected) as caught:
            await client.responses.create(
                model="default", input=[{"role": "user", "content": "x"}], stream=streamed
            )
    assert caught.value.param == "input[0].role"


@pytest.mark.parametrize("code", [grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE])
async def test_a_failure_midway_raises(
    edge: EdgeProcess, worker: ScriptedWorker, code: grpc.StatusCode
) -> None:
    async def script(call: ScriptedCall) -> None:
        await call.started()
        await call.delta("partly")
        await call.fail(code)

    worker.script = script
    events: list[Any] = []
    async with scripted_client(edge) as client:
        stream = await client.responses.create(model="default", input="x", stream=True)

        async def read() -> None:
            async for event in stream:
                events.append(event)  # noqa: PERF401  # keeps what came before the failure

        with pytest.raises(openai.APIError) as caught:
            await read()
    assert type(caught.value) is openai.APIError, "the error event, not a broken connection"
    assert isinstance(events[-1], ResponseFailedEvent)
    assert events[-1].response.output_text == "partly"
    assert events[-1].response.error
    assert events[-1].response.error.message == caught.value.message


async def test_breaking_out_cancels(edge: EdgeProcess, worker: ScriptedWorker) -> None:
    async def script(call: ScriptedCall) -> None:
        await call.started()
        while True:
            await call.delta("more")
            await asyncio.sleep(0.01)

    worker.script = script
    async with (
        scripted_client(edge) as client,
        client.responses.stream(model="default", input="x") as stream,
    ):
        async for event in stream:
            if event.type == "response.output_text.delta":
                break
    await asyncio.wait_for(worker.call.ended.wait(), PATIENCE)
    assert worker.call.was_cancelled
