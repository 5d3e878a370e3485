"""The WebSocket: frames that are refused, and how much and how long is too much."""

import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import grpc
import httpx
import pytest
from websockets.exceptions import ConnectionClosed

from tests.edge.edge_process import EdgeProcess, running_edge
from tests.edge.fixtures import SHARED_SETTINGS
from tests.edge.raw_http import RawClient
from tests.edge.scripted_worker import (
    ScriptedWorker,
    bad_field,
    error_info,
    failing,
    retry_in,
)
from tests.edge.socket_client import USER, connected, echo, handshake, hang, text_frame


@pytest.mark.parametrize(
    ("frame", "param", "words"),
    [
        ("", None, "not valid JSON"),
        ("{", None, "not valid JSON"),
        ("[]", None, "must be a JSON object"),
        ("[" * 100 + "]" * 100, None, "nested deeper than"),
        ("{}", "type", "must be generate or cancel"),
        ({"type": "generate"}, "message", "exactly one of"),
        ({"type": "generate", "prompt": "x", "message": USER}, "message", "exactly one of"),
        ({"type": "generate", "message": {"role": "user"}}, "message.content", "is required"),
        ({"type": "generate", "prompt": "x", "temprature": 1}, "temprature", "Unrecognized"),
        ({"type": "generate", "prompt": "x", "id": 7}, "id", "string"),
        ({"type": "generate", "prompt": "x", "id": "x" * 129}, "id", "128"),
        ({"type": "generate", "prompt": "x", "tools": [{"name": "f"}]}, "tools", "messages alone"),
        ({"type": "cancel", "prompt": "x"}, "prompt", "Unrecognized"),
    ],
)
async def test_a_bad_frame_harms_nothing(
    edge: EdgeProcess, worker: ScriptedWorker, frame: Any, param: str | None, words: str
) -> None:
    async with connected(edge) as client:
        event = await client.refused(frame)
        assert (event["status"], event["id"]) == (400, None)
        assert event["error"]["type"] == "invalid_request_error"
        assert event["error"]["param"] == param
        assert words in event["error"]["message"]
        assert worker.calls == []
        assert await client.said(prompt="x") == "Hello wörld"


async def test_the_workers_failures_are_those_of_http(
    edge: EdgeProcess, worker: ScriptedWorker, http: httpx.AsyncClient
) -> None:
    async with connected(edge) as client:
        for script in (
            failing(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", retry_in(2), error_info("X")),
            failing(grpc.StatusCode.INVALID_ARGUMENT, "no", bad_field("stopping.max_tokens")),
            failing(grpc.StatusCode.NOT_FOUND, "no such model", error_info("MODEL_NOT_FOUND")),
            failing(grpc.StatusCode.INTERNAL, "internals"),
        ):
            worker.script = script
            answer = await http.post("/v1/streams", json={"prompt": "x"})
            event = await client.refused({"type": "generate", "id": "a", "prompt": "x"})
            assert {"error": event["error"]} == answer.json()
            assert (event["status"], event["id"]) == (answer.status_code, "a")
            wait = answer.headers.get("retry-after-ms")
            assert event.get("retry_after_ms") == (None if wait is None else int(wait))


async def test_a_conversation_is_bounded(target: str, worker: ScriptedWorker) -> None:
    worker.script = echo
    async with running_edge(target, max_body_bytes=2048) as edge, connected(edge) as client:
        long = {"role": "user", "content": "x" * 1100}
        assert await client.said(messages=[long]) == "heard 1"
        event = await client.refused({"type": "generate", "message": long})
        assert (event["status"], event["error"]["code"]) == (413, "conversation_too_large")
        assert await client.said(message=USER) == "heard 3"


async def test_a_frame_beyond_the_limit_closes(edge: EdgeProcess, worker: ScriptedWorker) -> None:
    async with connected(edge) as client:
        await client.generate(prompt="x" * SHARED_SETTINGS["max_body_bytes"])  # type: ignore[operator]
        assert await client.closed() == 1009
    assert worker.calls == []


async def test_a_message_of_too_many_pieces_closes(target: str, worker: ScriptedWorker) -> None:
    text = json.dumps({"type": "generate", "prompt": "x"})

    async def pieces(count: int) -> AsyncIterator[str]:
        for start in range(0, len(text), step := -(-len(text) // count)):
            yield text[start : start + step]

    async with running_edge(target, max_socket_fragments=4) as edge, connected(edge) as client:
        await client.socket.send(pieces(3))  # and an empty one at the end
        assert (await client.event())["type"] == "started"
        async with connected(edge) as other:
            with contextlib.suppress(ConnectionClosed):
                await other.socket.send(pieces(4))
            assert await other.closed() == 1009
    assert len(worker.calls) == 1


async def test_a_binary_frame_closes(edge: EdgeProcess, worker: ScriptedWorker) -> None:
    async with connected(edge) as client:
        await client.send(b"{}")
        assert await client.closed() == 1003


async def test_an_idle_socket_is_closed(target: str, worker: ScriptedWorker) -> None:
    worker.script = hang
    async with running_edge(target, socket_idle_seconds=2) as edge, connected(edge) as client:
        await client.generate(prompt="x")
        assert [(await client.event())["type"] for _ in range(2)] == ["started", "delta"]
        async with connected(edge) as idle:
            assert await idle.closed() == 1000
        await client.send({"type": "cancel"})  # one that generates is not idle
        assert (await client.event())["finish_reason"] == "cancelled"


async def test_pings_keep_a_silent_socket_alive(target: str, worker: ScriptedWorker) -> None:
    async with (
        running_edge(target, heartbeat_seconds=0.1) as edge,
        RawClient(edge.port) as client,
    ):
        await client.send(handshake())
        await client.read_until(b"\r\n\r\n\x89\x04")  # a ping of four bytes, which gets no pong
        await client.send(text_frame({"type": "generate", "prompt": "x"}))
        await client.read_until(b'"finish_reason":"stop"')
