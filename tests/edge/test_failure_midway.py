"""The error table after the 200: failures, and ends that are no success."""

import grpc
import httpx
import pytest

from edge.errors import FINISH_TABLE
from protos.sluice.v1 import generation_pb2 as pb
from tests.edge.edge_process import EdgeProcess, fresh_id
from tests.edge.error_routes import CHAT, ROUTES, Code
from tests.edge.raw_http import RawClient, request_bytes, split_chunked
from tests.edge.scripted_worker import (
    ScriptedCall,
    ScriptedWorker,
    error_info,
    failing,
)
from tests.edge.sse import parse

AFTER = [
    (Code.UNAVAILABLE, "unavailable"),
    (Code.DEADLINE_EXCEEDED, "timeout"),
    (Code.INTERNAL, "server_error"),
    (Code.UNKNOWN, "server_error"),
    (Code.CANCELLED, "cancelled"),
    (Code.RESOURCE_EXHAUSTED, "overloaded"),
]


@pytest.mark.parametrize(("code", "kind"), AFTER, ids=[code.name for code, _ in AFTER])
@pytest.mark.parametrize("route", ["chat", "completions", "native"])
async def test_failure_after_the_200_is_an_error_event_and_a_cut_body(
    edge: EdgeProcess, worker: ScriptedWorker, route: str, code: grpc.StatusCode, kind: str
) -> None:
    async def script(call: ScriptedCall) -> None:
        await call.started()
        await call.delta("partly")
        await call.fail(code, "the worker's words")

    worker.script = script
    path, body = ROUTES[route]
    client_id = fresh_id("after")
    async with RawClient(edge.port) as client:
        await client.send(request_bytes(path, body, x_request_id=client_id))
        head, stream, is_complete = split_chunked(await client.read_to_end())
    assert head.startswith(b"HTTP/1.1 200")
    assert not is_complete, "a failed stream must not look complete"
    assert b"[DONE]" not in stream
    assert b"partly" in stream
    last = parse(stream).events[-1]
    assert last.json()["error"]["type"] == kind
    assert set(last.json()["error"]) == {"message", "type", "param", "code"}
    if route == "native":
        assert last.type == "failed"
        assert last.last_event_id.endswith("-2-end")
    else:
        assert stream.split(b"\n\n")[-2].startswith(b'data: {"error":{"message":')
    assert b"the worker's words" not in stream
    assert b"No worker is ready" not in stream
    line = await edge.request_line(client_id)
    assert (line["level"], line["status"]) == ("warning", 200)
    assert (line["grpc_code"], line["grpc_details"]) == (code.name, "the worker's words")


async def test_the_log_tells_failures_from_refusals(
    http: httpx.AsyncClient, edge: EdgeProcess, worker: ScriptedWorker
) -> None:
    for code, level, details in (
        (Code.INTERNAL, "warning", "words"),
        (Code.UNAVAILABLE, "warning", "words"),
        (Code.INVALID_ARGUMENT, "info", None),
    ):
        worker.script = failing(code, "words", error_info("X"))
        client_id = fresh_id("log")
        await http.post(
            "/v1/completions", json={"prompt": "x"}, headers={"x-request-id": client_id}
        )
        line = await edge.request_line(client_id)
        assert (line["level"], line["grpc_code"]) == (level, code.name)
        assert line.get("grpc_details") == details


@pytest.mark.parametrize("route", ["chat", "completions"])
async def test_an_unexpected_error_after_the_200_is_an_error_event_too(
    edge: EdgeProcess, worker: ScriptedWorker, route: str
) -> None:
    async def script(call: ScriptedCall) -> None:
        await call.started()
        await call.delta("partly")
        await call.delta("of a choice that nobody asked for", choice=7)
        await call.hang()

    worker.script = script
    client_id = fresh_id("bug")
    async with RawClient(edge.port) as client:
        await client.send(request_bytes(*ROUTES[route], x_request_id=client_id))
        _, stream, is_complete = split_chunked(await client.read_to_end())
    assert not is_complete
    assert b"partly" in stream
    assert parse(stream).events[-1].json()["error"]["type"] == "server_error"
    request = await edge.request_line(client_id)
    assert request["level"] == "warning"
    (line,) = [line for line in edge.lines if line["event"] == "unexpected error"]
    assert line["request_id"] == request["request_id"]
    assert "IndexError" in line["exception"]
    await worker.call.ended.wait()
    assert worker.call.was_cancelled


