"""Limits, ids, CORS, health, models, and what is served nowhere."""

import json
import os

import httpx
import pytest

from tests.edge.edge_process import EdgeProcess, fresh_id, running_edge
from tests.edge.fixtures import SHARED_SETTINGS
from tests.edge.raw_http import RawClient, request_bytes
from tests.edge.scripted_worker import (
    CREATED,
    MODEL,
    ScriptedCall,
    ScriptedWorker,
    start_server,
)
from tests.patience import PATIENCE

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
LIMIT = int(str(SHARED_SETTINGS["max_body_bytes"]))


def padded(size: int) -> bytes:
    """A chat body of exactly this many bytes."""
    body = json.dumps(CHAT | {"user": ""}).encode()
    return body.replace(b'"user": ""', b'"user": "' + b"x" * (size - len(body)) + b'"')


async def test_body_limit(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    assert (await http.post("/v1/chat/completions", content=padded(LIMIT))).status_code == 200
    for size in (LIMIT + 1, 4 * LIMIT, 40 * LIMIT):
        response = await http.post("/v1/chat/completions", content=padded(size))
        assert response.status_code == 413
        assert response.json()["error"]["type"] == "invalid_request_error"
    assert len(worker.calls) == 1


async def test_body_limit_without_a_length(edge: EdgeProcess, worker: ScriptedWorker) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    chunk = b"4000\r\n" + b" " * 0x4000 + b"\r\n"
    async with RawClient(edge.port) as client:
        await client.send(head + chunk * 5 + b"0\r\n\r\n")
        assert (await client.read_until(b"larger")).startswith(b"HTTP/1.1 413")
    # Endless: the edge answers and hangs up without waiting for an end.
    async with RawClient(edge.port) as client:
        await client.send(head)
        with pytest.raises(ConnectionError):
            await client.send(chunk * 1000)
    assert worker.calls == []


async def test_body_limit_with_expect(edge: EdgeProcess) -> None:
    async with RawClient(edge.port) as client:
        await client.send(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\n"
            b"content-length: 99999999\r\n\r\n"
        )
        assert (await client.read_until(b"larger")).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(("depth", "status"), [(31, 200), (32, 400), (5000, 400), (9000, 400)])
async def test_json_depth(http: httpx.AsyncClient, depth: int, status: int) -> None:
    nested = b'{"a":' * depth + b"1" + b"}" * depth
    body = json.dumps(CHAT).encode()[:-1] + b',"metadata":' + nested + b"}"
    response = await http.post("/v1/chat/completions", content=body)
    assert response.status_code == status
    if status == 400:
        assert "deep" in response.json()["error"]["message"]


async def test_brackets_in_strings_are_no_depth(http: httpx.AsyncClient) -> None:
    text = '[{"\\' * 50
    body = {"messages": [{"role": "user", "content": text}] * 40}
    assert (await http.post("/v1/chat/completions", json=body)).status_code == 200


@pytest.mark.parametrize("given", ["abc", "A-Z_0.9:x", "x" * 128])
async def test_a_clients_request_id_comes_back(
    http: httpx.AsyncClient, edge: EdgeProcess, given: str
) -> None:
    for path, status in (("/v1/models", 200), ("/v1/models/x", 404), ("/nowhere", 404)):
        response = await http.get(path, headers={"x-request-id": given})
        assert response.status_code == status
        assert response.headers["x-request-id"] == response.headers["request-id"] == given
    assert (await edge.request_line(given))["request_id"].startswith("req-")


@pytest.mark.parametrize("given", [None, "", "a b", "x" * 129, "<script>", "a\u00e9"])
async def test_other_request_ids_are_replaced(http: httpx.AsyncClient, given: str | None) -> None:
    headers = {} if given is None else {b"x-request-id": given.encode("latin-1")}
    first = await http.get("/health", headers=headers)
    second = await http.get("/health", headers=headers)
    ids = {response.headers["x-request-id"] for response in (first, second)}
    assert len(ids) == 2
    assert all(made.startswith("req-") for made in ids)


async def test_one_log_line_a_request_without_text(
    http: httpx.AsyncClient, edge: EdgeProcess, worker: ScriptedWorker
) -> None:
    client_id, refused_id = fresh_id("log"), fresh_id("refused")
    body = {"messages": [{"role": "user", "content": "a secret prompt"}], "stream": True}
    await http.post("/v1/chat/completions", json=body, headers={"x-request-id": client_id})
    line = await edge.request_line(client_id)
    assert line["event"] == "request"
    assert line["route"] == "/v1/chat/completions"
    assert line["method"] == "POST"
    assert line["status"] == 200
    assert line["generation_id"] == worker.call.request.request_id
    assert (line["prompt_tokens"], line["completion_tokens"]) == (7, 3)
    assert line["finish_reasons"] == ["stop"]
    assert 0 <= line["ttft"] <= line["duration"]
    await http.post(
        "/v1/chat/completions", json={"messages": 1}, headers={"x-request-id": refused_id}
    )
    refused = await edge.request_line(refused_id)
    assert (refused["status"], refused["error"]) == (400, "invalid_request_error")
    assert sum(line.get("client_request_id") == client_id for line in edge.lines) == 1
    assert not any("secret prompt" in json.dumps(line) for line in edge.lines)


async def test_cors(http: httpx.AsyncClient) -> None:
    preflight = await http.options(
        "/v1/chat/completions",
        headers={
            "origin": "https://a.example",
            "access-control-request-method": "POST",
            "access-control-request-headers": "content-type",
        },
    )
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://a.example"
    for body, status in ((CHAT | {"stream": True}, 200), ({}, 400)):
        response = await http.post(
            "/v1/chat/completions", json=body, headers={"origin": "https://a.example"}
        )
        assert response.status_code == status
        assert response.headers["access-control-allow-origin"] == "https://a.example"
        assert "x-request-id" in response.headers["access-control-expose-headers"].lower()
    other = await http.get("/v1/models", headers={"origin": "https://b.example"})
    assert "access-control-allow-origin" not in other.headers


async def test_no_cors_by_default_and_health_follows_the_worker(
    target: str, worker: ScriptedWorker
) -> None:
    async with (
        running_edge(target) as edge,
        httpx.AsyncClient(base_url=edge.url, timeout=PATIENCE, trust_env=False) as http,
    ):
        response = await http.get("/v1/models", headers={"origin": "https://a.example"})
        assert "access-control-allow-origin" not in response.headers

        assert (await http.get("/ready")).status_code == 200
        assert (await edge.line(lambda line: line.get("serving") is True))["target"] == target
        seen = len(edge.lines)
        await worker.set_serving(False)
        try:
            await edge.line(lambda line: line.get("serving") is False, since=seen)
            ready = await http.get("/ready")
            assert ready.status_code == 503
            assert ready.json() == {
                "status": "not_ready",
                "reason": "the worker says NOT_SERVING",
            }
            assert (await http.get("/health")).status_code == 200
            refused = await http.post("/v1/chat/completions", json=CHAT | {"stream": True})
            assert refused.status_code == 503
            assert worker.calls == []
        finally:
            await worker.set_serving(True)
        await edge.line(lambda line: line.get("serving") is True, since=seen)
        assert (await http.get("/ready")).status_code == 200
        assert (await http.post("/v1/chat/completions", json=CHAT)).status_code == 200


async def test_models(http: httpx.AsyncClient) -> None:
    listed = (await http.get("/v1/models")).json()
    assert listed["object"] == "list"
    (model,) = listed["data"]
    assert model["id"] == MODEL
    assert model["object"] == "model"
    assert model["created"] == CREATED
    assert model["owned_by"] == "sluice"
    assert (await http.get(f"/v1/models/{MODEL}")).json() == model
    assert (model["kv_cache_bytes"], model["kv_bytes_per_token"]) == (2**20, 512)
    alias = (await http.get("/v1/models/default")).json()
    assert alias == model | {"id": "default"}
    missing = await http.get("/v1/models/gpt-99")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/static/../app.py", 404),
        ("GET", "/static", 404),
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/chat/completions", 405),
        ("PUT", "/v1/streams", 405),
        ("POST", "/health", 405),
        ("HEAD", "/v1/streams?prompt=x", 405),
        ("OPTIONS", "/v1/models", 405),
    ],
)
async def test_what_is_not_served(
    http: httpx.AsyncClient, method: str, path: str, status: int
) -> None:
    response = await http.request(method, path)
    assert response.status_code == status
    if method != "HEAD":
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


