"""HTTPS to clients, with real certificates."""

import asyncio
import contextlib
import ssl
import warnings
from collections.abc import AsyncIterator

import grpc
import httpx
import pytest
import pytest_asyncio
from websockets.asyncio.client import connect

from tests.edge.certificates import Certificates
from tests.edge.edge_process import PATIENCE, EdgeProcess, fresh_id, running_edge
from tests.edge.raw_http import RawClient, request_bytes
from tests.edge.scripted_worker import ScriptedCall, ScriptedWorker, texts
from tests.edge.socket_client import Client
from tests.edge.tls_client import CHAT, connected, trusting


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def https_edge(
    shared_worker: tuple[ScriptedWorker, str], certificates: Certificates
) -> AsyncIterator[EdgeProcess]:
    async with running_edge(
        shared_worker[1],
        tls_cert=certificates.server,
        tls_key=certificates.server_key,
        read_timeout_seconds=2,
        send_timeout_seconds=0.5,
        admin_port=0,
    ) as edge:
        yield edge


async def test_a_stream_over_https(
    https_edge: EdgeProcess, certificates: Certificates, worker: ScriptedWorker
) -> None:
    context = trusting(certificates)
    async with httpx.AsyncClient(verify=context, trust_env=False, timeout=PATIENCE) as http:
        answer = await http.post(
            f"https://127.0.0.1:{https_edge.port}/v1/chat/completions", json=CHAT
        )
        assert answer.text.endswith("data: [DONE]\n\n")
        # probes stay plain on their own port
        health = await http.get(f"http://127.0.0.1:{https_edge.admin_port}/health")
        assert health.status_code == 200
        with pytest.raises(httpx.TransportError):
            await http.get(f"http://127.0.0.1:{https_edge.port}/v1/models")
    async with httpx.AsyncClient(trust_env=False, timeout=PATIENCE) as stranger:
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            await stranger.get(f"https://127.0.0.1:{https_edge.port}/v1/models")


async def test_old_versions_of_tls_are_refused(
    https_edge: EdgeProcess, certificates: Certificates
) -> None:
    for version, is_taken in (
        (ssl.TLSVersion.TLSv1_1, False),
        (ssl.TLSVersion.TLSv1_2, True),
        (ssl.TLSVersion.TLSv1_3, True),
    ):
        context = trusting(certificates)
        context.set_ciphers("DEFAULT:@SECLEVEL=0")  # lets the client offer what is old
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            context.minimum_version = context.maximum_version = version
        try:
            async with connected(https_edge, context) as (_, writer):
                assert is_taken
                assert writer.get_extra_info("ssl_object").version().replace("v1.", "v1_") == (
                    version.name
                )
        except (ssl.SSLError, ConnectionError):
            assert not is_taken


@pytest.mark.parametrize("way", ["abort", "close"])
async def test_leaving_a_stream_over_tls_cancels_it(
    https_edge: EdgeProcess, certificates: Certificates, worker: ScriptedWorker, way: str
) -> None:
    async def hang(call: ScriptedCall) -> None:
        await call.started()
        await call.delta("one")
        await call.hang()

    worker.script = hang
    async with connected(https_edge, trusting(certificates)) as (reader, writer):
        writer.write(request_bytes("/v1/chat/completions", CHAT))
        async with asyncio.timeout(PATIENCE):
            await reader.readuntil(b'"one"')
        if way == "close":
            writer.close()
            with contextlib.suppress(ssl.SSLError, ConnectionError):
                await writer.wait_closed()
    async with asyncio.timeout(PATIENCE):
        await worker.call.ended.wait()
    assert worker.call.was_cancelled


