"""A worker process from its start to its exit code."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.sluice.v1 import generation_pb2 as pb
from protos.sluice.v1 import generation_pb2_grpc
from tests.patience import PATIENCE
from tests.worker.served_worker import (
    environment,
    generate_request,
    read_rest,
    read_until,
    reasons,
    refusal_of,
    texts,
)
from tests.worker.worker_process import SCRIPTED, ready_worker, start_worker

HANGING = ("-m", "inference_worker", "--engine", "tests.worker.own_engines:Hanging")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains(number: signal.Signals, tmp_path: Path) -> None:
    unix_socket = ("--unix-socket", f"{tmp_path}/socket") if number == signal.SIGINT else ()
    async with (
        ready_worker("--step-milliseconds", "10", "--drain-seconds", "600", *unix_socket) as worker,
        grpc.aio.insecure_channel(worker.address) as channel,
    ):
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        health = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        # it ends when this test says so, however slow the test is: of itself after most of a minute
        running = stub.Generate(generate_request(request_id="running", max_tokens=4000))
        messages = await read_until(running, "delta")

        worker.send(number)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        refusal = await refusal_of(stub.Generate(generate_request()))
        assert refusal.code == grpc.StatusCode.UNAVAILABLE
        assert refusal.info.reason == "DRAINING"
        assert 1 <= refusal.retry_seconds <= 5
        load = await stub.GetLoad(pb.GetLoadRequest())
        assert (load.is_draining, load.requests) == (True, 1)

        await stub.Abort(pb.AbortRequest(request_id="running"))
        messages += await read_rest(running)
        assert reasons(messages) == ["CANCELLED"]
        assert await worker.wait() == 0
        assert worker.events()[-1] == "stopped"
        assert await worker.process.stderr.read() == b""  # type: ignore[union-attr]


async def http_statuses(port: int, *paths: str) -> list[int]:
    """What the port of the metrics answers."""

    def ask(path: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        with contextlib.closing(connection):
            connection.request("GET", path)
            return connection.getresponse().status

    return [await asyncio.to_thread(ask, path) for path in paths]


async def test_health_says_so_before_work_is_refused() -> None:
    async with (
        ready_worker(
            *("--step-milliseconds", "10", "--unready-seconds", "600", "--metrics-port", "0")
        ) as worker,
        grpc.aio.insecure_channel(worker.address) as channel,
    ):
        port = worker.lines[-1]["metrics_port"]
        assert await http_statuses(port, "/health", "/ready") == [200, 200]
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        worker.send(signal.SIGTERM)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert await http_statuses(port, "/health", "/ready") == [200, 503]
        assert reasons(await read_rest(stub.Generate(generate_request()))) == ["LENGTH"]
        assert not (await stub.GetLoad(pb.GetLoadRequest())).is_draining
        worker.send(signal.SIGTERM)  # the second one
        assert await worker.wait() == 128 + signal.SIGTERM


async def test_streams_that_take_too_long_end_with_shutdown() -> None:
    async with (
        ready_worker("--step-milliseconds", "10", "--drain-seconds", "0.2") as worker,
        grpc.aio.insecure_channel(worker.address) as channel,
    ):
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        running = stub.Generate(generate_request(max_tokens=3000, n=2))
        messages = await read_until(running, "delta")
        worker.send(signal.SIGTERM)
        messages += await read_rest(running)
        assert reasons(messages) == ["SHUTDOWN", "SHUTDOWN"]
        assert messages[-1].finished.HasField("usage")
        assert texts(messages)[1]
        assert await running.code() == grpc.StatusCode.OK
        assert await worker.wait() == 0


async def test_a_second_signal_exits_at_once() -> None:
    async with (
        ready_worker("--step-milliseconds", "10") as worker,
        grpc.aio.insecure_channel(worker.address) as channel,
    ):
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        running = stub.Generate(generate_request(max_tokens=3000))
        await read_until(running, "delta")
        worker.send(signal.SIGTERM)
        await worker.read_until("draining")
        worker.send(signal.SIGTERM)
        assert await worker.wait() == 128 + signal.SIGTERM
        assert "stopped" not in worker.events()  # nothing was waited for
        running.cancel()


SLOW_TOKENIZER = textwrap.dedent("""
    import sys, time
    from inference_worker.command_line import read_settings
    from inference_worker.process import run
    from inference_worker.scripted_model import ScriptedSettings, load_script

    def load(settings):
        served = load_script(settings)
        served.tokenizer.encode = lambda text, **_: time.sleep(100)
        return served

    run(read_settings(ScriptedSettings, "slow", sys.argv[1:]), load)
    """)


async def test_an_exit_does_not_wait_for_the_tokenizer() -> None:
    async with (
        ready_worker("--drain-seconds", "0.1", program=("-c", SLOW_TOKENIZER)) as worker,
        grpc.aio.insecure_channel(worker.address) as channel,
    ):
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        call = stub.Generate(generate_request())
        while (await stub.GetLoad(pb.GetLoadRequest())).requests == 0:
            await asyncio.sleep(0.01)
        worker.send(signal.SIGTERM)
        assert reasons(await read_rest(call)) == ["SHUTDOWN"]
        assert await asyncio.wait_for(worker.wait(), PATIENCE) == 0
        assert worker.events()[-1] == "stopped"


async def test_a_worker_whose_log_nobody_reads_serves_and_exits() -> None:
    async with (
        ready_worker("--log-prompts") as worker,
        grpc.aio.insecure_channel(worker.address) as channel,
    ):
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        for _ in range(10):  # each more than a pipe holds
            request = generate_request(text="word " * 60_000)
            refusal = await asyncio.wait_for(refusal_of(stub.Generate(request)), PATIENCE)
            assert refusal.info.reason == "CONTEXT_EXCEEDED"
        messages = await asyncio.wait_for(read_rest(stub.Generate(generate_request())), PATIENCE)
        assert reasons(messages) == ["LENGTH"]
        worker.send(signal.SIGTERM)
        async with asyncio.timeout(PATIENCE):
            while worker.process.returncode is None:
                await asyncio.sleep(0.05)
        assert worker.process.returncode == 0


async def test_a_crash_of_the_engine_ends_the_process() -> None:
    async with (
        ready_worker("--crashing-seed", "13") as worker,
        grpc.aio.insecure_channel(worker.address) as channel,
    ):
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        request = generate_request(sampling=pb.Sampling(seed=13), max_tokens=9)
        refusal = await refusal_of(stub.Generate(request))
        assert (refusal.code, refusal.info.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_LOST")
        assert 1 <= refusal.retry_seconds <= 5
        assert await worker.wait() == 1
        assert "draining" not in worker.events()  # there is nothing to wait for
        assert "the engine crashed" in worker.events()


@pytest.mark.parametrize("program", [SCRIPTED, HANGING], ids=["ours", "an engine that hangs"])
async def test_a_signal_while_loading_ends_the_process(program: tuple[str, ...]) -> None:
    async with start_worker(program=program) as worker:
        await worker.read_until("loading")
        worker.send(signal.SIGTERM)
        assert await worker.wait() == 0


async def test_a_taken_port_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        async with start_worker("--port", port) as worker:
            output, errors = await asyncio.wait_for(worker.process.communicate(), PATIENCE)
    assert worker.process.returncode == 1
    assert output == b""
    assert errors.count(b"\n") == 1
    assert f"cannot listen on 127.0.0.1 port {port}".encode() in errors


async def test_a_model_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    async with start_worker("--model", f"{tmp_path}/nowhere") as worker:
        assert await worker.wait() == 1
        assert worker.process.stderr is not None
        errors = await worker.process.stderr.read()
    assert errors.count(b"\n") == 1
    assert b"cannot load" in errors


def test_help_of_the_program() -> None:
    for module in ("inference_worker", "inference_worker.scripted_model"):
        done = subprocess.run(
            [sys.executable, "-m", module, "--help"],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
            env=environment(),
        )
        assert done.returncode == 0
        assert "SLUICE_WORKER_MAX_RUNNING" in done.stdout