async def hanging(call: ScriptedCall) -> None:
    await call.started()
    await call.hang()


async def test_too_many_connections_are_a_429(target: str, worker: ScriptedWorker) -> None:
    async with running_edge(target, max_connections=2, cors_origins="https://a.example") as edge:
        async with RawClient(edge.port) as first, RawClient(edge.port) as second:
            worker.script = hanging
            for client in (first, second):
                await client.send(request_bytes("/v1/chat/completions", CHAT | {"stream": True}))
                await client.read_until(b"assistant")
            async with RawClient(edge.port) as third:
                await third.send(
                    request_bytes("/v1/chat/completions", CHAT, origin="https://a.example")
                )
                answer = await third.read_to_end()
                assert answer.startswith(b"HTTP/1.1 429")
                assert b"retry-after: 1\r\n" in answer
                assert b"access-control-allow-origin: https://a.example\r\n" in answer
            for path in ("/health", "/ready"):
                async with RawClient(edge.port) as probe:
                    await probe.send(request_bytes(path, method="GET"))
                    assert (await probe.read_until(b"status")).startswith(b"HTTP/1.1 200")
            assert [call.was_cancelled for call in worker.calls] == [False, False]
        worker.reset()
        async with RawClient(edge.port) as later:
            await later.send(request_bytes("/v1/chat/completions", CHAT))
            assert (await later.read_until(b"usage")).startswith(b"HTTP/1.1 200")


