"""What the Vercel AI SDK sends, and what the worker and the client get of it."""

from typing import Any

import httpx
import pytest
from google.protobuf import json_format

from tests.edge.scripted_worker import (
    ScriptedWorker,
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


WORDS = {
    "status": "The server failed to process the request.",
    "finish": "The worker shut down before the end of the generation.",
}
