"""The WebSocket where API keys are needed: who opens one, for whom it generates, and for how long it stays open."""

import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from edge.api_keys import ApiKey, digest_of, line_of
from tests.edge.edge_process import PATIENCE, EdgeProcess, running_edge
from tests.edge.key_holders import ALICE, BOB, CAROL, KEYS, LINES, bearer, hang_up
from tests.edge.pool import until
from tests.edge.scripted_worker import ScriptedWorker
from tests.edge.socket_client import Client, url

OLD, NEW = "sluice_old", "sluice_new"


@contextlib.asynccontextmanager
async def connected(
    edge: EdgeProcess, headers: dict[str, str] | None = None, query: str = ""
) -> AsyncIterator[Client]:
    async with connect(url(edge) + query, proxy=None, additional_headers=headers) as socket:
        yield Client(socket)


async def token_of(edge: EdgeProcess, key: str) -> str:
    async with httpx.AsyncClient(base_url=edge.url, trust_env=False, timeout=PATIENCE) as http:
        answer = await http.post("/v1/tokens", headers=bearer(key))
        token: str = answer.json()["access_token"]
        return token


async def test_without_a_good_key_the_handshake_is_refused(
    target: str, worker: ScriptedWorker
) -> None:
    async with running_edge(target, api_keys=LINES.replace("\n", ";")) as edge:
        token = await token_of(edge, ALICE)
        refusals: list[tuple[dict[str, str] | None, str, int, str | None]] = [
            (None, "", 401, None),
            (bearer("wrong"), "", 401, "invalid_api_key"),
            (bearer(CAROL), "", 403, "api_key_disabled"),
            (None, f"?access_token={token}x", 401, "invalid_api_key"),
            (None, f"?access_token={ALICE}", 401, None),  # a key has no place in a query
            (None, f"?token={token}", 401, None),
        ]
        for headers, query, status, code in refusals:
            with pytest.raises(InvalidStatus) as refused:
                async with connected(edge, headers, query):
                    pass
            response = refused.value.response
            assert response.status_code == status, query
            assert ("www-authenticate" in response.headers) == (status == 401)
            told = json.loads(response.body or b"")
            assert told["error"]["code"] == code
        assert not worker.calls

        def keys() -> list[str | None]:
            return [line.get("key") for line in edge.lines if line.get("route") == "/v1/ws"]

        await until(lambda: len(keys()) == len(refusals))
        assert keys() == [None] * len(refusals)


async def test_a_socket_generates_for_the_key_that_opened_it(
    target: str, worker: ScriptedWorker
) -> None:
    async with running_edge(target, api_keys=LINES.replace("\n", ";")) as edge:
        token = await token_of(edge, ALICE)
        ways: list[tuple[dict[str, str] | None, str, ApiKey]] = [
            (bearer(ALICE), "", KEYS[0]),
            ({"x-api-key": BOB}, "", KEYS[1]),
            (None, f"?access_token={token}", KEYS[0]),
        ]
        for headers, query, key in ways:
            async with connected(edge, headers, query) as client:
                assert await client.said(prompt="x")
            assert worker.calls[-1].request.caller == key.caller()
        log = str(edge.lines)
        assert token not in log
        assert ALICE not in log


@pytest.mark.parametrize(
    "now",
    [
        ApiKey("bob", (digest_of(BOB),)),  # alice is gone
        ApiKey("alice", (digest_of(OLD), digest_of(NEW)), is_disabled=True),
        ApiKey("alice", (digest_of(NEW),)),  # the secret that opened the socket is gone
    ],
)
@pytest.mark.parametrize("is_by_token", [False, True])
async def test_a_key_that_is_revoked_closes_its_sockets(
    target: str, worker: ScriptedWorker, tmp_path: Path, now: ApiKey, is_by_token: bool
) -> None:
    path = tmp_path / "keys"
    path.write_text(line_of(ApiKey("alice", (digest_of(OLD), digest_of(NEW)))))
    async with running_edge(target, api_keys_file=path) as edge:
        query = f"?access_token={await token_of(edge, OLD)}" if is_by_token else ""
        async with connected(edge, None if is_by_token else bearer(OLD), query) as client:
            assert await client.said(prompt="x")
            path.write_text(line_of(now))
            await hang_up(edge)
            await client.generate(prompt="y")
            assert await client.closed() == 1008
        assert len(worker.calls) == 1


async def test_a_key_that_is_still_one_has_the_limits_of_now(
    target: str, worker: ScriptedWorker, tmp_path: Path
) -> None:
    path = tmp_path / "keys"
    before: dict[str, Any] = {"name": "alice", "digests": (digest_of(OLD),)}
    path.write_text(line_of(ApiKey(**before, max_concurrent=8)))
    async with (
        running_edge(target, api_keys_file=path) as edge,
        connected(edge, bearer(OLD)) as one,
    ):
        for limit in (8, 2):
            path.write_text(line_of(ApiKey(**before, max_concurrent=limit)))
            await hang_up(edge)
            assert await one.said(prompt="x")
            assert worker.calls[-1].request.caller.max_concurrent == limit
