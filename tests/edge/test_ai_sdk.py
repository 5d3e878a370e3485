"""The routes of the Vercel AI SDK: what bodies become, what is refused, and the streams to the byte."""

import json
from typing import Any
from urllib.parse import quote

import grpc
import httpx
import pytest
from google.protobuf import json_format

from protos.sluice.v1 import generation_pb2 as pb
from tests.edge.edge_process import EdgeProcess
from tests.edge.raw_http import RawClient, request_bytes, split_chunked
from tests.edge.scripted_worker import (
    ScriptedCall,
    ScriptedWorker,
    bad_field,
    error_info,
    failing,
    retry_in,
    texts,
)
from tests.edge.sse import parse

CHAT, COMPLETION, TEXT = "/api/chat", "/api/completion", "/api/text"
HI: dict[str, Any] = {"id": "u1", "role": "user", "parts": [{"type": "text", "text": "hi"}]}
INPUT: dict[str, dict[str, Any]] = {
    CHAT: {"id": "c1", "messages": [HI], "trigger": "submit-message"},
    COMPLETION: {"prompt": "hi"},
    TEXT: {"prompt": "hi"},
}
EVERYWHERE = pytest.mark.parametrize("path", INPUT)


async def sent(
    http: httpx.AsyncClient, worker: ScriptedWorker, path: str = CHAT, **fields: Any
) -> dict[str, Any]:
    """What the worker received, as JSON, without ids."""
    response = await http.post(path, json=INPUT[path] | fields)
    assert response.status_code == 200, response.text
    request = json_format.MessageToDict(worker.call.request, preserving_proto_field_name=True)
    assert request.pop("timeout")
    assert request.pop("request_id").startswith("msg-")
    for name in (
        "resume_window",
        "resume_tag",
        "annotation",
        "while_unread",
    ):  # tested on their own
        request.pop(name, None)
    worker.calls.clear()
    return request


async def told(
    http: httpx.AsyncClient, worker: ScriptedWorker, *messages: dict[str, Any]
) -> list[dict[str, Any]]:
    """The conversation that the worker received."""
    chat: dict[str, Any] = (await sent(http, worker, messages=messages))["prompt"]["chat"]
    return list(chat["messages"])


async def events(http: httpx.AsyncClient, path: str = CHAT, **fields: Any) -> list[dict[str, Any]]:
    """The parts of a UI message stream, which must have ended."""
    response = await http.post(path, json=INPUT[path] | fields)
    assert response.status_code == 200, response.text
    assert response.content.endswith(b"data: [DONE]\n\n")
    return [event.json() for event in parse(response.content).events[:-1]]


def assistant(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"id": "a1", "role": "assistant", "metadata": {"x": 1}, "parts": list(parts)}


def tool(**fields: Any) -> dict[str, Any]:
    part = {"type": "tool-f", "toolCallId": "t1", "state": "output-available", "input": {"x": 1}}
    return part | fields


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


