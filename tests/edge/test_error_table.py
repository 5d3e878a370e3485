"""Every row of the error table before the 200, over real sockets."""

import asyncio

import grpc
import httpx
import pytest
from google.protobuf.message import Message

from edge.errors import STATUS_TABLE
from tests.edge.edge_process import running_edge
from tests.edge.error_routes import CHAT, ROUTES, Code
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
