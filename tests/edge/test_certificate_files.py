"""Certificates where they are kept: read again on SIGHUP, and none that cannot be used."""

import signal
import ssl
from pathlib import Path

import grpc
import pytest
import trustme

from edge.command_line import read_settings
from protos.sluice.v1 import generation_pb2 as pb
from protos.sluice.v1 import generation_pb2_grpc as pb_grpc
from tests.edge.certificates import Certificates
from tests.edge.edge_process import PATIENCE, running_edge
from tests.edge.raw_http import RawClient, request_bytes
from tests.edge.scripted_worker import ScriptedCall, ScriptedWorker
from tests.edge.tls_client import CHAT, connected
from tests.worker.worker_process import ready_worker


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