async def test_a_reader_over_tls_that_stops_reading_is_dropped(
    https_edge: EdgeProcess, certificates: Certificates, worker: ScriptedWorker
) -> None:
    async def flood(call: ScriptedCall) -> None:
        await call.started()
        while True:
            await call.delta("x" * 4096)

    worker.script = flood
    client_id = fresh_id("stalled")
    async with connected(https_edge, trusting(certificates)) as (reader, writer):
        writer.write(request_bytes("/v1/chat/completions", CHAT, x_request_id=client_id))
        async with asyncio.timeout(PATIENCE):
            await reader.readuntil(b"xxx")
            line = await https_edge.request_line(client_id)
            await worker.call.ended.wait()
    assert line["finish"] == "send_timeout"
    assert worker.call.was_cancelled


async def test_a_request_that_dribbles_over_tls_is_cut_off(
    https_edge: EdgeProcess, certificates: Certificates
) -> None:
    async with connected(https_edge, trusting(certificates)) as (reader, writer):
        writer.write(request_bytes("/v1/chat/completions", CHAT)[:-4])
        async with asyncio.timeout(PATIENCE):
            assert (await reader.readline()).startswith(b"HTTP/1.1 408 ")
            await reader.read()


async def test_a_handshake_that_never_ends_is_cut_off(https_edge: EdgeProcess) -> None:
    async with RawClient(https_edge.port) as client:
        await client.send(b"\x16\x03\x01")  # a record begins, and no more
        assert await client.read_to_end() == b""


async def test_handshakes_count_as_connections(
    target: str, certificates: Certificates, worker: ScriptedWorker
) -> None:
    async with (
        running_edge(
            target,
            tls_cert=certificates.server,
            tls_key=certificates.server_key,
            max_connections_per_address=2,
        ) as edge,
        contextlib.AsyncExitStack() as stack,
    ):
        silent = [RawClient(edge.port) for _ in range(4)]
        for client in silent:
            await stack.enter_async_context(client)
        async with RawClient(edge.port) as fifth:  # beyond twice as many
            with contextlib.suppress(ConnectionResetError):
                assert await fifth.read_to_end() == b""
        assert await answer_of(edge, certificates) == b""
        silent.pop().socket.close()
        async with asyncio.timeout(PATIENCE):  # until the edge has seen it leave
            while not (await answer_of(edge, certificates)).startswith(b"HTTP/1.1 200"):
                await asyncio.sleep(0.01)


async def answer_of(edge: EdgeProcess, certificates: Certificates) -> bytes:
    """To one request; nothing where the connection was closed."""
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
        async with connected(edge, trusting(certificates)) as (reader, writer):
            writer.write(request_bytes("/v1/models", method="GET"))
            async with asyncio.timeout(PATIENCE):
                return await reader.readuntil(b"\r\n")
    return b""


async def test_a_websocket_over_tls(
    https_edge: EdgeProcess, certificates: Certificates, worker: ScriptedWorker
) -> None:
    url = f"wss://127.0.0.1:{https_edge.port}/v1/ws"
    worker.script = texts(["x" * 1000] * 50)
    async with connect(url, proxy=None, ssl=trusting(certificates)) as socket:
        client = Client(socket)
        assert await client.said(prompt="y" * 50_000) == "x" * 50_000

        async def hang(call: ScriptedCall) -> None:
            await call.started()
            await call.hang()

        worker.script = hang
        await client.generate(prompt="z")
        assert (await client.event())["type"] == "started"
        # no farewell, neither of the socket's nor of TLS's
        socket.transport.abort()
    async with asyncio.timeout(PATIENCE):
        await worker.calls[-1].ended.wait()
    assert worker.calls[-1].was_cancelled


async def test_a_stream_that_fails_over_tls_is_not_ended_properly(
    https_edge: EdgeProcess, certificates: Certificates, worker: ScriptedWorker
) -> None:
    async def fail(call: ScriptedCall) -> None:
        await call.started()
        await call.delta("one")
        await call.fail(grpc.StatusCode.INTERNAL)

    worker.script = fail
    async with connected(https_edge, trusting(certificates)) as (reader, writer):
        writer.write(request_bytes("/v1/chat/completions", CHAT))
        async with asyncio.timeout(PATIENCE):
            answer = await reader.read()
    assert b'"server_error"' in answer
    assert not answer.endswith(b"0\r\n\r\n")
