"""HTTPS to clients and TLS to workers, with real certificates."""

import asyncio
import contextlib
import signal
import ssl
import warnings
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import pytest
import pytest_asyncio
import trustme
from websockets.asyncio.client import connect

from edge.command_line import read_settings
from protos.sluice.v1 import generation_pb2 as pb
from protos.sluice.v1 import generation_pb2_grpc as pb_grpc
from tests.edge.edge_process import PATIENCE, EdgeProcess, fresh_id, running_edge
from tests.edge.raw_http import RawClient, request_bytes
from tests.edge.scripted_worker import ScriptedCall, ScriptedWorker, texts
from tests.edge.test_socket import Client
from tests.worker.worker_process import ready_worker

CHAT = {"messages": [{"role": "user", "content": "hi"}], "stream": True}


@dataclass(frozen=True)
class Certificates:
    """PEM files of one authority and of two that it signed, and another authority."""

    ca: Path
    server: Path
    server_key: Path
    client: Path
    client_key: Path
    other_ca: Path
    # for a name that nothing is reached by
    named: Path
    named_key: Path


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    directory = tmp_path_factory.mktemp("tls")
    authority, other = trustme.CA(), trustme.CA()

    def write(name: str, certificate: trustme.LeafCert) -> tuple[Path, Path]:
        chain, key = directory / f"{name}.pem", directory / f"{name}.key"
        chain.write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
        key.write_bytes(certificate.private_key_pem.bytes())
        return chain, key

    for name, made in (("ca", authority), ("other", other)):
        made.cert_pem.write_to_path(str(directory / name))
    return Certificates(
        directory / "ca",
        *write("server", authority.issue_cert("127.0.0.1", "localhost")),
        *write("client", authority.issue_cert("edge")),
        directory / "other",
        *write("named", authority.issue_cert("worker.example")),
    )


def trusting(certificates: Certificates) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(certificates.ca))


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


