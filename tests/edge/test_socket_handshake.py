"""The WebSocket: who may open one, and what becomes of other requests for it."""

import asyncio
import contextlib
import json
from typing import Any

import httpx
import pytest
from websockets.exceptions import InvalidStatus

from tests.edge.edge_process import PATIENCE, EdgeProcess, running_edge
from tests.edge.raw_http import RawClient
from tests.edge.scripted_worker import (
    ScriptedWorker,
)
from tests.edge.socket_client import PATH, connected, handshake, text_frame


@pytest.mark.parametrize(
    ("origin", "is_let_in"),
    [
        (None, True),
        ("https://a.example", True),
        ("http://127.0.0.1:{port}", True),
        ("https://b.example", False),
        ("http://127.0.0.1", False),
        ("null", False),
        ("http://[", False),
    ],
)
async def test_pages_from_elsewhere_open_nothing(
    edge: EdgeProcess, worker: ScriptedWorker, origin: str | None, is_let_in: bool
) -> None:
    given = None if origin is None else origin.replace("{port}", str(edge.port))
    if is_let_in:
        async with connected(edge, origin=given) as client:
            assert await client.said(prompt="x")
        return
    with pytest.raises(InvalidStatus) as refused:
        async with connected(edge, origin=given):
            pass
    response = refused.value.response
    assert response.status_code == 403
    assert json.loads(response.body or b"")["error"]["code"] == "origin_not_allowed"


async def test_a_plain_get_is_told_what_this_is(http: httpx.AsyncClient) -> None:
    response = await http.get(PATH)
    assert response.status_code == 426
    assert response.headers["upgrade"] == "websocket"
    assert response.json()["error"]["type"] == "invalid_request_error"


async def test_elsewhere_the_offer_is_declined(edge: EdgeProcess, worker: ScriptedWorker) -> None:
    async with RawClient(edge.port) as client:
        await client.send(handshake().replace(PATH.encode(), b"/health"))
        assert (await client.read_until(b"ok")).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("change", "status"),
    [
        (lambda raw: raw.replace(b"sec-websocket-key", b"x-key"), b"400"),
        (lambda raw: raw.replace(b"version: 13", b"version: 8"), b"400"),
        (lambda raw: raw.replace(b"host: ", b"x-long: " + b"x" * 9000 + b"\r\nhost: "), b"431"),
        (lambda raw: raw.replace(b"host: ", b"x: y\r\n" * 200 + b"host: "), b"431"),
        (lambda raw: raw + text_frame({"type": "cancel"}), b"400"),
    ],
)
async def test_a_wrong_handshake_is_answered_and_closed(
    edge: EdgeProcess, worker: ScriptedWorker, change: Any, status: bytes
) -> None:
    async with RawClient(edge.port) as client:
        await client.send(change(handshake()))
        assert (await client.read_to_end()).startswith(b"HTTP/1.1 " + status)


async def test_sockets_count_as_connections(target: str, worker: ScriptedWorker) -> None:
    async with running_edge(target, max_connections=2) as edge:
        async with connected(edge) as first, connected(edge):
            with pytest.raises(InvalidStatus) as refused:
                async with connected(edge):
                    pass
            assert refused.value.response.status_code == 429
            assert await first.said(prompt="x")
        async with asyncio.timeout(PATIENCE):
            while True:  # until the server has seen them leave
                with contextlib.suppress(InvalidStatus):
                    async with connected(edge) as next_one:
                        assert await next_one.said(prompt="x")
                        break


async def test_the_handshake_has_to_come_in_time(target: str, worker: ScriptedWorker) -> None:
    async with running_edge(target, read_timeout_seconds=2) as edge, connected(edge) as client:
        async with RawClient(edge.port) as late:
            await late.send(handshake()[:-2])
            assert (await late.read_to_end()).startswith(b"HTTP/1.1 408")
        assert await client.said(prompt="x")  # which the limit did not end meanwhile
