"""POST /v1/responses: what bodies become in the contract's words, and what is refused."""

from typing import Any

import grpc
import httpx
import pytest
from google.protobuf import json_format

from edge.dialects import responses
from edge.dialects.dialect import PromptLimits
from edge.errors import EdgeError
from protos.sluice.v1 import generation_pb2 as pb
from tests.edge.scripted_worker import ScriptedCall, ScriptedWorker, bad_field

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


def request_of(**fields: Any) -> pb.GenerateRequest:
    (request,) = responses.parse({"input": "hi", **fields}, LIMITS).requests
    return request


def messages_of(**fields: Any) -> list[dict[str, Any]]:
    chat: list[dict[str, Any]] = json_format.MessageToDict(
        request_of(**fields).prompt.chat, preserving_proto_field_name=True
    )["messages"]
    return chat


def test_items_become_the_messages_that_templates_know() -> None:
    part = {"type": "input_text", "text": "a"}
    assert messages_of(
        instructions="Be brief.",
        input=[
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": [part, part | {"text": "b"}]},
            {
                "type": "reasoning",
                "id": "rs_1",
                "summary": [{"type": "summary_text", "text": "short"}],
                "content": [{"type": "reasoning_text", "text": "long"}],
            },
            {
                "type": "message",
                "id": "msg_1",
                "status": "completed",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "See.", "annotations": []}],
            },
            {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
            {"type": "function_call", "call_id": "2", "name": "g", "arguments": '{"a": 1}'},
            {"type": "function_call_output", "call_id": "1", "output": "one"},
            {"type": "function_call_output", "call_id": "2", "output": [part]},
            {"role": "assistant", "content": "Done."},
            {"role": "assistant", "content": "Really."},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "short"}]},
        ],
    ) == [
        {"role": "system", "content": "Be brief."},
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "ab"},
        {
            "role": "assistant",
            "reasoning": "long",
            "content": "See.",
            "tool_calls": [
                {"id": "1", "name": "f", "arguments": "{}"},
                {"id": "2", "name": "g", "arguments": '{"a": 1}'},
            ],
        },
        {"role": "tool", "content": "one", "tool_call_id": "1"},
        {"role": "tool", "content": "a", "tool_call_id": "2"},
        {"role": "assistant", "content": "Done."},
        {"role": "assistant", "content": "Really."},
        {"role": "assistant", "reasoning": "short"},
    ]


def test_fields_become_the_contracts() -> None:
    request = request_of(
        model="m", temperature=0, top_p=0.5, top_k=3, seed=7, max_output_tokens=9, stop="x"
    )
    assert request.request_id.startswith("resp_")
    assert json_format.MessageToDict(request, preserving_proto_field_name=True) == {
        "request_id": request.request_id,
        "model": "m",
        "prompt": {"chat": {"messages": [{"role": "user", "content": "hi"}]}},
        "sampling": {"temperature": 0.0, "top_p": 0.5, "top_k": 3, "seed": "7"},
        "stopping": {"max_tokens": 9, "stop_sequences": ["x"]},
    }


def test_tools_and_how_they_are_chosen() -> None:
    def chat(**fields: Any) -> pb.Chat:
        return request_of(**{"tools": [WEATHER], **fields}).prompt.chat

    (tool,) = chat().tools
    assert (tool.name, tool.description) == ("weather", "Tells the weather.")
    assert tool.parameters == '{"type":"object","properties":{"city":{"type":"string"}}}'
    assert not chat().HasField("tool_choice")
    assert chat(tool_choice="none").tool_choice.mode == pb.TOOL_CHOICE_MODE_NONE
    assert chat(tool_choice="required").tool_choice.mode == pb.TOOL_CHOICE_MODE_REQUIRED
    named = chat(tool_choice={"type": "function", "name": "weather"}).tool_choice
    assert (named.mode, named.name) == (pb.TOOL_CHOICE_MODE_REQUIRED, "weather")
    assert chat(parallel_tool_calls=False).parallel_tool_calls is False
    assert chat(parallel_tool_calls=False).HasField("parallel_tool_calls")
    # what means nothing without tools is not sent without them; what cannot be kept is, and is refused
    idle = chat(tools=[], tool_choice="auto", parallel_tool_calls=True)
    assert not idle.HasField("tool_choice")
    assert not idle.HasField("parallel_tool_calls")
    assert chat(tools=None, tool_choice="required").HasField("tool_choice")


