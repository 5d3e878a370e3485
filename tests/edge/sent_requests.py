"""What the worker receives of a body, and the error of one that is refused."""

import json
from typing import Any

import httpx
import pytest
from google.protobuf import json_format

from tests.edge.scripted_worker import ScriptedWorker

HI = [{"role": "user", "content": "hi"}]
CHAT, COMPLETIONS, STREAMS = "/v1/chat/completions", "/v1/completions", "/v1/streams"
INPUT: dict[str, dict[str, Any]] = {
    CHAT: {"messages": HI},
    COMPLETIONS: {"prompt": "hi"},
    STREAMS: {"prompt": "hi"},
}
EVERYWHERE = pytest.mark.parametrize("path", INPUT)
OPENAI = pytest.mark.parametrize("path", [CHAT, COMPLETIONS])


async def sent(
    http: httpx.AsyncClient, worker: ScriptedWorker, path: str, **fields: Any
) -> dict[str, Any]:
    """What the worker received, as JSON, without id and timeout."""
    response = await http.post(path, json=INPUT[path] | fields)
    assert response.status_code == 200, response.text
    request = json_format.MessageToDict(worker.call.request, preserving_proto_field_name=True)
    assert request.pop("request_id")
    assert request.pop("timeout")
    worker.calls.clear()
    return request


async def refused(http: httpx.AsyncClient, path: str, body: Any) -> dict[str, Any]:
    """The error of a 400."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = await http.post(path, content=content)
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error
