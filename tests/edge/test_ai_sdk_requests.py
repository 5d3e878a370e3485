"""The routes of the Vercel AI SDK: what bodies become, and what is refused."""

from typing import Any

import grpc
import httpx
import pytest

from tests.edge.ai_sdk_bodies import (
    CHAT,
    COMPLETION,
    EVERYWHERE,
    HI,
    INPUT,
    TEXT,
    assistant,
    sent,
    told,
    tool,
)
from tests.edge.scripted_worker import (
    ScriptedWorker,
    bad_field,
    error_info,
    failing,
    retry_in,
)


@EVERYWHERE
async def test_what_is_left_out_stays_unset(
    http: httpx.AsyncClient, worker: ScriptedWorker, path: str
) -> None:
    request = await sent(http, worker, path)
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    assert request == {"prompt": {"chat": chat}, "sampling": {}, "stopping": {}}


@EVERYWHERE
async def test_settings_are_named_as_stream_text_names_them(
    http: httpx.AsyncClient, worker: ScriptedWorker, path: str
) -> None:
    request = await sent(
        http,
        worker,
        path,
        model="default",
        system="Be short.",
        maxOutputTokens=5,
        temperature=0.5,
        topP=0.25,
        topK=40,
        presencePenalty=-0.5,
        frequencyPenalty=2,
        stopSequences=["a"],
        seed=7,
    )
    assert request["model"] == "default"
    assert request["prompt"]["chat"]["messages"][0] == {"role": "system", "content": "Be short."}
    assert request["stopping"] == {"max_tokens": 5, "stop_sequences": ["a"]}
    assert request["sampling"] == {
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 40,
        "presence_penalty": -0.5,
        "frequency_penalty": 2,
        "seed": "7",
    }


async def test_an_applications_own_fields_have_no_effect(
    http: httpx.AsyncClient, worker: ScriptedWorker
) -> None:
    plain = await sent(http, worker)
    own: dict[str, Any] = {
        "sessionId": "s",
        "webSearch": True,
        "metadata": {"a": [1]},
        "messageId": None,
    }
    assert await sent(http, worker, **own) == plain


async def test_a_conversation_is_told_as_the_sdk_would_tell_it(
    http: httpx.AsyncClient, worker: ScriptedWorker
) -> None:
    shown = {"type": "source-url", "sourceId": "s", "url": "https://a.example"}
    said = {"type": "text", "text": "b", "state": "done", "providerMetadata": {"x": {}}}
    messages = await told(
        http,
        worker,
        {"role": "system", "parts": [{"type": "text", "text": "s"}]},
        {"role": "user", "parts": [{"type": "text", "text": "a"}, {"type": "data-x", "data": 1}]},
        assistant(
            {"type": "step-start"},
            {"type": "reasoning", "text": "hm"},
            said,
            tool(output={"y": 2}),
            tool(type="dynamic-tool", toolName="g", toolCallId="t2", output="plain"),
            {"type": "step-start"},
            shown,
            {"type": "text", "text": "c"},
        ),
        HI,
    )
    calls = [
        {"id": "t1", "name": "f", "arguments": '{"x":1}'},
        {"id": "t2", "name": "g", "arguments": '{"x":1}'},
    ]
    assert messages == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning": "hm", "tool_calls": calls},
        {"role": "tool", "content": '{"y":2}', "tool_call_id": "t1", "name": "f"},
        {"role": "tool", "content": "plain", "tool_call_id": "t2", "name": "g"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "hi"},
    ]


@pytest.mark.parametrize(
    ("part", "call", "result"),
    [
        (tool(state="output-error", errorText="no"), '{"x":1}', "Error: no"),
        (tool(state="output-error", input="{'cut", errorText="no"), "{}", "Error: no"),
        (tool(state="output-denied"), '{"x":1}', "Tool call execution denied."),
        (tool(state="output-denied", approval={"id": "p", "reason": "not now"}), None, "not now"),
        (tool(state="approval-responded", approval={"approved": False}), None, "Tool call exec"),
        (tool(state="approval-responded", approval={"approved": True}), '{"x":1}', None),
        (tool(state="input-available"), '{"x":1}', None),
        (tool(state="output-available", output=None), '{"x":1}', "null"),
    ],
)
async def test_how_a_tools_part_is_told(
    http: httpx.AsyncClient,
    worker: ScriptedWorker,
    part: dict[str, Any],
    call: str | None,
    result: str | None,
) -> None:
    messages = await told(http, worker, HI, assistant(part))
    if call is not None:
        assert messages[1]["tool_calls"][0]["arguments"] == call
    assert len(messages) == (2 if result is None else 3)
    if result is not None:
        assert messages[2]["content"].startswith(result)