def test_formats_become_constraints() -> None:
    def constraint(**wanted: Any) -> str:
        return request_of(text={"format": wanted}).constraint.json_schema

    assert constraint(type="text") == ""
    assert constraint(type="json_object") == '{"type":"object"}'
    schema = {"type": "object", "required": ["a"]}
    strict = constraint(type="json_schema", name="x", schema=schema, strict=True)
    assert strict == '{"type":"object","required":["a"]}'
    assert not request_of(text={}).HasField("constraint")


def test_effort_is_told_to_the_template() -> None:
    def told(effort: str | None) -> dict[str, Any]:
        chat = request_of(reasoning={"effort": effort}).prompt.chat
        return json_format.MessageToDict(chat.template_arguments)

    assert told("high") == {"enable_thinking": True, "reasoning_effort": "high"}
    assert told("none") == {"enable_thinking": False, "reasoning_effort": "none"}
    assert told(None) == {}


def test_what_clients_send_by_default_is_taken() -> None:
    # as the Codex CLI and openai-agents ask, which keep the conversation themselves
    taken = request_of(
        store=False,
        include=["reasoning.encrypted_content", "web_search_call.action.sources"],
        truncation="auto",
        tool_choice="auto",
        parallel_tool_calls=False,
        prompt_cache_key="a",
    )
    assert not taken.output.HasField("logprobs")


def test_logprobs_are_included() -> None:
    include = ["message.output_text.logprobs"]
    asked = request_of(include=include).output
    assert (asked.HasField("logprobs"), asked.logprobs) == (True, 0)
    assert request_of(include=include, top_logprobs=3).output.logprobs == 3
    assert not request_of(top_logprobs=0).output.HasField("logprobs")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": 1}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"truncation": "some"}, "truncation"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": 2, "include": ["reasoning.encrypted_content"]}, "top_logprobs"),
        ({"include": ["message.output_audio"]}, "include"),
        ({"prompt": {"id": "x"}}, "prompt"),
        ({"max_tool_calls": 1}, "max_tool_calls"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{"type": "web_search", "name": "x"}]}, "tools[0].type"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice.type"),
        ({"tool_choice": "some"}, "tool_choice"),
        ({"text": {"verbosity": "high"}}, "text.verbosity"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
        ({"input": []}, "input"),
        ({"input": None}, "input"),
        ({"input": [{"type": "web_search_call", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0].type",
        ),
        (
            {"input": [{"type": "reasoning", "summary": [], "encrypted_content": "x"}]},
            "input[0].encrypted_content",
        ),
        ({"metadata": {"a": 1}}, "metadata.a"),
    ],
)
def test_what_is_not_there_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(EdgeError) as refused:
        request_of(**fields)
    assert (refused.value.status, refused.value.param) == (400, param)
    assert param in refused.value.message


def test_a_reference_is_refused_with_what_to_do_about_it() -> None:
    message = {"role": "user", "content": "x"}
    with pytest.raises(EdgeError, match="send the item itself") as refused:
        request_of(input=[message, {"type": "item_reference", "id": "msg_1"}])
    assert refused.value.param == "input[1]"


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("prompt.chat.messages[1].tool_calls[1].arguments", "input[2].arguments"),
        ("prompt.chat.messages[2].role", "input[3].role"),
        ("prompt.chat.messages", "input"),
        ("prompt.chat.tools[0].parameters", "tools[0].parameters"),
        ("prompt.chat.tool_choice.name", "tool_choice.name"),
        ("stopping.max_tokens", "max_output_tokens"),
        ("constraint.json_schema", "text.format.schema"),
        ("sampling.top_p", "top_p"),
    ],
)
async def test_what_the_worker_refuses_is_called_what_the_client_calls_it(
    http: httpx.AsyncClient, worker: ScriptedWorker, path: str, param: str
) -> None:
    async def refuse(call: ScriptedCall) -> None:
        await call.fail(grpc.StatusCode.INVALID_ARGUMENT, f"{path}: no", bad_field(path))

    worker.script = refuse
    call = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
    body = {
        "instructions": "x",
        "input": [
            {"role": "assistant", "content": "x"},
            call,
            call | {"arguments": "["},
            {"role": "user", "content": "x"},
        ],
    }
    response = await http.post("/v1/responses", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert response.json()["error"]["message"] == f"{param}: no"
