"""/metrics of a worker: what happened is what it says."""

from __future__ import annotations

import asyncio
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from socketserver import ThreadingMixIn
from typing import Any, TypeAlias

import grpc
import grpc.aio
import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest, make_wsgi_app

from inference_worker import metrics_server
from inference_worker.metrics import OUTCOMES, Gaps, WorkerMetrics
from protos.sluice.v1 import generation_pb2 as pb
from protos.sluice.v1 import generation_pb2_grpc
from tests.metrics_text import Scrape, documented_names
from tests.patience import PATIENCE
from tests.worker.served_worker import (
    ServedWorker,
    generate_request,
    read_rest,
    read_until,
    refusal_of,
    serve_script,
)
from tests.worker.worker_process import ready_worker, start_worker

Stub: TypeAlias = "generation_pb2_grpc.GenerationServiceAsyncStub"
LIMITS: dict[str, Any] = {"max_running": 1, "max_waiting": 1, "blocks": 600}


class Measured:
    """A worker and what a scrape of it says."""

    def __init__(self, worker: ServedWorker) -> None:
        self.stub = worker.stub
        self._registry = worker.worker.metrics.registry

    def scrape(self) -> Scrape:
        return Scrape(generate_latest(self._registry).decode())

    async def wait_for(self, condition: Callable[[Scrape], bool]) -> Scrape:
        async with asyncio.timeout(PATIENCE):
            while not condition(scrape := self.scrape()):
                await asyncio.sleep(0.01)
        return scrape


@asynccontextmanager
async def measured(**settings: Any) -> AsyncIterator[Measured]:
    async with serve_script(**(LIMITS | settings)) as worker:
        yield Measured(worker)


async def test_a_request_that_ends_is_counted_with_its_tokens_and_times() -> None:
    async with measured() as worker:
        prompt = list(range(5, 45))
        await read_rest(worker.stub.Generate(generate_request(ids=prompt, max_tokens=6)))
        again = generate_request(ids=prompt, max_tokens=6, constraint=pb.Constraint(regex=".*"))
        scrape = worker.scrape()
        assert scrape("sluice_request_seconds_count", outcome="length") == 1
        assert scrape("sluice_request_seconds_count", outcome="stop") == 0
        assert scrape("sluice_prompt_tokens_total") == 40
        assert scrape("sluice_completion_tokens_total") == 6
        assert scrape("sluice_cached_tokens_total") == 0
        assert scrape("sluice_queue_seconds_count") == 1
        assert scrape("sluice_time_to_first_token_seconds_count") == 1
        assert 1 <= scrape("sluice_inter_token_seconds_count") <= 5
        assert scrape("sluice_engine_step_seconds_count") == scrape("sluice_engine_steps_total")
        assert scrape("sluice_engine_steps_total") >= 6
        assert scrape("sluice_grammar_compiles_total", outcome="compiled") == 0

        for _ in range(2):
            await read_rest(worker.stub.Generate(again))
        scrape = worker.scrape()
        assert scrape("sluice_cached_tokens_total") == 64  # twice two blocks
        assert scrape("sluice_grammar_compiles_total", outcome="compiled") == 1
        assert scrape("sluice_grammar_compiles_total", outcome="cached") == 1


@pytest.mark.parametrize("phase", ["queued", "prefill", "decode"])
async def test_a_caller_that_leaves_shows_in_the_histogram_of_its_phase(phase: str) -> None:
    batch = {"max_batch_tokens": 1} if phase == "prefill" else {}
    async with measured(step_milliseconds=2, **batch) as worker:
        ids = [5] * 4000 if phase == "prefill" else [5, 6]
        first = worker.stub.Generate(generate_request(ids=ids, max_tokens=4096 - len(ids)))
        await read_until(first, "started" if phase == "prefill" else "delta")
        leaving = first
        if phase == "prefill":
            await worker.wait_for(lambda scrape: scrape("sluice_engine_steps_total") > 2)
        if phase == "queued":
            leaving = worker.stub.Generate(generate_request(ids=[7, 8]))
            await read_until(leaving, "started")
            held = worker.scrape()
            assert held("sluice_running_sequences") == 1
            assert held("sluice_waiting_requests") == 1
            assert held("sluice_kv_blocks_used") >= 1
        leaving.cancel()

        count = "sluice_cancel_seconds_count"
        scrape = await worker.wait_for(lambda scrape: scrape.total(count) == 1)
        assert scrape(count, phase=phase) == 1
        assert scrape("sluice_tokens_after_cancel_total") <= 1  # the step that ran
        scrape = await worker.wait_for(
            lambda scrape: scrape("sluice_request_seconds_count", outcome="disconnected") == 1
        )
        if phase == "queued":
            first.cancel()
        await worker.wait_for(
            lambda scrape: scrape("sluice_requests") == scrape("sluice_kv_blocks_used") == 0
        )


async def test_refusals_aborts_and_failures_are_told_apart() -> None:
    async with measured(step_milliseconds=2, failing_seed=13) as worker:
        stub = worker.stub
        running = stub.Generate(generate_request(request_id="one", max_tokens=4000))
        await read_until(running, "delta")
        waiting = stub.Generate(generate_request(request_id="two", sampling=pb.Sampling(seed=13)))
        await read_until(waiting, "started")
        assert (await refusal_of(stub.Generate(generate_request()))).info.reason == "QUEUE_FULL"
        await refusal_of(stub.Generate(generate_request(model="x" * 50)))
        await stub.Abort(pb.AbortRequest(request_id="one"))
        await read_rest(running)
        with pytest.raises(grpc.aio.AioRpcError):
            await read_rest(waiting)

        scrape = worker.scrape()
        assert scrape("sluice_requests_refused_total", reason="queue_full") == 1
        assert scrape("sluice_requests_refused_total", reason="model_not_found") == 1
        ended = {
            outcome: scrape("sluice_request_seconds_count", outcome=outcome)
            for outcome in OUTCOMES
            if scrape("sluice_request_seconds_count", outcome=outcome)
        }
        assert ended == {"refused": 2, "aborted": 1, "failed": 1}
        assert scrape("sluice_cancel_seconds_count", phase="decode") == 1  # the abort


