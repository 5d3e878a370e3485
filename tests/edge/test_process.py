"""The process: settings, help, ports, signals, exit codes."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from edge.__main__ import main
from edge.command_line import read_settings
from edge.settings import ENV_PREFIX, EdgeSettings
from tests.edge.edge_process import PATIENCE, EdgeProcess, running_edge
from tests.edge.raw_http import RawClient, request_bytes, split_chunked
from tests.edge.scripted_worker import ScriptedCall, ScriptedWorker, start_server
from tests.edge.sse import parse

CHAT = {"messages": [{"role": "user", "content": "hi"}], "stream": True}


def run_edge(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("SLUICE_")}
    return subprocess.run(
        [sys.executable, "-m", "edge", *arguments],
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def test_help_lists_every_setting_with_default_unit_and_variable() -> None:
    done = run_edge("--help")
    assert done.returncode == 0
    text = " ".join(done.stdout.replace("-\n", "-").split())
    for name, field in EdgeSettings.model_fields.items():
        flag = "--" + name.replace("_", "-")
        # a switch's value may be left out
        entry = re.search(
            rf"(?<!\[){flag} \[?([A-Z]+)\]? [A-Za-z][^()]*\(default: ([^;]*); env: (\w+)\)", text
        )
        assert entry, flag
        assert entry[3] == ENV_PREFIX + name.upper()
        counts = field.annotation in (int, float) and name != "port"
        unit = f" {entry[1].lower()}" if counts else ""
        is_word = field.annotation is bool or field.default is None
        default = str(field.default).lower() if is_word else field.default
        assert entry[2] == (f"{default}{unit}" or "none")


@pytest.mark.parametrize(
    ("arguments", "environment", "named"),
    [
        (["--heartbeat-seconds=0"], {}, "--heartbeat-seconds"),
        (["--heartbeat-seconds=soon"], {}, "--heartbeat-seconds"),
        (["--heartbeat-seconds=nan"], {}, "--heartbeat-seconds"),
        (["--port=70000"], {}, "--port"),
        (["--port"], {}, "--port"),
        (["--log-level=loud"], {}, "--log-level"),
        ([], {"SLUICE_EDGE_PORT": "http"}, "SLUICE_EDGE_PORT"),
        ([], {"SLUICE_EDGE_MAX_BODY_BYTES": "1"}, "SLUICE_EDGE_MAX_BODY_BYTES"),
        (["--nonsense"], {}, "--nonsense"),
        (["stray"], {}, "stray (--help lists the settings)"),
        (["--host="], {}, "--host: "),
        (
            ["--worker="],
            {},
            "--worker: must be host:port or unix:/path, or several with commas between, got ''",
        ),
        (["--worker=nonsense"], {}, "--worker: must be host:port"),
        (["--worker=http://worker:50051"], {}, "--worker: must be host:port"),
        (["--worker=worker:70000"], {}, "--worker: must be host:port"),
        (["--worker=a:1,,b:2"], {}, "--worker: must be host:port"),
        (["--worker=a:1,b:2,a:1"], {}, "--worker: must not name a worker twice"),
        ([], {"SLUICE_EDGE_WORKER": "nonsense"}, "edge: SLUICE_EDGE_WORKER: must be host:port"),
        (["--cors-origins=foo"], {}, "--cors-origins: 'foo' must be * or scheme://host[:port]"),
        (["--cors-origins=https://a.example,https://b.example/"], {}, "'https://b.example/'"),
    ],
)
def test_a_bad_setting_is_one_line_and_exit_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    environment: dict[str, str],
    named: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["edge", *arguments])
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("edge: ")
    assert output.err.count("\n") == 1
    assert named in output.err


def test_a_bad_setting_ends_the_process_with_2() -> None:
    done = run_edge(SLUICE_EDGE_PORT="http")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1


def test_a_misspelt_variable_ends_the_process_with_2() -> None:
    done = run_edge(SLUICE_EDGE_API_KEYS_FLIE="/keys")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "edge: SLUICE_EDGE_API_KEYS_FLIE: no such setting, did you mean SLUICE_EDGE_API_KEYS_FILE?"
        " (--help lists the settings)\n"
    )


def test_what_kubernetes_says_of_a_service_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    address = "tcp://10.96.0.7:8000"
    for name in (
        "PORT",
        "PORT_8000_TCP",
        "ADMIN_PORT",
        "ADMIN_PORT_9464_TCP",
        "CANARY_PORT",
        "CANARY_PORT_8000_TCP",
    ):
        monkeypatch.setenv(ENV_PREFIX + name, address)
    monkeypatch.setenv(ENV_PREFIX + "SERVICE_HOST", "10.96.0.7")
    monkeypatch.setenv(ENV_PREFIX + "SERVICE_PORT_HTTP", "8000")
    monkeypatch.setenv(ENV_PREFIX + "PORT_8000_TCP_ADDR", "10.96.0.7")
    settings = read_settings([])
    assert (settings.port, settings.admin_port) == (8000, None)
    assert read_settings(["--port", "2222"]).port == 2222


def test_flags_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_EDGE_PORT", "1111")
    monkeypatch.setenv("SLUICE_EDGE_HEARTBEAT_SECONDS", "")
    assert read_settings([]).port == 1111
    assert read_settings([]).heartbeat_seconds == 15
    assert read_settings(["--port", "2222"]).port == 2222


@pytest.mark.parametrize(
    "worker",
    [
        "localhost:50051",
        "10.0.0.1:1",
        "[::1]:50051",
        "worker_1.example:65535",
        "dns:///worker:50051",
        "dns:worker:50051",
        "ipv4:10.0.0.1:50051",
        "ipv6:[::1]:50051",
        "unix:/run/worker.sock",
        "unix:///run/worker.sock",
        "worker-0:50051, worker-1:50051,unix:/run/worker.sock",
    ],
)
def test_targets_of_grpc_are_taken(worker: str) -> None:
    assert read_settings(["--worker", worker]).worker == worker


def test_origins_are_taken() -> None:
    given = "https://a.example, http://localhost:3000,app://x,http://[::1]:80"
    assert len(read_settings(["--cors-origins", given]).allowed_origins()) == 4
    assert read_settings(["--cors-origins", "*"]).allowed_origins() == ["*"]
    assert read_settings(["--cors-origins="]).allowed_origins() == []


def test_only_this_machine_reaches_it_by_default() -> None:
    assert EdgeSettings.model_fields["host"].default == "127.0.0.1"


def test_a_taken_port_is_one_line_and_exit_1() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        done = run_edge("--host=127.0.0.1", f"--port={port}")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == f"edge: cannot listen on 127.0.0.1:{port}: address already in use\n"


def test_a_host_that_is_not_ours_is_one_line_and_exit_1() -> None:
    done = run_edge("--host=192.0.2.1")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1


def test_the_edge_is_thin() -> None:
    script = (
        "import sys, edge.__main__, edge.server\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'numpy', 'inference_worker'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


async def stop(edge: EdgeProcess, number: signal.Signals = signal.SIGTERM) -> None:
    edge.process.send_signal(number)
    await edge.line(lambda line: line["event"] == "edge stopping")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_imports_ends_it_with_0(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "uvloop.py").write_text("import time\nprint('here', flush=True)\ntime.sleep(60)\n")
    with subprocess.Popen(
        [sys.executable, "-m", "edge", "--port=0"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        process.send_signal(number)
        assert process.communicate(timeout=PATIENCE) == ("", "")
    assert process.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_an_idle_edge_stops_with_0(target: str, number: signal.Signals) -> None:
    # A kept-alive connection holds nothing up.
    async with running_edge(target) as edge, RawClient(edge.port) as idle:
        await idle.send(request_bytes("/health", method="GET"))
        await idle.read_until(b"ok")
        edge.process.send_signal(number)
        assert await edge.wait() == 0
    assert not any("Traceback" in str(line) for line in edge.lines)


async def test_a_drain_lets_streams_end_and_refuses_new_ones(
    target: str, worker: ScriptedWorker
) -> None:
    go = asyncio.Event()

    async def script(call: ScriptedCall) -> None:
        await call.started()
        await go.wait()
        await call.delta("to the end")
        await call.finished()

    worker.script = script
    async with (
        running_edge(target) as edge,
        httpx.AsyncClient(base_url=edge.url, timeout=PATIENCE, trust_env=False) as http,
        RawClient(edge.port) as client,
    ):
        await client.send(request_bytes("/v1/chat/completions", CHAT))
        await client.read_until(b"assistant")
        await stop(edge)
        ready = await http.get("/ready")
        assert (ready.status_code, ready.json()["reason"]) == (503, "the server is shutting down")
        assert (await http.get("/health")).status_code == 200
        refused = await http.post("/v1/chat/completions", json=CHAT)
        assert refused.status_code == 503
        assert refused.json()["error"]["type"] == "unavailable"
        assert "retry-after" in refused.headers
        go.set()
        _, stream, is_complete = split_chunked(await client.read_to_end())
        assert is_complete
        assert b"to the end" in stream
        assert stream.endswith(b"data: [DONE]\n\n")
        assert await edge.wait() == 0
    assert len(worker.calls) == 1


async def hanging(call: ScriptedCall) -> None:
    await call.started()
    await call.delta("partly")
    await call.hang()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/streams"])
async def test_a_drain_that_takes_too_long_ends_streams_with_an_error(
    target: str, worker: ScriptedWorker, path: str
) -> None:
    worker.script = hanging
    body = CHAT if path == "/v1/chat/completions" else {"prompt": "x"}
    async with (
        running_edge(target, drain_seconds=0.3) as edge,
        RawClient(edge.port) as client,
        RawClient(edge.port) as whole,
    ):
        await client.send(request_bytes(path, body))
        await client.read_until(b"partly")
        await whole.send(request_bytes("/v1/completions", {"prompt": "x"}))
        async with asyncio.timeout(PATIENCE):
            while len(worker.calls) < 2:
                await asyncio.sleep(0.01)
        await stop(edge)
        _, stream, is_complete = split_chunked(await client.read_to_end())
        assert not is_complete
        last = parse(stream).events[-1]
        assert last.json()["error"]["type"] == "unavailable"
        assert last.type == ("failed" if path == "/v1/streams" else "message")
        assert (await whole.read_to_end()).startswith(b"HTTP/1.1 503")
        assert await edge.wait() == 0
        line = await edge.line(lambda line: line["event"] == "edge drained")
        assert line["ended_early"] == 2
    async with asyncio.timeout(PATIENCE):
        for call in worker.calls:
            await call.ended.wait()
    assert all(call.was_cancelled for call in worker.calls)


async def test_a_second_signal_ends_it_at_once(target: str, worker: ScriptedWorker) -> None:
    worker.script = hanging
    async with running_edge(target, drain_seconds=300) as edge, RawClient(edge.port) as client:
        await client.send(request_bytes("/v1/chat/completions", CHAT))
        await client.read_until(b"partly")
        await stop(edge)
        edge.process.send_signal(signal.SIGTERM)
        assert await edge.wait() == 128 + signal.SIGTERM
        await client.read_to_end()


async def test_a_stalled_reader_does_not_hold_the_exit_up(
    target: str, worker: ScriptedWorker
) -> None:
    async def script(call: ScriptedCall) -> None:
        await call.started()
        while True:
            await call.delta("x" * 1000)

    worker.script = script
    async with (
        running_edge(target, drain_seconds=0.1, send_timeout_seconds=3600) as edge,
        RawClient(edge.port, receive_buffer=4096) as client,
    ):
        await client.send(request_bytes("/v1/chat/completions", CHAT))
        await client.read_until(b"xxx")
        await asyncio.sleep(0.3)
        await stop(edge)
        assert await edge.wait() == 0
    assert not any(line["level"] == "error" for line in edge.lines)


async def test_unready_seconds_come_before_refusing(target: str, worker: ScriptedWorker) -> None:
    async with (
        running_edge(target, unready_seconds=600) as edge,
        httpx.AsyncClient(base_url=edge.url, timeout=PATIENCE, trust_env=False) as http,
    ):
        await stop(edge)
        assert (await http.get("/ready")).status_code == 503
        assert (await http.post("/v1/chat/completions", json=CHAT)).status_code == 200
        edge.process.send_signal(signal.SIGTERM)  # it need not go on for so long
        assert await edge.wait() == 128 + signal.SIGTERM
    async with running_edge(target, unready_seconds=0.1) as edge:
        await stop(edge)
        assert await edge.wait() == 0


async def test_a_worker_that_comes_back_is_found(worker: ScriptedWorker) -> None:
    server, port = await start_server(worker, "127.0.0.1:0")
    async with (
        running_edge(f"127.0.0.1:{port}") as edge,
        httpx.AsyncClient(base_url=edge.url, timeout=PATIENCE, trust_env=False) as http,
    ):
        assert (await http.post("/v1/chat/completions", json=CHAT)).status_code == 200
        seen = len(edge.lines)
        await server.stop(0)
        await edge.line(lambda line: line.get("serving") is False, since=seen)
        assert (await http.post("/v1/chat/completions", json=CHAT)).status_code == 503
        server, _ = await start_server(worker, f"127.0.0.1:{port}")
        await edge.line(lambda line: line.get("serving") is True, since=seen)
        assert (await http.post("/v1/chat/completions", json=CHAT)).status_code == 200
        await server.stop(0)