async def test_exact_bytes(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    worker.script = texts(["Hi\n", "ö\u2028"])
    response = await http.post(CHAT, json=INPUT[CHAT])
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["x-vercel-ai-ui-message-stream"] == "v1"
    expected = (
        f'data: {{"type":"start","messageId":"{worker.call.request.request_id}"}}\n\n'
        'data: {"type":"start-step"}\n\n'
        'data: {"type":"text-start","id":"part-1"}\n\n'
        'data: {"type":"text-delta","id":"part-1","delta":"Hi\\n"}\n\n'
        'data: {"type":"text-delta","id":"part-1","delta":"ö\\u2028"}\n\n'
        'data: {"type":"text-end","id":"part-1"}\n\n'
        'data: {"type":"finish-step"}\n\n'
        'data: {"type":"finish","finishReason":"stop"}\n\n'
        "data: [DONE]\n\n"
    )
    assert response.content == expected.encode()


def calling(arguments: str, reason: pb.FinishReason.ValueType = pb.FINISH_REASON_TOOL_CALLS) -> Any:
    """A script that thinks, speaks, and calls twice, the second time with these arguments."""

    async def script(call: ScriptedCall) -> None:
        await call.started()
        await call.delta("Let me see.", reasoning="hm")
        first = pb.ToolCallDelta(index=0, id="t1", name="f")
        second = pb.ToolCallDelta(index=1, id="t2", name="g", arguments=arguments[:3])
        await call.delta("", tool_calls=[first, second])
        await call.delta("", tool_calls=[pb.ToolCallDelta(index=1, arguments=arguments[3:])])
        await call.finished(reason)

    return script


async def test_reasoning_text_and_calls_are_parts_one_after_another(
    http: httpx.AsyncClient, worker: ScriptedWorker
) -> None:
    worker.script = calling('{"x":1}')
    stream = await events(http, sendUsage=True)
    assert stream[0].pop("messageId") == worker.call.request.request_id
    assert stream == [
        {"type": "start"},
        {"type": "start-step"},
        {"type": "reasoning-start", "id": "part-1"},
        {"type": "reasoning-delta", "id": "part-1", "delta": "hm"},
        {"type": "reasoning-end", "id": "part-1"},
        {"type": "text-start", "id": "part-2"},
        {"type": "text-delta", "id": "part-2", "delta": "Let me see."},
        {"type": "text-end", "id": "part-2"},
        {"type": "tool-input-start", "toolCallId": "t1", "toolName": "f"},
        {"type": "tool-input-available", "toolCallId": "t1", "toolName": "f", "input": {}},
        {"type": "tool-input-start", "toolCallId": "t2", "toolName": "g"},
        {"type": "tool-input-delta", "toolCallId": "t2", "inputTextDelta": '{"x'},
        {"type": "tool-input-delta", "toolCallId": "t2", "inputTextDelta": '":1}'},
        {"type": "tool-input-available", "toolCallId": "t2", "toolName": "g", "input": {"x": 1}},
        {"type": "finish-step"},
        {
            "type": "finish",
            "finishReason": "tool-calls",
            "messageMetadata": {
                "usage": {
                    "inputTokens": 7,
                    "outputTokens": 3,
                    "totalTokens": 10,
                    "cachedInputTokens": 4,
                }
            },
        },
    ]


async def test_a_call_that_max_tokens_cut_is_an_error_of_its_own(
    http: httpx.AsyncClient, worker: ScriptedWorker
) -> None:
    worker.script = calling('{"x":1', pb.FINISH_REASON_LENGTH)
    stream = await events(http)
    (cut,) = [event for event in stream if event["type"] == "tool-input-error"]
    assert cut["input"] == '{"x":1'
    assert stream[-1] == {"type": "finish", "finishReason": "length"}


async def test_an_answer_that_goes_on_keeps_its_messages_id(
    http: httpx.AsyncClient, worker: ScriptedWorker
) -> None:
    stream = await events(http, messages=[HI, assistant(tool(output="x"))])
    assert stream[0] == {"type": "start"}


@pytest.mark.parametrize(
    ("reason", "name"),
    [
        (pb.FINISH_REASON_STOP, "stop"),
        (pb.FINISH_REASON_STOP_SEQUENCE, "stop"),
        (pb.FINISH_REASON_LENGTH, "length"),
        (pb.FINISH_REASON_TOOL_CALLS, "tool-calls"),
    ],
)
async def test_finish_reasons(
    http: httpx.AsyncClient, worker: ScriptedWorker, reason: pb.FinishReason.ValueType, name: str
) -> None:
    async def script(call: ScriptedCall) -> None:
        await call.started()
        await call.finished(reason)

    worker.script = script
    assert (await events(http))[-1]["finishReason"] == name


def breaking(kind: str) -> Any:
    """A script whose generation fails after its first text."""

    async def script(call: ScriptedCall) -> None:
        await call.started()
        await call.delta("partly")
        if kind == "status":
            await call.fail(grpc.StatusCode.INTERNAL)
        await call.finished(pb.FINISH_REASON_SHUTDOWN)

    return script


WORDS = {
    "status": "The server failed to process the request.",
    "finish": "The worker shut down before the end of the generation.",
}


@pytest.mark.parametrize("kind", WORDS)
async def test_a_failure_midway_is_the_last_event(
    http: httpx.AsyncClient, worker: ScriptedWorker, kind: str
) -> None:
    worker.script = breaking(kind)
    stream = [e.data for e in parse((await http.post(CHAT, json=INPUT[CHAT])).content).events]
    assert json.loads(stream[-2])["delta"] == "partly"
    assert json.loads(stream[-1]) == {"type": "error", "errorText": WORDS[kind]}


@pytest.mark.parametrize("kind", WORDS)
async def test_a_text_stream_that_fails_breaks_off(
    edge: EdgeProcess, worker: ScriptedWorker, kind: str
) -> None:
    worker.script = breaking(kind)
    async with RawClient(edge.port) as client:
        await client.send(request_bytes(TEXT, INPUT[TEXT]))
        head, body, is_whole = split_chunked(await client.read_to_end())
    assert head.startswith(b"HTTP/1.1 200")
    assert (body, is_whole) == (b"partly", False)


async def test_a_text_stream_is_the_text_alone(
    http: httpx.AsyncClient, worker: ScriptedWorker
) -> None:
    async def script(call: ScriptedCall) -> None:
        await call.started()
        await call.send(heartbeat=pb.Heartbeat())
        await call.delta("Hi\n", reasoning="hm")
        await call.delta(" ö")
        await call.finished(pb.FINISH_REASON_LENGTH)

    worker.script = script
    response = await http.post(TEXT, json={"messages": [HI]})
    assert response.headers["content-type"] == "text/plain; charset=utf-8"
    assert response.content == "Hi\n ö".encode()


RESUME_ID = "rs_" + "0123456789abcdef" * 3


@pytest.mark.parametrize(("given", "seconds"), [(None, 30.0), (0, None), (2.5, 2.5)])
async def test_a_chats_answer_is_kept_for_the_window(
    http: httpx.AsyncClient, worker: ScriptedWorker, given: float | None, seconds: float | None
) -> None:
    fields = {} if given is None else {"resumeWindow": given}
    await http.post(CHAT, json=INPUT[CHAT] | fields)
    request = worker.call.request
    asked = request.resume_window.ToMilliseconds() / 1e3
    assert (asked if request.HasField("resume_window") else None) == seconds
    assert request.HasField("resume_tag") == request.HasField("annotation") == (seconds is not None)
    assert request.while_unread == (pb.WHILE_UNREAD_PARK if seconds else 0)


async def test_what_becomes_of_an_answer_that_nobody_reads_can_be_chosen(
    http: httpx.AsyncClient, worker: ScriptedWorker
) -> None:
    for name, mode in (("park", pb.WHILE_UNREAD_PARK), ("continue", pb.WHILE_UNREAD_CONTINUE)):
        worker.calls.clear()
        await http.post(CHAT, json=INPUT[CHAT] | {"whileUnread": name})
        assert worker.call.request.while_unread == mode
    for wrong in ({"whileUnread": "sleep"}, {"whileUnread": "park", "resumeWindow": 0}):
        response = await http.post(CHAT, json=INPUT[CHAT] | wrong)
        assert response.status_code == 400
        assert "whileUnread" in response.text


async def test_what_has_no_chat_id_is_not_kept(
    http: httpx.AsyncClient, worker: ScriptedWorker
) -> None:
    for path, body in ((CHAT, {"messages": [HI]}), *list(INPUT.items())[1:]):
        worker.calls.clear()
        await http.post(path, json=body)
        assert not worker.call.request.HasField("resume_window")


@pytest.mark.parametrize("is_continued", [False, True])
@pytest.mark.parametrize("chat_id", ["c1", "a/b c?ö", "x" * 1024])
async def test_an_answer_is_told_again_to_the_byte(
    http: httpx.AsyncClient, worker: ScriptedWorker, chat_id: str, is_continued: bool
) -> None:
    annotation: list[bytes] = []

    async def kept(call: ScriptedCall) -> None:
        if call.request.HasField("resume"):
            await call.started(resume_id=RESUME_ID, annotation=annotation[0])
        else:
            annotation.append(call.request.annotation)
            await call.started(resume_id=RESUME_ID)
        await call.delta("Hi")
        await call.finished()

    worker.script = kept
    messages = [HI, assistant(tool(output="x"))] if is_continued else [HI]
    body = {"id": chat_id, "messages": messages, "sendUsage": is_continued}
    first = await http.post(CHAT, json=body)
    tag = worker.call.request.resume_tag
    assert tag
    assert chat_id not in tag
    worker.calls.clear()
    again = await http.get(f"{CHAT}/{quote(chat_id, safe='')}/stream")
    assert worker.call.request.resume == pb.Resume(resume_tag=tag)
    assert not worker.call.request.HasField("resume_window")
    assert (again.status_code, again.content) == (200, first.content)
    assert again.headers["x-vercel-ai-ui-message-stream"] == "v1"


async def test_where_there_is_nothing_to_resume_the_answer_is_204(
    http: httpx.AsyncClient, worker: ScriptedWorker
) -> None:
    worker.script = failing(
        grpc.StatusCode.NOT_FOUND, "no such stream", error_info("STREAM_NOT_FOUND")
    )
    response = await http.get(f"{CHAT}/c1/stream")
    assert (response.status_code, response.content) == (204, b"")
    worker.script = failing(grpc.StatusCode.INTERNAL)
    response = await http.get(f"{CHAT}/c1/stream")
    assert (response.status_code, response.text) == (500, WORDS["status"])