async def test_a_call_that_broke_off_is_not_told(
    http: httpx.AsyncClient, worker: ScriptedWorker
) -> None:
    messages = await told(http, worker, HI, assistant(tool(state="input-streaming")), HI)
    assert [message["role"] for message in messages] == ["user", "user"]


async def test_tools_by_name(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    schema = {"type": "object"}
    tools = {"f": {"description": "d", "inputSchema": schema}, "g": {"parameters": schema}, "h": {}}
    named = {"type": "tool", "toolName": "g"}
    chat = (await sent(http, worker, tools=tools, toolChoice=named))["prompt"]["chat"]
    assert chat["tools"] == [
        {"name": "f", "description": "d", "parameters": '{"type":"object"}'},
        {"name": "g", "parameters": '{"type":"object"}'},
        {"name": "h"},
    ]
    assert chat["tool_choice"] == {"mode": "TOOL_CHOICE_MODE_REQUIRED", "name": "g"}


def said(*parts: dict[str, Any], role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "parts": list(parts)}]}


@pytest.mark.parametrize(
    ("path", "fields", "words"),
    [
        (CHAT, {"messages": []}, "messages: must not be empty."),
        (CHAT, {"messages": [{"role": "user", "content": "x"}]}, "messages[0].parts is required."),
        (CHAT, {"messages": [{"role": "tool", "parts": []}]}, "messages[0].role"),
        (CHAT, said({"type": "text"}), "messages[0].parts[0].text is required."),
        (
            CHAT,
            said({"type": "file", "mediaType": "image/png", "url": "data:"}),
            "The model reads text alone, and no files.",
        ),
        (CHAT, said({"type": "new\nkind"}), "messages[0].parts[0].type: not a part of a user's"),
        (CHAT, said(tool()), "messages[0].parts[0].type: not a part of a user's message."),
        (CHAT, said(tool(toolCallId=None), role="assistant"), "toolCallId is required."),
        (CHAT, said(tool(input=1), role="assistant"), "messages[0].parts[0].input: must be an obj"),
        (CHAT, said(tool(type="dynamic-tool"), role="assistant"), "A tool's part names the tool."),
        (CHAT, {"max_tokens": 5}, "max_tokens is called maxOutputTokens here."),
        (CHAT, {"temperature": "hot"}, "temperature: "),
        (CHAT, {"maxOutputTokens": 0}, "maxOutputTokens: "),
        (CHAT, {"toolChoice": "maybe"}, "toolChoice: "),
        (COMPLETION, {"prompt": None}, "prompt: "),
        (TEXT, {"messages": [HI]}, "Give exactly one of messages and prompt."),
        (TEXT, {"prompt": None}, "Give exactly one of messages and prompt."),
        (TEXT, {"tools": {"f": {}}}, "A text stream has no place for calls of tools."),
    ],
)
async def test_refusals_are_the_words_alone(
    http: httpx.AsyncClient,
    worker: ScriptedWorker,
    path: str,
    fields: dict[str, Any],
    words: str,
) -> None:
    response = await http.post(path, json=INPUT[path] | fields)
    assert response.status_code == 400
    assert response.headers["content-type"] == "text/plain; charset=utf-8"
    assert words in response.text
    assert "\n" not in response.text
    assert worker.calls == []


async def test_the_workers_refusals_are_in_this_dialects_words(
    http: httpx.AsyncClient, worker: ScriptedWorker
) -> None:
    path = "stopping.max_tokens"
    worker.script = failing(
        grpc.StatusCode.INVALID_ARGUMENT, f"{path}: too many", bad_field(path), error_info("X")
    )
    assert (await http.post(CHAT, json=INPUT[CHAT])).text == "maxOutputTokens: too many"
    worker.script = failing(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", retry_in(2))
    response = await http.post(TEXT, json=INPUT[TEXT])
    assert (response.status_code, response.text) == (429, "full")
    assert response.headers["retry-after"] == "2"
