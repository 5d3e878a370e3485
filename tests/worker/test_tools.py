"""Tools of a chat: how they are checked, and what they become in the prompt and in the stream."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import grpc
import jsonschema
import pytest
from google.protobuf import struct_pb2

from inference_worker.model.loader import load_model
from inference_worker.scripted_model import ScriptedSettings
from inference_worker.settings import WorkerSettings
from protos.sluice.v1 import generation_pb2 as pb
from tests.worker.served_worker import generate_request, refusal_of, serve, serve_script

WEATHER = pb.Tool(
    name="get_weather",
    description="Tells the weather.",
    parameters=json.dumps({"properties": {"city": {"type": "string"}}, "required": ["city"]}),
)
INVALID = grpc.StatusCode.INVALID_ARGUMENT
REQUIRED, NONE = pb.TOOL_CHOICE_MODE_REQUIRED, pb.TOOL_CHOICE_MODE_NONE
STRICT = pb.Tool(
    name="set_level",
    parameters=json.dumps(
        {
            "properties": {"level": {"type": "integer", "minimum": 1, "maximum": 3}},
            "required": ["level"],
            "additionalProperties": False,
        }
    ),
)
SCHEMAS = {tool.name: json.loads(tool.parameters) for tool in (WEATHER, STRICT)}
SCRIPT = 'Sure.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


def chat(*messages: pb.ChatMessage, **fields: Any) -> dict[str, Any]:
    return {"prompt": pb.Prompt(chat=pb.Chat(messages=messages or [USER], **fields))}


def calling(arguments: str) -> pb.ChatMessage:
    call = pb.ToolCall(id="1", name="f", arguments=arguments)
    return pb.ChatMessage(role="assistant", tool_calls=[call])


USER = pb.ChatMessage(role="user", content="What is the weather in Paris?")
CHOICE = pb.ToolChoice

BAD: list[tuple[str, dict[str, Any]]] = [
    ("prompt.chat.tools[0].name", chat(tools=[pb.Tool()])),
    ("prompt.chat.tools[1].name", chat(tools=[WEATHER, WEATHER])),
    ("prompt.chat.tools[0].name", chat(tools=[pb.Tool(name="no spaces")])),
    ("prompt.chat.tools[0].parameters", chat(tools=[pb.Tool(name="f", parameters="{")])),
    ("prompt.chat.tools[0].parameters", chat(tools=[pb.Tool(name="f", parameters="[]")])),
    ("prompt.chat.tools", chat(tools=[pb.Tool(name=f"f{i}") for i in range(129)])),
    ("prompt.chat.tools", chat(tools=[pb.Tool(name="f", description="x" * 300_000)])),
    ("prompt.chat.tool_choice", chat(tool_choice=CHOICE(mode=REQUIRED))),
    ("prompt.chat.tool_choice.name", chat(tools=[WEATHER], tool_choice=CHOICE(name="x"))),
    (
        "prompt.chat.tool_choice.name",
        chat(tools=[WEATHER], tool_choice=CHOICE(mode=REQUIRED, name="x")),
    ),
    (
        "prompt.chat.messages[0].tool_calls",
        chat(pb.ChatMessage(role="user", tool_calls=[pb.ToolCall()])),
    ),
    (
        "prompt.chat.messages[0].tool_calls[0].name",
        chat(pb.ChatMessage(role="assistant", tool_calls=[pb.ToolCall(id="1")])),
    ),
    ("prompt.chat.messages[0].tool_calls[0].arguments", chat(calling("{"))),
    ("prompt.chat.messages[0].tool_calls[0].arguments", chat(calling("7"))),
    # half a surrogate pair, which JSON can spell
    ("prompt.chat", chat(calling('{"city": "\\ud800"}'))),
    ("prompt.chat.template_arguments", chat(template_arguments={"level": math.nan})),
    ("prompt.chat", chat(template_arguments={"tokenize": True})),
    ("prompt.chat.template_arguments", chat(template_arguments={"a-b": True})),
]


async def test_bad_tools_are_refused_by_name() -> None:
    async with serve_script() as worker:
        for field, fields in BAD:
            refusal = await refusal_of(worker.stub.Generate(generate_request(**fields)))
            assert (refusal.code, refusal.field) == (INVALID, field), fields


async def test_a_schema_of_any_depth_is_taken_or_refused_by_name() -> None:
    """To be written into a grammar it is nested a little deeper than it came."""
    async with serve_script() as worker:
        for depth in range(925, 1000):
            schema = '{"a":' * depth + "1" + "}" * depth
            tools = [pb.Tool(name="f", parameters=schema)]
            call = worker.stub.Generate(
                generate_request(**chat(tools=tools, tool_choice=CHOICE(mode=REQUIRED)))
            )
            refusal = await refusal_of(call)
            assert refusal.code == INVALID
            assert str(refusal.field).startswith("prompt.chat"), depth


async def read(worker: Any, **fields: Any) -> tuple[str, list[tuple[str, str]], int]:
    """Text, calls and finish reason."""
    text, calls, reason = "", list[tuple[str, str]](), 0
    fields |= {"stopping": pb.Stopping(max_tokens=200)}
    async for message in worker.stub.Generate(generate_request(**fields)):
        text += message.delta.text
        for piece in message.delta.tool_calls:
            if piece.HasField("name"):
                assert piece.id.startswith("call_")
                calls.append((piece.name, ""))
            name, arguments = calls[piece.index]
            calls[piece.index] = (name, arguments + piece.arguments)
        if message.HasField("finished"):
            reason = message.finished.finish_reason
    return text, calls, reason


async def test_calls_come_apart_from_text() -> None:
    async with serve_script(text=SCRIPT, repeats=1) as worker:
        text, calls, reason = await read(worker, **chat(tools=[WEATHER]))
        assert (text, calls) == ("Sure.", [("get_weather", '{"city": "Paris"}')])
        assert reason == pb.FINISH_REASON_TOOL_CALLS


@pytest.mark.parametrize("fields", [{}, {"tools": [WEATHER], "tool_choice": CHOICE(mode=NONE)}])
async def test_without_tools_everything_is_text(fields: dict[str, Any]) -> None:
    async with serve_script(text=SCRIPT, repeats=1) as worker:
        text, calls, reason = await read(worker, **chat(**fields))
        assert (text, calls, reason) == (SCRIPT, [], pb.FINISH_REASON_STOP)


async def prompt_of(worker: Any, **fields: Any) -> str:
    prompt = chat(**fields)["prompt"]
    tokens = (await worker.stub.Tokenize(pb.TokenizeRequest(prompt=prompt))).tokens
    return b"".join(tokens).decode()


async def test_the_template_gets_tools_calls_and_results() -> None:
    async with serve_script() as worker:
        shown = await prompt_of(worker, tools=[WEATHER])
        assert shown.startswith("<|im_start|>system\nTools: get_weather(city)<|im_end|>\n")
        none = await prompt_of(worker, tools=[WEATHER], tool_choice=CHOICE(mode=NONE))
        assert none == await prompt_of(worker)
        messages = [USER, calling('{"city": "Köln"}'), pb.ChatMessage(role="tool", content="7")]
        prompt = chat(*messages)["prompt"]
        tokens = (await worker.stub.Tokenize(pb.TokenizeRequest(prompt=prompt))).tokens
        assert (
            b"".join(tokens)
            .decode()
            .endswith(
                '<|im_start|>assistant\n<tool_call>\n{"name": "f", "arguments": {"city": "Köln"}}\n'
                "</tool_call><|im_end|>\n<|im_start|>tool\n7<|im_end|>\n<|im_start|>assistant\n"
            )
        )


async def test_template_arguments_reach_the_template() -> None:
    arguments = struct_pb2.Struct()
    arguments.update({"enable_thinking": False, "level": 3})
    async with serve_script() as worker:
        assert await prompt_of(worker, template_arguments=arguments) == await prompt_of(worker)


@pytest.mark.parametrize("name", ["get_weather", "set_level", None])
async def test_a_required_call_is_made_whatever_the_model_would_say(name: str | None) -> None:
    """The embedded model draws at a temperature that makes it ramble; only the constraint keeps it to the schema."""
    choice = CHOICE(mode=REQUIRED, name=name)
    settings = WorkerSettings(port=0, threads=1)
    async with serve(load_model(settings), settings) as worker:
        for seed in range(3):
            text, calls, reason = await read(
                worker,
                sampling=pb.Sampling(temperature=3, seed=seed),
                **chat(tools=[WEATHER, STRICT], tool_choice=choice, parallel_tool_calls=False),
            )
            assert (text, len(calls)) == ("", 1)
            assert calls[0][0] == name or (name is None and calls[0][0] in SCHEMAS)
            if reason != pb.FINISH_REASON_LENGTH:
                assert reason == pb.FINISH_REASON_TOOL_CALLS
                jsonschema.validate(json.loads(calls[0][1]), SCHEMAS[calls[0][0]])


async def test_what_cannot_go_with_a_required_call_is_refused() -> None:
    required = chat(tools=[WEATHER], tool_choice=CHOICE(mode=REQUIRED))
    bad = pb.Tool(name="f", parameters='{"properties": {"x": {"$ref": "https://a.example/x"}}}')
    cases = [
        ("constraint", required | {"constraint": pb.Constraint(regex="a")}),
        ("prompt.chat.tools", chat(tools=[bad], tool_choice=CHOICE(mode=REQUIRED))),
    ]
    async with serve_script() as worker:
        for field, fields in cases:
            refusal = await refusal_of(worker.stub.Generate(generate_request(**fields)))
            assert (refusal.code, refusal.field) == (INVALID, field), fields


async def test_under_a_constraint_nothing_is_reasoning(tmp_path: Path) -> None:
    """Also where the chat template has begun to reason: the grammar leaves no end of it."""
    shutil.copytree(ScriptedSettings().model, tmp_path, dirs_exist_ok=True)
    template = tmp_path / "chat_template.jinja"
    template.write_text(template.read_text() + "<think>\n")
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    async with serve_script(text=call, repeats=1, model=str(tmp_path)) as worker:
        assert (await read(worker, **chat(tools=[WEATHER])))[:2] == ("", [])
        required = await read(worker, **chat(tools=[WEATHER], tool_choice=CHOICE(mode=REQUIRED)))
        assert required[1] == [("get_weather", '{"city": "Paris"}')]
        assert required[2] == pb.FINISH_REASON_TOOL_CALLS
        constraint = pb.Constraint(choice=pb.ChoiceList(texts=[call]))
        assert (await read(worker, constraint=constraint, **chat()))[0] == call
