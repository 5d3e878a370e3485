"""Functions called by the embedded model, through the SDKs as people use them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.integration.stack import Stack

anthropic = pytest.importorskip("anthropic")

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "Name of the city"}},
    "required": ["city"],
}
WEATHER: Any = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Tells the weather", "parameters": SCHEMA},
}
QUESTION: Any = {"role": "user", "content": "What is the weather in Paris?"}
RESULT = "18 degrees and sunny"
ANSWER = f"The weather in Paris: {RESULT}"


@pytest.fixture
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    given = {"model": "default", "messages": [QUESTION], "tools": [WEATHER], **fields}
    return client.chat.completions.create(**given)


def test_openai_calls_and_answers(client: openai.OpenAI) -> None:
    choice = ask(client).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == (
        "get_weather",
        {"city": "Paris"},
    )
    result = {"role": "tool", "tool_call_id": call.id, "content": RESULT}
    told = ask(client, messages=[QUESTION, choice.message.model_dump(), result]).choices[0]
    assert (told.finish_reason, told.message.content) == ("stop", ANSWER)
    assert told.message.tool_calls in (None, [])


def test_openai_streams_the_same_call(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="default", messages=[QUESTION], tools=[WEATHER]
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion().choices[0]
    assert "tool_calls.function.arguments.delta" in kinds
    assert final.finish_reason == "tool_calls"
    (call,) = final.message.tool_calls or []
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    pieces = [
        piece
        for chunk in ask(client, stream=True)
        for piece in chunk.choices[0].delta.tool_calls or []
    ]
    assert pieces[0].function.name == "get_weather"
    assert pieces[0].id
    assert "".join(p.function.arguments for p in pieces) == call.function.arguments


def test_two_calls_in_one_answer(client: openai.OpenAI) -> None:
    both = {"role": "user", "content": "What is the weather in Paris and Rome?"}
    calls = ask(client, messages=[both]).choices[0].message.tool_calls
    cities = [json.loads(call.function.arguments)["city"] for call in calls]
    assert cities == ["Paris", "Rome"]
    assert len({call.id for call in calls}) == 2
    (only,) = ask(client, messages=[both], parallel_tool_calls=False).choices[0].message.tool_calls
    assert json.loads(only.function.arguments) == {"city": "Paris"}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "f"}}])
def test_a_required_call_is_made_though_the_model_would_not(
    client: openai.OpenAI, choice: Any
) -> None:
    levels = {
        "type": "object",
        "properties": {"level": {"enum": ["low", "high"]}},
        "required": ["level"],
        "additionalProperties": False,
    }
    tool = {"type": "function", "function": {"name": "f", "parameters": levels}}
    answer = ask(
        client,
        messages=[{"role": "user", "content": "Count to 10"}],
        tools=[tool],
        tool_choice=choice,
    ).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content is None
    for call in answer.message.tool_calls:
        assert call.function.name == "f"
        assert json.loads(call.function.arguments)["level"] in ("low", "high")


def test_no_call_where_none_helps_or_none_may_be(client: openai.OpenAI) -> None:
    count = [{"role": "user", "content": "Count to 5"}]
    assert ask(client, messages=count).choices[0].message.content == "1, 2, 3, 4, 5"
    none = ask(client, tool_choice="none").choices[0]
    assert none.finish_reason == "stop"
    assert not none.message.tool_calls


def test_bad_tools_are_named(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, tool_choice={"type": "function", "function": {"name": "absent"}})
    assert refused.value.param == "tool_choice.name"
    bad = {"type": "function", "function": {"name": "no spaces"}}
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, tools=[bad])
    assert refused.value.param == "tools[0].name"


def test_anthropic_calls_and_answers(stack: Stack) -> None:
    tool = {"name": "get_weather", "description": "Tells the weather", "input_schema": SCHEMA}
    with anthropic.Anthropic(base_url=stack.url, api_key="none", max_retries=0) as client:
        fields: dict[str, Any] = {"model": "default", "max_tokens": 200, "tools": [tool]}
        message = client.messages.create(messages=[QUESTION], **fields)
        assert message.stop_reason == "tool_use"
        (block,) = message.content
        assert (block.type, block.name, block.input) == (
            "tool_use",
            "get_weather",
            {"city": "Paris"},
        )
        with client.messages.stream(messages=[QUESTION], **fields) as stream:
            kinds = {event.type for event in stream}
            streamed = stream.get_final_message()
        assert "input_json" in kinds
        assert streamed.content[0].input == {"city": "Paris"}
        result = {"type": "tool_result", "tool_use_id": block.id, "content": RESULT}
        told = client.messages.create(
            messages=[
                QUESTION,
                {"role": "assistant", "content": [block.model_dump()]},
                {"role": "user", "content": [result]},
            ],
            **fields,
        )
        assert (told.stop_reason, told.content[0].text) == ("end_turn", ANSWER)