async def test_who_comes_back_and_what_comes_from_another_worker_is_counted() -> None:
    async with measured(step_milliseconds=2) as worker:
        request = generate_request(max_tokens=4000, while_unread=pb.WHILE_UNREAD_PARK)
        request.resume_window.FromSeconds(60)
        call = worker.stub.Generate(request)
        read = await read_until(call, "delta")
        call.cancel()
        await worker.wait_for(lambda scrape: scrape("sluice_requests") == 0)
        resume = pb.Resume(resume_id=read[0].started.resume_id)
        unknown = pb.Resume(resume_id="rs_unknown")
        older = worker.stub.Generate(pb.GenerateRequest(resume=resume))
        await read_until(older, "delta")
        newer = worker.stub.Generate(pb.GenerateRequest(resume=resume))
        await read_until(newer, "delta")
        await worker.stub.Abort(pb.AbortRequest(request_id=read[0].started.request_id))
        await read_rest(newer)
        await refusal_of(worker.stub.Generate(pb.GenerateRequest(resume=unknown)))
        assert worker.scrape()("sluice_continuations_total") == 0, "it came back here"
        greedy = pb.Sampling(temperature=0)
        moved = generate_request(continuation=pb.Continuation(), sampling=greedy)
        await read_rest(worker.stub.Generate(moved))

        counts = {"resumed": 2, "stream_not_found": 1, "taken_over": 0}
        scrape = await worker.wait_for(lambda scrape: scrape.total("sluice_resumes_total") == 3)
        assert {each: scrape("sluice_resumes_total", outcome=each) for each in counts} == counts
        assert scrape("sluice_continuations_total") == 1


@asynccontextmanager
async def metrics_port() -> AsyncIterator[tuple[int, Stub]]:
    """The port of a worker process, and its stub."""
    async with (
        ready_worker("--metrics-port", "0", "--blocks", "600") as process,
        grpc.aio.insecure_channel(process.address) as channel,
    ):
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        yield process.lines[-1]["metrics_port"], stub


async def get(port: int, path: str = "/metrics") -> str:
    def read() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=PATIENCE) as response:
            text: str = response.read().decode()
            return text

    return await asyncio.to_thread(read)


async def test_a_process_serves_what_the_readme_lists_and_strangers_hold_nobody_up() -> None:
    async with metrics_port() as (port, stub):
        scrape = Scrape(await get(port))
        assert scrape.names() == documented_names("worker")
        assert scrape("process_open_fds") > 3
        assert scrape("sluice_tasks") >= 1
        info = {"model": "sluice-tiny", "architecture": "Script", "dtype": "none", "device": "none"}
        assert scrape("sluice_model_info", **info) == 1
        assert scrape("sluice_kv_blocks") == 600
        assert await get(port, "/health") == await get(port, "/ready") == "yes\n"
        with pytest.raises(urllib.error.HTTPError, match="404"):
            await get(port, "/other")

        silent = [
            socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) for _ in range(20)
        ]
        assert "sluice_kv_blocks 600.0" in await get(port)
        assert await asyncio.to_thread(silent[0].recv, 1) == b""  # in the place of the first
        assert (await read_rest(stub.Generate(generate_request())))[-1].HasField("finished")
        for connection in silent:
            connection.close()
        await _until_served(port)


async def test_a_connection_for_which_there_is_no_thread_takes_no_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_thread(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    server = metrics_server._Server(socket.AF_INET, ("127.0.0.1", 0))
    server.set_app(make_wsgi_app(CollectorRegistry()))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(ThreadingMixIn, "process_request", no_thread)
            for _ in range(metrics_server._MAX_CONNECTIONS + 1):
                with pytest.raises(OSError, match="closed connection"):
                    await get(server.server_port)
        await get(server.server_port)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


async def _until_served(port: int) -> None:
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                await get(port)
            except OSError:
                await asyncio.sleep(0.01)
            else:
                return


async def test_a_taken_port_stops_the_start() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        async with start_worker("--metrics-port", port) as worker:
            _, errors = await worker.process.communicate()
    assert worker.process.returncode == 1
    assert f"cannot listen on 127.0.0.1 port {port} for metrics".encode() in errors


def test_the_quick_histogram_says_what_the_librarys_does() -> None:
    bounds = (0.001, 0.01, 0.1)
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    gaps = Gaps("a_seconds", "Text.", bounds)
    ours.register(gaps)
    histogram = Histogram("a_seconds", "Text.", buckets=bounds, registry=theirs)
    for seconds in (0.0, 0.001, 0.0010001, 0.05, 0.1, 7.0):
        gaps.observe(seconds)
        histogram.observe(seconds)
    expected = [
        line for line in generate_latest(theirs).decode().splitlines() if "_created" not in line
    ]
    assert generate_latest(ours).decode().splitlines() == expected


def test_two_workers_in_one_process_share_nothing() -> None:
    one, other = WorkerMetrics(), WorkerMetrics()
    one.heartbeats.inc()
    assert Scrape(generate_latest(one.registry).decode())("sluice_heartbeats_total") == 1
    assert Scrape(generate_latest(other.registry).decode())("sluice_heartbeats_total") == 0