@pytest.mark.parametrize("route", ["chat unstreamed", "completions unstreamed"])
async def test_failure_midway_unstreamed_is_a_status(
    http: httpx.AsyncClient, worker: ScriptedWorker, route: str
) -> None:
    async def script(call: ScriptedCall) -> None:
        await call.started()
        await call.delta("partly")
        await call.fail(Code.UNAVAILABLE, "bye", error_info("SHUTDOWN"))

    worker.script = script
    path, body = ROUTES[route]
    response = await http.post(path, json=body)
    assert response.status_code == 503
    assert "partly" not in response.text


FINISHES = [
    (pb.FINISH_REASON_CANCELLED, 499, "cancelled", "cancelled"),
    (pb.FINISH_REASON_DEADLINE, 504, "timeout", "deadline"),
    (pb.FINISH_REASON_SHUTDOWN, 503, "unavailable", "shutdown"),
    (pb.FINISH_REASON_PREEMPTED, 429, "overloaded", "preempted"),
    (pb.FINISH_REASON_SLOW_READER, 408, "timeout", "slow_reader"),
]


def test_every_finish_reason_is_success_or_failure() -> None:
    successes = {
        pb.FINISH_REASON_STOP,
        pb.FINISH_REASON_STOP_SEQUENCE,
        pb.FINISH_REASON_LENGTH,
        pb.FINISH_REASON_TOOL_CALLS,
    }
    known = {value for value in pb.FinishReason.values() if value}
    assert {reason for reason, *_ in FINISHES} == set(FINISH_TABLE) == known - successes


@pytest.mark.parametrize(("reason", "status", "kind", "name"), FINISHES)
async def test_unhappy_finish_reasons_are_no_success(
    http: httpx.AsyncClient,
    edge: EdgeProcess,
    worker: ScriptedWorker,
    reason: pb.FinishReason.ValueType,
    status: int,
    kind: str,
    name: str,
) -> None:
    async def script(call: ScriptedCall) -> None:
        await call.started()
        await call.delta("partly")
        await call.finished(reason)

    worker.script = script
    for route in ("chat", "completions"):
        path, body = ROUTES[route]
        response = await http.post(path, json=body | {"stream": False})
        assert (response.status_code, response.json()["error"]["type"]) == (status, kind)
        async with RawClient(edge.port) as client:
            await client.send(request_bytes(path, body))
            _, stream, is_complete = split_chunked(await client.read_to_end())
        assert not is_complete
        assert b"partly" in stream
        assert parse(stream).events[-1].json()["error"]["type"] == kind
    response = await http.post("/v1/streams", json={"prompt": "x"})
    last = parse(response.content).events[-1]
    assert (last.type, last.json()["finish_reason"]) == ("finished", name)


async def test_a_stream_that_ends_without_finished_is_a_failure(
    http: httpx.AsyncClient, edge: EdgeProcess, worker: ScriptedWorker
) -> None:
    async def script(call: ScriptedCall) -> None:
        await call.started(n=2)
        await call.delta("partly")
        await call.finished(choice=0)

    worker.script = script
    response = await http.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 500
    async with RawClient(edge.port) as client:
        await client.send(request_bytes(*ROUTES["chat"]))
        _, stream, is_complete = split_chunked(await client.read_to_end())
    assert not is_complete
    assert parse(stream).events[-1].json()["error"]["type"] == "server_error"
