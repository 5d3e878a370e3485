"""The routes of the Vercel AI SDK: the streams to the byte, whole, broken off and told again."""

import json
from typing import Any
from urllib.parse import quote

import grpc
import httpx
import pytest

from protos.sluice.v1 import generation_pb2 as pb
from tests.edge.ai_sdk_bodies import CHAT, HI, INPUT, TEXT, WORDS, assistant, events, tool
from tests.edge.edge_process import EdgeProcess
from tests.edge.raw_http import RawClient, request_bytes, split_chunked
from tests.edge.scripted_worker import (
    ScriptedCall,
    ScriptedWorker,
    error_info,
    failing,
    texts,
)
from tests.edge.sse import parse


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