async def test_idle_connections_make_room(target: str, worker: ScriptedWorker) -> None:
    """And those within the limit are not refused because another one came."""
    models = request_bytes("/v1/models", method="GET")
    async with (
        running_edge(target, max_connections=2) as edge,
        RawClient(edge.port) as idlest,
        RawClient(edge.port) as idle,
    ):
        for client in (idlest, idle):
            await client.send(models)
            await client.read_until(b"list")
        async with RawClient(edge.port) as third:
            await third.send(models)
            assert (await third.read_until(b"list")).startswith(b"HTTP/1.1 200")
            assert (await idlest.read_to_end()).count(b"HTTP/1.1 200") == 1
            idle.received = b""
            await idle.send(models)
            assert (await idle.read_until(b"list")).startswith(b"HTTP/1.1 200")
            worker.script = hanging
            stream = request_bytes("/v1/chat/completions", CHAT | {"stream": True})
            for client in (idle, third):
                await client.send(stream)
                await client.read_until(b"assistant")
            async with RawClient(edge.port) as fourth:
                await fourth.send(models)
                assert (await fourth.read_to_end()).startswith(b"HTTP/1.1 429")


async def test_a_unix_socket_to_the_worker(
    worker: ScriptedWorker, tmp_path: os.PathLike[str]
) -> None:
    address = f"unix:{os.fspath(tmp_path)}/worker.sock"
    server, _ = await start_server(worker, address)
    try:
        async with (
            running_edge(address) as edge,
            httpx.AsyncClient(base_url=edge.url, timeout=PATIENCE, trust_env=False) as http,
        ):
            assert (await http.post("/v1/chat/completions", json=CHAT)).status_code == 200
    finally:
        await server.stop(0)


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/streams", "GET, POST"),
        ("/v1/streams/x", "DELETE"),
        ("/v2/models/x/generate", "POST"),
        ("/v1/models/a/b", "GET, HEAD"),
    ],
)
async def test_a_wrong_method_is_told_the_right_ones(
    http: httpx.AsyncClient, path: str, allowed: str
) -> None:
    answer = await http.put(path)
    assert (answer.status_code, answer.headers["allow"]) == (405, allowed)


async def test_a_line_feed_in_a_models_name_is_part_of_it(http: httpx.AsyncClient) -> None:
    answer = await http.get("/v2/models/a%0Ab/ready")
    assert answer.status_code == 404
    assert isinstance(answer.json()["error"], str), "Triton's form"
