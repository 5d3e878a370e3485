"""An engine that hangs is noticed: streams are told, health is told, and the process ends."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import textwrap

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.sluice.v1 import generation_pb2 as pb
from protos.sluice.v1 import generation_pb2_grpc
from tests.worker.served_worker import (
    Refusal,
    generate_request,
    read_rest,
    read_until,
    reasons,
)
from tests.worker.worker_process import SCRIPTED, ready_worker

OWN = ("-m", "inference_worker", "--engine", "tests.worker.own_engines:Obedient")


@pytest.mark.parametrize("engine", ["ours", "own"])
async def test_a_step_that_hangs_ends_the_process_and_every_stream_is_told(engine: str) -> None:
    program: tuple[str, ...]
    if engine == "ours":
        flags = ("--step-milliseconds", "5", "--hanging-seed", "13")
        program, where = (*SCRIPTED, *flags), "scripted_model.py"
        other = generate_request(max_tokens=4000)
        hanging = generate_request(sampling=pb.Sampling(seed=13), max_tokens=9)
    else:
        program, where = OWN, "own_engines.py"
        other = generate_request(text="slow", max_tokens=200)
        hanging = generate_request(text="hang", max_tokens=9)
    async with (
        ready_worker("--step-timeout-seconds", "2", program=program) as worker,
        grpc.aio.insecure_channel(worker.address) as channel,
    ):
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        calls = [stub.Generate(other)]
        await read_until(calls[0], "delta")
        calls.append(stub.Generate(hanging))
        for call in calls:
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await read_rest(call)
            refusal = Refusal(error.value)
            assert refusal.code == grpc.StatusCode.UNAVAILABLE
            assert refusal.info.reason == "ENGINE_LOST"
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert await worker.wait() == 1
        (line,) = [line for line in worker.lines if line["event"] == "the engine hangs"]
        assert line["reason"] == "a step of the engine has not ended for 2 seconds"
        assert where in line["stack"]


async def test_a_process_that_was_stopped_for_longer_does_not_hang() -> None:
    """SIGSTOP in the middle of a step, and SIGCONT when more than the limit has passed."""
    flags = ("--step-timeout-seconds", "2", "--step-milliseconds", "500")
    async with (
        ready_worker(*flags) as worker,
        grpc.aio.insecure_channel(worker.address) as channel,
    ):
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        call = stub.Generate(generate_request(max_tokens=4))
        messages = await read_until(call, "delta")
        worker.send(signal.SIGSTOP)
        # there is nothing to wait for but time: that it passes is what is tested
        await asyncio.sleep(2.5)
        worker.send(signal.SIGCONT)
        assert reasons(messages + await read_rest(call)) == ["LENGTH"]
        worker.send(signal.SIGTERM)
        assert await worker.wait() == 0
        assert "the engine hangs" not in worker.events()


KEEPS_THE_INTERPRETER = textwrap.dedent("""
    import asyncio, re, threading
    from inference_worker.step_watchdog import StepWatchdog

    class Engine:
        thread_id = None
        def progress(self):
            return None

    async def main():
        with StepWatchdog(Engine(), 0.4, print, guard_seconds=0.4):
            # a match that takes for ever, in C code that never lets go
            work = lambda: re.match(r"(a+)+$", "a" * 64 + "b")
            threading.Thread(target=work, name="greedy", daemon=True).start()
            await asyncio.sleep(600)

    asyncio.run(main())
    """)


def test_code_that_keeps_the_interpreter_ends_the_process() -> None:
    result = subprocess.run(
        [sys.executable, "-c", KEEPS_THE_INTERPRETER], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 1
    assert "Timeout (0:00:00.8" in result.stderr
    assert "in match" in result.stderr


async def test_an_engine_whose_code_does_not_end_holds_the_shutdown_up_no_longer_than_it_may() -> (
    None
):
    async with (
        ready_worker("--drain-seconds", "0.2", program=OWN) as worker,
        grpc.aio.insecure_channel(worker.address) as channel,
    ):
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        call = stub.Generate(generate_request(text="deaf", max_tokens=9))
        messages = await read_until(call, "delta")
        worker.send(signal.SIGTERM)
        assert reasons(messages + await read_rest(call)) == ["SHUTDOWN"]
        assert await worker.wait() == 0
        assert "the engine's code does not end" in worker.events()
        assert worker.events()[-1] == "stopped"
