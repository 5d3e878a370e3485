"""Every row of the error table, over real sockets: before the 200 and after it."""

import asyncio
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf.message import Message

from edge.errors import FINISH_TABLE, STATUS_TABLE
from protos.sluice.v1 import generation_pb2 as pb
from tests.edge.edge_process import EdgeProcess, fresh_id, running_edge
from tests.edge.raw_http import RawClient, request_bytes, split_chunked
from tests.edge.scripted_worker import (
    MODEL,
    ScriptedCall,
    ScriptedWorker,
    bad_field,
    error_info,
    failing,
    retry_in,
)
from tests.edge.sse import parse
from tests.patience import PATIENCE

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
ROUTES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", CHAT | {"stream": True}),
    "chat unstreamed": ("/v1/chat/completions", CHAT),
    "completions": ("/v1/completions", {"prompt": "hi", "stream": True}),
    "completions unstreamed": ("/v1/completions", {"prompt": "hi"}),
    "native": ("/v1/streams", {"prompt": "hi"}),
}
Code = grpc.StatusCode

# gRPC status, details, then HTTP status, body type, code, param.
BEFORE: list[tuple[grpc.StatusCode, list[Message], int, str, str | None, str | None]] = [
    (
        Code.INVALID_ARGUMENT,
        [bad_field("sampling.temperature")],
        400,
        "invalid_request_error",
        None,
        "temperature",
    ),
    (Code.OUT_OF_RANGE, [], 400, "invalid_request_error", None, None),
    (Code.FAILED_PRECONDITION, [], 400, "invalid_request_error", None, None),
    (Code.UNIMPLEMENTED, [bad_field("n")], 400, "invalid_request_error", "unsupported", "n"),
    (Code.UNAUTHENTICATED, [], 401, "authentication_error", None, None),
    (Code.PERMISSION_DENIED, [], 403, "permission_error", None, None),
    (Code.NOT_FOUND, [], 404, "not_found_error", "model_not_found", None),
    (
        Code.NOT_FOUND,
        [error_info("REQUEST_NOT_FOUND")],
        404,
        "not_found_error",
        "request_not_found",
        None,
    ),
    (Code.ALREADY_EXISTS, [], 409, "invalid_request_error", "already_exists", None),
    (Code.RESOURCE_EXHAUSTED, [retry_in(2.2)], 429, "overloaded", "overloaded", None),
    *(
        (Code.RESOURCE_EXHAUSTED, [error_info(reason), retry_in(2.2)], 429, kind, code, None)
        for reason, kind, code in (
            ("QUEUE_FULL", "overloaded", "queue_full"),
            ("TOKEN_BUDGET", "overloaded", "token_budget"),
            ("WOULD_MISS_DEADLINE", "overloaded", "would_miss_deadline"),
            ("KEY_LIMIT", "rate_limit_error", "key_limit"),
        )
    ),
    (Code.CANCELLED, [], 499, "cancelled", "cancelled", None),
    (Code.UNAVAILABLE, [error_info("DRAINING")], 503, "unavailable", "unavailable", None),
    (Code.ABORTED, [], 503, "unavailable", "unavailable", None),
    (Code.DEADLINE_EXCEEDED, [], 504, "timeout", "timeout", None),
    (Code.INTERNAL, [], 500, "server_error", None, None),
    (Code.UNKNOWN, [], 500, "server_error", None, None),
    (Code.DATA_LOSS, [], 500, "server_error", None, None),
]


def test_every_status_has_a_row() -> None:
    assert set(STATUS_TABLE) == set(grpc.StatusCode) - {grpc.StatusCode.OK}
    assert {row[0] for row in BEFORE} == set(STATUS_TABLE)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("code", "details", "status", "kind", "error_code", "param"),
    BEFORE,
    ids=[f"{row[0].name}-{row[4]}" for row in BEFORE],
)
async def test_status_before_the_200(
    http: httpx.AsyncClient,
    worker: ScriptedWorker,
    route: str,
    code: grpc.StatusCode,
    details: list[Message],
    status: int,
    kind: str,
    error_code: str | None,
    param: str | None,
) -> None:
    worker.script = failing(code, "the worker's words", *details)
    path, body = ROUTES[route]
    response = await http.post(path, json=body)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"], error["param"]) == (kind, error_code, param)
    if status in (500, 504, 499):
        assert "words" not in error["message"]
    elif details:
        assert error["message"] == "the worker's words"
    assert ("retry-after" in response.headers) == (status in (429, 503))


