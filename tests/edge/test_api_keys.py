"""API keys: who comes in, what the worker is told of them, and how each dialect refuses the others."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from edge.access_tokens import TOKEN_PREFIX
from edge.api_keys import (
    digest_of,
)
from tests.edge.edge_process import PATIENCE, EdgeProcess, fresh_id, running_edge
from tests.edge.key_holders import ALICE, BOB, CAROL, KEYS, LINES, SECRET, bearer
from tests.edge.raw_http import RawClient, request_bytes
from tests.edge.scripted_worker import ScriptedWorker

HI = [{"role": "user", "content": "hi"}]


CHAT = {"messages": HI}


# Each dialect's route, a body, and what its refusal looks like but for the message and id.
OPENAI_BODY = {"error": {"type": "authentication_error", "param": None, "code": None}}


ANTHROPIC_BODY = {"type": "error", "error": {"type": "authentication_error"}}


DIALECTS: list[tuple[str, str, dict[str, Any] | None, dict[str, Any]]] = [
    ("POST", "/v1/chat/completions", CHAT, OPENAI_BODY),
    ("POST", "/v1/completions", {"prompt": "hi"}, OPENAI_BODY),
    ("POST", "/v1/responses", {"input": "hi"}, OPENAI_BODY),
    ("POST", "/v1/responses/resp_0/cancel", None, OPENAI_BODY),
    ("POST", "/v1/streams", {"prompt": "hi"}, OPENAI_BODY),
    ("GET", "/v1/streams?prompt=hi", None, OPENAI_BODY),
    ("DELETE", "/v1/streams/stream-1", None, OPENAI_BODY),
    ("GET", "/v1/models", None, OPENAI_BODY),
    ("GET", "/v1/models/default", None, OPENAI_BODY),
    ("POST", "/v1/tokens", None, OPENAI_BODY),
    ("GET", "/openapi.json", None, OPENAI_BODY),
    ("POST", "/v1/messages", CHAT | {"max_tokens": 4}, ANTHROPIC_BODY),
    ("POST", "/v1/messages/count_tokens", CHAT, ANTHROPIC_BODY),
    ("POST", "/generate", {"inputs": "hi"}, {"error_type": "authentication"}),
    ("POST", "/generate_stream", {"inputs": "hi"}, {"error_type": "authentication"}),
    ("POST", "/", {"inputs": "hi"}, {"error_type": "authentication"}),
    ("GET", "/info", None, {"error_type": "authentication"}),
    ("POST", "/tokenize", {"inputs": "hi"}, {"error_type": "authentication"}),
    ("POST", "/v2/models/default/generate", {"text_input": "hi"}, {}),
    ("POST", "/v2/models/default/generate_stream", {"text_input": "hi"}, {}),
    ("POST", "/v2/models/default/infer", {"inputs": []}, {}),
    ("GET", "/v2/models/default", None, {}),
    ("GET", "/v2/models/default/ready", None, {}),
    ("GET", "/v2", None, {}),
]


OPEN_PATHS = {"/health", "/ready", "/v2/health/live", "/v2/health/ready", "/", "/static/main.js"}


def without(body: Any, *names: str) -> Any:
    """A body without these members, at any depth."""
    if not isinstance(body, dict):
        return body
    return {name: without(value, *names) for name, value in body.items() if name not in names}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("keys")
    (directory / "keys").write_text(LINES)
    (directory / "secret").write_bytes(SECRET + b"\n")
    return directory


def settings_of(files: Path) -> dict[str, object]:
    return {"api_keys_file": files / "keys", "token_secret_file": files / "secret"}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def guarded_edge(
    shared_worker: tuple[ScriptedWorker, str], files: Path
) -> AsyncIterator[EdgeProcess]:
    async with running_edge(shared_worker[1], **settings_of(files)) as edge:
        yield edge


@pytest_asyncio.fixture(loop_scope="session")
async def guarded(
    guarded_edge: EdgeProcess, worker: ScriptedWorker
) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(
        base_url=guarded_edge.url, timeout=PATIENCE, trust_env=False
    ) as http:
        yield http


@pytest.mark.parametrize(("method", "path", "body", "refusal"), DIALECTS)
async def test_without_a_key_each_dialect_refuses_in_its_own_form(
    guarded: httpx.AsyncClient,
    worker: ScriptedWorker,
    method: str,
    path: str,
    body: dict[str, Any] | None,
    refusal: dict[str, Any],
) -> None:
    answer = await guarded.request(method, path, json=body)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == 'Bearer realm="sluice"'
    told = answer.json()
    message = told["error"] if isinstance(told["error"], str) else told["error"]["message"]
    assert message.startswith("Give an API key")
    dropped = ("message", "request_id") if "error" in refusal else ("error",)
    assert without(told, *dropped) == refusal
    assert not worker.calls
    assert not worker.aborted


async def test_every_route_is_guarded_but_the_open_ones(guarded: httpx.AsyncClient) -> None:
    document = (await guarded.get("/openapi.json", headers=bearer(ALICE))).json()
    open_paths = set()
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            answer = await guarded.request(method, path.replace("{", "").replace("}", ""))
            if answer.status_code != 401:
                open_paths.add(path)
            needs = {"401", "403"} <= set(operation["responses"])
            assert ("security" in operation) == needs == (answer.status_code == 401), path
    assert open_paths == OPEN_PATHS - {"/", "/static/main.js"}
    for path in OPEN_PATHS:
        assert (await guarded.get(path)).status_code == 200


async def test_a_wrong_key_is_a_401_and_a_disabled_one_a_403(
    guarded: httpx.AsyncClient, worker: ScriptedWorker
) -> None:
    for key in ("wrong", ALICE[:-1], ALICE + "x", digest_of(ALICE).hex(), "Ω" * 9, ".."):
        answer = await guarded.post(
            "/v1/chat/completions",
            json=CHAT,
            headers={b"Authorization": f"Bearer {key}".encode()},
        )
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert 'error="invalid_token"' in answer.headers["www-authenticate"]
        assert key not in answer.text
    answer = await guarded.post("/v1/chat/completions", json=CHAT, headers=bearer(CAROL))
    assert answer.status_code == 403
    assert answer.json()["error"]["type"] == "permission_error"
    assert worker.calls == []


@pytest.mark.parametrize(
    "headers", [bearer(ALICE), {"authorization": f"bearer  {ALICE}"}, {"x-api-key": ALICE}]
)
async def test_the_worker_is_told_for_whom_it_is(
    guarded: httpx.AsyncClient, worker: ScriptedWorker, headers: dict[str, str]
) -> None:
    answer = await guarded.post("/v1/completions", json={"prompt": ["a", "b"]}, headers=headers)
    assert answer.status_code == 200
    assert [call.request.caller for call in worker.calls] == [KEYS[0].caller()] * 2
    assert KEYS[0].caller().max_concurrent == 8
    await guarded.delete("/v1/streams/stream-1", headers=headers)
    response_id = "resp_" + "0" * 32
    await guarded.post(f"/v1/responses/{response_id}/cancel", headers=headers)
    assert worker.aborted_for == ["alice", "alice"]


@pytest.mark.parametrize(
    ("path", "body"),
    [("/tokenize", {"inputs": "hi"}), ("/v1/messages/count_tokens", CHAT | {"model": "m"})],
)
async def test_who_tokenizes_is_named_too(
    guarded: httpx.AsyncClient, worker: ScriptedWorker, path: str, body: dict[str, Any]
) -> None:
    answer = await guarded.post(path, json=body, headers=bearer(ALICE))
    assert answer.status_code == 200
    ((asked, _),) = worker.tokenizations
    assert asked.caller == KEYS[0].caller()


async def test_without_keys_nobody_is_named(
    http: httpx.AsyncClient, worker: ScriptedWorker
) -> None:
    answer = await http.post("/v1/chat/completions", json=CHAT, headers=bearer("anything"))
    assert answer.status_code == 200
    assert not worker.call.request.HasField("caller")
    await http.delete("/v1/streams/stream-1")
    assert worker.aborted_for == [None]
    assert (await http.post("/v1/tokens")).status_code == 404


async def test_a_token_opens_an_event_source(
    guarded: httpx.AsyncClient, guarded_edge: EdgeProcess, worker: ScriptedWorker
) -> None:
    answer = await guarded.post("/v1/tokens", headers=bearer(ALICE))
    assert answer.headers["cache-control"] == "no-store"
    given = answer.json()
    token = given["access_token"]
    assert given == {"access_token": token, "token_type": "Bearer", "expires_in": 300}
    stream = await guarded.get("/v1/streams", params={"prompt": "hi", "access_token": token})
    assert stream.status_code == 200
    assert "event: finished" in stream.text
    assert worker.call.request.caller == KEYS[0].caller()
    # a key in a query would stand in the logs of whatever is on the way
    refused = await guarded.get("/v1/streams", params={"prompt": "hi", "access_token": ALICE})
    assert refused.status_code == 401
    refused = await guarded.post(
        "/v1/streams", params={"access_token": token}, json={"prompt": "hi"}
    )
    assert refused.status_code == 401
    assert (await guarded.get("/v1/models", headers=bearer(token))).status_code == 200
    # nobody prolongs a token with a token
    assert (await guarded.post("/v1/tokens", headers=bearer(token))).status_code == 401


async def test_another_edge_takes_the_token(
    guarded: httpx.AsyncClient, target: str, files: Path
) -> None:
    token = (await guarded.post("/v1/tokens", headers=bearer(BOB))).json()["access_token"]
    async with (
        running_edge(target, **settings_of(files)) as edge,
        running_edge(target, api_keys_file=files / "keys") as stranger,
    ):
        for url, status in ((edge.url, 200), (stranger.url, 401)):
            async with httpx.AsyncClient(trust_env=False, timeout=PATIENCE) as http:
                answer = await http.get(f"{url}/v1/models", params={"access_token": token})
            assert answer.status_code == status


async def test_neither_keys_nor_tokens_are_logged(
    guarded: httpx.AsyncClient, guarded_edge: EdgeProcess
) -> None:
    client_ids = [fresh_id("logged") for _ in range(5)]
    token = (await guarded.post("/v1/tokens", headers=bearer(ALICE))).json()["access_token"]
    for index, (headers, query) in enumerate(
        [
            (bearer(ALICE), ""),
            (bearer("sluice_unknown"), ""),
            ({"x-api-key": BOB}, f"?access_token={token}"),
            ({}, f"?access_token={token}"),
            ({}, f"?access_token={token}x"),
        ]
    ):
        headers["x-request-id"] = client_ids[index]
        await guarded.get(f"/v1/models{query}", headers=headers)
    lines = [await guarded_edge.request_line(client_id) for client_id in client_ids]
    assert [line.get("key") for line in lines] == ["alice", None, "bob", "alice", None]
    log = json.dumps(guarded_edge.lines)
    for secret in (ALICE, BOB, "sluice_unknown", token, TOKEN_PREFIX, digest_of(ALICE).hex()):
        assert secret not in log


async def test_a_refused_body_is_not_waited_for(guarded_edge: EdgeProcess) -> None:
    head = request_bytes("/v1/completions", {"prompt": "hi"})
    begin = head.replace(b"content-length: 16", b"content-length: 1000000")[:-4]
    async with RawClient(guarded_edge.port) as client:
        await client.send(begin)
        assert (await client.read_until(b"authentication_error")).startswith(b"HTTP/1.1 401")


async def test_metrics_need_a_key_unless_they_are_open(target: str, files: Path) -> None:
    for is_open in (False, True):
        async with (
            running_edge(target, open_metrics=is_open, **settings_of(files)) as edge,
            httpx.AsyncClient(trust_env=False, timeout=PATIENCE) as http,
        ):
            without = await http.get(f"{edge.url}/metrics")
            assert without.status_code == (200 if is_open else 401)
            with_key = await http.get(f"{edge.url}/metrics", headers=bearer(BOB))
            assert with_key.status_code == 200


async def test_probes_have_a_port_of_their_own(target: str, files: Path) -> None:
    async with (
        running_edge(target, admin_port=0, **settings_of(files)) as edge,
        httpx.AsyncClient(trust_env=False, timeout=PATIENCE) as http,
    ):
        admin = f"http://127.0.0.1:{edge.admin_port}"
        for path in ("/health", "/ready"):
            async with asyncio.timeout(PATIENCE):
                while (await http.get(admin + path)).status_code != 200:
                    await asyncio.sleep(0.05)
            assert (await http.get(edge.url + path)).status_code == 404
        assert (await http.get(f"{admin}/metrics")).status_code == 200
        assert (await http.get(f"{edge.url}/metrics")).status_code == 404
        for path in ("/v1/models", "/", "/static/main.js", "/openapi.json"):
            assert (await http.get(admin + path)).status_code == 404
        edge.process.terminate()
        assert await edge.wait() == 0