@contextlib.asynccontextmanager
async def connected(
    edge: EdgeProcess, context: ssl.SSLContext
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    # What is read ahead is bounded, so that a reader that stops is soon felt.
    reader, writer = await asyncio.open_connection("127.0.0.1", edge.port, ssl=context, limit=4096)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


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


async def status_of(edge: EdgeProcess) -> int:
    async with httpx.AsyncClient(trust_env=False, timeout=PATIENCE) as http:
        answer = await http.post(f"{edge.url}/v1/chat/completions", json=CHAT)
        assert answer.status_code != 200 or answer.text.endswith("data: [DONE]\n\n")
        return answer.status_code


async def test_edge_and_worker_know_each_other_by_certificate(certificates: Certificates) -> None:
    flags = {
        "--tls-cert": certificates.server,
        "--tls-key": certificates.server_key,
        "--tls-client-ca": certificates.ca,
    }
    trust = {"worker_ca": certificates.ca}
    shown = trust | {"worker_cert": certificates.client, "worker_key": certificates.client_key}
    async with ready_worker(*(f"{name}={value}" for name, value in flags.items())) as worker:
        async with running_edge(worker.address, **shown) as edge:
            assert await status_of(edge) == 200
        for wrong in (
            {},
            trust,
            shown | {"worker_ca": certificates.other_ca},
            shown | {"worker_server_name": "worker.example"},
        ):
            async with running_edge(worker.address, **wrong) as edge:
                assert await status_of(edge) == 503
        channel = grpc.aio.insecure_channel(worker.address)
        stub: pb_grpc.GenerationServiceAsyncStub = pb_grpc.GenerationServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.GetModel(pb.GetModelRequest(), timeout=PATIENCE)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        await channel.close()


async def test_a_worker_is_known_by_another_name_than_it_is_reached_by(
    certificates: Certificates,
) -> None:
    flags = (f"--tls-cert={certificates.named}", f"--tls-key={certificates.named_key}")
    async with ready_worker(*flags) as worker:
        for name, status in (("worker.example", 200), ("", 503)):
            async with running_edge(
                worker.address, worker_ca=certificates.ca, worker_server_name=name
            ) as edge:
                assert await status_of(edge) == status


class Renewed:
    """PEM files at one place whose authority changes, as `renew` is called."""

    def __init__(self, directory: Path) -> None:
        self.certificate, self.key = directory / "renewed.pem", directory / "renewed.key"
        self.authority = trustme.CA()
        self.renew()

    def renew(self) -> None:
        self.authority = trustme.CA()
        made = self.authority.issue_cert("127.0.0.1", "localhost")
        self.certificate.write_bytes(b"".join(pem.bytes() for pem in made.cert_chain_pems))
        self.key.write_bytes(made.private_key_pem.bytes())

    def trust(self) -> ssl.SSLContext:
        """In the authority that there is now."""
        context = ssl.create_default_context()
        self.authority.configure_trust(context)
        return context

    @property
    def roots(self) -> bytes:
        return self.authority.cert_pem.bytes()


async def test_hangup_shows_the_new_certificate_to_who_comes_next(
    target: str, worker: ScriptedWorker, tmp_path: Path
) -> None:
    async def hang(call: ScriptedCall) -> None:
        await call.started()
        await call.hang()

    worker.script = hang
    files = Renewed(tmp_path)
    async with running_edge(target, tls_cert=files.certificate, tls_key=files.key) as edge:

        async def hang_up(event: str) -> None:
            since = len(edge.lines)
            edge.process.send_signal(signal.SIGHUP)
            await edge.line(lambda line: line["event"] == event, since)

        before = files.trust()
        async with connected(edge, before) as (reader, writer):
            writer.write(request_bytes("/v1/chat/completions", CHAT))
            await reader.readuntil(b"assistant")
            files.renew()
            await hang_up("certificate reloaded")
            async with connected(edge, files.trust()):
                pass
            with pytest.raises(ssl.SSLError):
                async with connected(edge, before):
                    pass
            trusted = files.trust()
            files.key.write_text("no key")
            await hang_up("certificate not reloaded")
            async with connected(edge, trusted):
                pass
            assert not worker.call.was_cancelled, "what was open goes on"


async def test_hangup_shows_the_workers_new_certificate_to_who_comes_next(tmp_path: Path) -> None:
    files = Renewed(tmp_path)
    request = pb.GenerateRequest(prompt=pb.Prompt(text="Hi"), stopping=pb.Stopping(max_tokens=4000))
    flags = (
        f"--tls-cert={files.certificate}",
        f"--tls-key={files.key}",
        *("--step-milliseconds=10", "--handshake-seconds=1"),
    )

    async def is_known_by(address: str, roots: bytes) -> bool:
        credentials = grpc.ssl_channel_credentials(roots)
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.secure_channel(address, credentials, options=options) as channel:
            stub: pb_grpc.GenerationServiceAsyncStub = pb_grpc.GenerationServiceStub(channel)
            code = await stub.GetModel(pb.GetModelRequest(), timeout=PATIENCE).code()
            assert code in (grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE)
            return code is grpc.StatusCode.OK

    async with ready_worker(*flags) as served:
        before = files.roots
        credentials = grpc.ssl_channel_credentials(before)
        silent = RawClient(int(served.address.rpartition(":")[2]))
        async with silent, grpc.aio.secure_channel(served.address, credentials) as channel:
            stub: pb_grpc.GenerationServiceAsyncStub = pb_grpc.GenerationServiceStub(channel)
            stream = stub.Generate(request)
            await stream.read()
            files.renew()
            served.send(signal.SIGHUP)
            await served.read_until("certificates reloaded")
            assert await is_known_by(served.address, files.roots)
            assert not await is_known_by(served.address, before)
            files.key.write_text("no key")
            served.send(signal.SIGHUP)
            line = await served.read_until("certificates not reloaded")
            assert (line["level"], "cannot be used" in line["reason"]) == ("error", True)
            assert await is_known_by(served.address, files.roots)
            assert await stream.read(), "what was open goes on"
            assert await silent.read_to_end() == b"", "but who never shook hands is cut off"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--tls-cert={server}"], "SLUICE_EDGE_TLS_KEY: must be given together with --tls-cert"),
        (["--tls-key={server_key}"], "--tls-key: must be given together with --tls-cert"),
        (["--tls-cert={server}", "--tls-key={client_key}"], "--tls-key: cannot be used"),
        (["--tls-cert={server}", "--tls-key=/nowhere"], "--tls-key: cannot be read (No such file"),
        (["--worker-ca={server_key}"], "--worker-ca: cannot be used"),
        (
            ["--worker-cert={client}", "--worker-key={client_key}"],
            "--worker-key: needs --worker-ca",
        ),
        (["--worker-server-name=a"], "--worker-server-name: needs --worker-ca"),
    ],
)
def test_bad_certificates_stop_the_start(
    certificates: Certificates,
    arguments: list[str],
    told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        read_settings([argument.format(**vars(certificates)) for argument in arguments])
    assert told in capsys.readouterr().err