@pytest.mark.parametrize(
    ("seconds", "header", "header_ms"),
    [(0.2, "1", "1000"), (2.2, "3", "2200"), (90, "5", "5000")],
)
async def test_retry_after_is_an_integer_of_1_to_5(
    http: httpx.AsyncClient, worker: ScriptedWorker, seconds: float, header: str, header_ms: str
) -> None:
    worker.script = failing(Code.RESOURCE_EXHAUSTED, "full", retry_in(seconds))
    response = await http.post("/v1/chat/completions", json=CHAT | {"stream": True})
    assert response.status_code == 429
    assert response.headers["retry-after"] == header
    assert response.headers["retry-after-ms"] == header_ms
    assert response.headers["x-should-retry"] == "true"


async def test_retry_after_of_a_keys_own_limit_is_as_long_as_it_takes(
    http: httpx.AsyncClient, worker: ScriptedWorker
) -> None:
    worker.script = failing(
        Code.RESOURCE_EXHAUSTED, "spent", error_info("KEY_LIMIT"), retry_in(41.5)
    )
    response = await http.post("/v1/chat/completions", json=CHAT)
    assert (response.status_code, response.headers["retry-after"]) == (429, "42")
    body = {"model": MODEL, "max_tokens": 4, **CHAT}
    response = await http.post("/v1/messages", json=body)
    assert (response.status_code, response.headers["retry-after"]) == (429, "42")
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "key_limit")


async def test_anthropic_says_529_and_why(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    worker.script = failing(
        Code.RESOURCE_EXHAUSTED, "full", error_info("TOKEN_BUDGET"), retry_in(2)
    )
    response = await http.post("/v1/messages", json={"model": MODEL, "max_tokens": 4, **CHAT})
    assert (response.status_code, response.headers["retry-after"]) == (529, "2")
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("overloaded_error", "token_budget")


async def test_a_message_too_large_for_the_worker_is_a_413(
    http: httpx.AsyncClient, worker: ScriptedWorker
) -> None:
    worker.script = failing(
        Code.RESOURCE_EXHAUSTED, "SERVER: Received message larger than max (9 vs. 4)"
    )
    response = await http.post("/v1/completions", json={"prompt": "x"})
    assert response.status_code == 413
    assert "SERVER" not in response.text


async def test_an_exception_in_the_worker_leaks_nothing(
    http: httpx.AsyncClient, worker: ScriptedWorker
) -> None:
    async def script(call: ScriptedCall) -> None:
        raise RuntimeError("secret")

    worker.script = script
    response = await http.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 500
    assert "secret" not in response.text


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


@pytest.mark.parametrize("first", ["nothing", "delta"])
async def test_a_stream_that_does_not_begin_with_started_is_a_500(
    http: httpx.AsyncClient, worker: ScriptedWorker, first: str
) -> None:
    async def script(call: ScriptedCall) -> None:
        if first == "delta":
            await call.delta("too soon")

    worker.script = script
    response = await http.post("/v1/chat/completions", json=CHAT | {"stream": True})
    assert response.status_code == 500


async def test_the_deadline_of_the_edge_is_the_callers_too(
    target: str, worker: ScriptedWorker
) -> None:
    async def script(call: ScriptedCall) -> None:
        if call.request.prompt.text == "late":
            await call.started()
        await call.hang()

    worker.script = script
    never, late = ({"prompt": prompt, "stream": True} for prompt in ("never", "late"))
    async with (
        running_edge(target, request_timeout_seconds=2, first_message_seconds=60) as edge,
        httpx.AsyncClient(base_url=edge.url, timeout=PATIENCE, trust_env=False) as http,
        RawClient(edge.port) as client,
    ):
        await client.send(request_bytes("/v1/completions", late))
        response = await http.post("/v1/completions", json=never)
        assert response.status_code == 504
        assert response.json()["error"]["type"] == "timeout"
        _, stream, is_complete = split_chunked(await client.read_to_end())
        assert not is_complete
        assert parse(stream).events[-1].json()["error"]["type"] == "timeout"
        async with asyncio.timeout(PATIENCE):
            for call in worker.calls:
                await call.ended.wait()
    assert [call.was_cancelled for call in worker.calls] == [True, True]


async def test_no_worker_is_a_503() -> None:
    async with (
        running_edge("127.0.0.1:1") as edge,
        httpx.AsyncClient(base_url=edge.url, timeout=PATIENCE, trust_env=False) as http,
    ):
        for path, body in ROUTES.values():
            response = await http.post(path, json=body)
            assert response.status_code == 503
            assert response.json()["error"]["type"] == "unavailable"
            assert 1 <= int(response.headers["retry-after"]) <= 5
            assert "127.0.0.1" not in response.text
        assert (await http.get("/v1/models")).status_code == 503
        assert (await http.get("/health")).status_code == 200
        ready = await http.get("/ready")
        assert (ready.status_code, ready.json()["status"]) == (503, "not_ready")
