"""A request that its caller gives up leaves the engine at once, wherever it is; and so does an aborted one."""

from __future__ import annotations

import asyncio
import signal
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import grpc
import pytest
from prometheus_client import generate_latest

from protos.sluice.v1 import generation_pb2 as pb
from tests.metrics_text import Scrape
from tests.patience import PATIENCE
from tests.worker.served_worker import (
    Call,
    ServedWorker,
    environment,
    generate_request,
    kinds,
    read_rest,
    read_until,
    reasons,
    refusal_of,
    serve_script,
)

PHASES = ["queue", "prefill", "decode"]
STEP_MILLISECONDS = 10
PREFILL_STEPS = 120  # of 8 tokens each
MAX_TOKENS = 500  # five seconds of them


@asynccontextmanager
async def request_in(phase: str) -> AsyncIterator[tuple[ServedWorker, pb.GenerateRequest]]:
    """A worker, and a request that will be found in this phase for a second."""
    settings = {
        "max_running": 1,
        "max_batch_tokens": 8,
        "step_milliseconds": STEP_MILLISECONDS,
        "prefix_cache": False,
    }
    ids = [5] * (8 * PREFILL_STEPS if phase == "prefill" else 3)
    request = generate_request(ids=ids, max_tokens=MAX_TOKENS, request_id="target")
    async with serve_script(**settings) as worker:
        if phase != "queue":
            yield worker, request
            return
        blocker = worker.stub.Generate(generate_request(max_tokens=1000, request_id="blocker"))
        await read_until(blocker, "delta")
        yield worker, request
        await worker.wait_for(running=1, waiting=0, requests=1)  # the blocker is unharmed
        blocker.cancel()


async def reach(worker: ServedWorker, call: Call, phase: str) -> None:
    """Wait until the request is in the phase."""
    if phase == "decode":
        await read_until(call, "delta")
    elif phase == "prefill":
        await worker.wait_for(running=1, waiting=0)
    else:
        await worker.wait_for(running=1, waiting=1)


@pytest.mark.parametrize("phase", PHASES)
async def test_cancelling_the_call(phase: str) -> None:
    async with request_in(phase) as (worker, request):
        call = worker.stub.Generate(request)
        await reach(worker, call, phase)
        call.cancel()
        left = await worker.wait_for(waiting=0, requests=1 if phase == "queue" else 0)
        if phase != "queue":
            left = await worker.wait_idle()
            assert left.generated_tokens < MAX_TOKENS, "it ended by itself"
        scrape = Scrape(generate_latest(worker.worker.metrics.registry).decode())
        assert scrape("sluice_tokens_after_cancel_total") <= 1, "the step that ran, and no other"


@pytest.mark.parametrize("phase", PHASES)
async def test_passing_the_deadline(phase: str) -> None:
    async with request_in(phase) as (worker, request):
        call = worker.stub.Generate(request, timeout=0.3)
        # a little before its call's deadline the request ends by itself; whether that still arrives is not certain
        if phase == "decode":
            with suppress(grpc.aio.AioRpcError):
                assert reasons(await read_rest(call)) == ["DEADLINE"]
        else:
            assert (await refusal_of(call)).code == grpc.StatusCode.DEADLINE_EXCEEDED
        await worker.wait_for(waiting=0, requests=1 if phase == "queue" else 0)
        if phase != "queue":
            await worker.wait_idle()


CLIENT = textwrap.dedent("""
    import sys, time
    import grpc
    from protos.sluice.v1 import generation_pb2 as pb, generation_pb2_grpc
    channel = grpc.insecure_channel(sys.argv[1])
    request = pb.GenerateRequest.FromString(bytes.fromhex(sys.argv[2]))
    call = generation_pb2_grpc.GenerationServiceStub(channel).Generate(request)
    print("sent", flush=True)
    for message in call:
        print(message.WhichOneof("event"), flush=True)
    """)


@pytest.mark.parametrize("phase", PHASES)
async def test_killing_the_client(phase: str) -> None:
    async with request_in(phase) as (worker, request):
        client = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", CLIENT, worker.address, request.SerializeToString().hex()),
            stdout=asyncio.subprocess.PIPE,
            env=environment(),
        )
        assert client.stdout is not None
        wanted = b"delta\n" if phase == "decode" else b"sent\n"
        while await client.stdout.readline() != wanted:
            pass
        await worker.wait_for(running=1, waiting=1 if phase == "queue" else 0)
        client.send_signal(signal.SIGKILL)
        await client.wait()
        await worker.wait_for(waiting=0, requests=1 if phase == "queue" else 0)
        if phase != "queue":
            left = await worker.wait_idle()
            assert left.generated_tokens < MAX_TOKENS, "it ended by itself"


@pytest.mark.parametrize("phase", PHASES)
async def test_aborting_from_another_connection(phase: str) -> None:
    async with request_in(phase) as (worker, request):
        call = worker.stub.Generate(request)
        await reach(worker, call, phase)
        response = await worker.stub.Abort(pb.AbortRequest(request_id="target"))
        assert response.outcome == pb.ABORT_OUTCOME_ABORTED
        rest = await read_rest(call)
        assert reasons(rest) == ["CANCELLED"]
        assert rest[-1].finished.HasField("usage")
        assert rest[-1].finished.usage.prompt_tokens == len(request.prompt.token_ids.ids)
        assert await call.code() == grpc.StatusCode.OK
        for _ in range(2):
            response = await worker.stub.Abort(pb.AbortRequest(request_id="target"))
            assert response.outcome == pb.ABORT_OUTCOME_ALREADY_FINISHED
        response = await worker.stub.Abort(pb.AbortRequest(request_id="nobody"))
        assert response.outcome == pb.ABORT_OUTCOME_UNKNOWN


async def test_aborting_twice_at_once_ends_it_once() -> None:
    async with serve_script(step_milliseconds=20) as worker:
        call = worker.stub.Generate(generate_request(request_id="r", n=3, max_tokens=1000))
        await read_until(call, "delta")
        outcomes = await asyncio.gather(
            *(worker.stub.Abort(pb.AbortRequest(request_id="r")) for _ in range(5))
        )
        assert {outcome.outcome for outcome in outcomes} <= {
            pb.ABORT_OUTCOME_ABORTED,
            pb.ABORT_OUTCOME_ALREADY_FINISHED,
        }
        assert reasons(await read_rest(call)) == ["CANCELLED"] * 3


@asynccontextmanager
async def slow_tokenizer(
    worker: ServedWorker, monkeypatch: pytest.MonkeyPatch, least_bytes: int = 0
) -> AsyncIterator[threading.Event]:
    """Within the block the tokenizer hangs on texts of `least_bytes`; the event tells that it was entered."""
    entered, leave = threading.Event(), threading.Event()
    encode = worker.served.tokenizer.encode

    def hang(text: str, *, special_tokens: bool = True) -> list[int]:
        if len(text) >= least_bytes:
            entered.set()
            leave.wait(2 * PATIENCE)
        return encode(text, special_tokens=special_tokens)

    monkeypatch.setattr(worker.served.tokenizer, "encode", hang)
    try:
        yield entered
    finally:
        leave.set()


async def cancel_call(worker: ServedWorker, call: Call) -> None:
    call.cancel()


async def abort_it(worker: ServedWorker, call: Call) -> None:
    await worker.stub.Abort(pb.AbortRequest(request_id="slow"))
    rest = await read_rest(call)
    assert kinds(rest) == ["started", "finished", "finished"]
    assert reasons(rest) == ["CANCELLED"] * 2


@pytest.mark.parametrize("give_up", [cancel_call, abort_it])
@pytest.mark.parametrize("queued_before_it", [0, 4])
async def test_giving_up_while_the_prompt_is_tokenized(
    give_up: Callable[[ServedWorker, Call], Awaitable[None]],
    queued_before_it: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with serve_script() as worker, slow_tokenizer(worker, monkeypatch) as entered:
        others = [worker.stub.Generate(generate_request()) for _ in range(queued_before_it)]
        await worker.wait_for(requests=queued_before_it)
        call = worker.stub.Generate(generate_request(request_id="slow", n=2))
        await worker.wait_for(requests=queued_before_it + 1, running=0, waiting=0)
        await asyncio.to_thread(entered.wait, PATIENCE)
        await give_up(worker, call)
        await worker.wait_for(requests=queued_before_it)
        for other in others:
            other.cancel()
        await worker.wait_idle()


async def test_a_small_prompt_does_not_wait_for_large_ones_that_were_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with (
        serve_script(context_length=2**17) as worker,
        slow_tokenizer(worker, monkeypatch, least_bytes=100_000) as entered,
    ):
        large = [worker.stub.Generate(generate_request(text="word " * 20_000)) for _ in range(4)]
        await worker.wait_for(requests=4)
        await asyncio.to_thread(entered.wait, PATIENCE)
        for call in large:
            call.cancel()
        await worker.wait_idle()  # in the books; one of them still has its thread
        assert reasons(await asyncio.wait_for(worker.generate(text="word"), PATIENCE)) == ["LENGTH"]


async def test_many_cancelled_at_once_leave_nothing() -> None:
    async with serve_script(max_running=4, step_milliseconds=2) as worker:
        calls = [
            worker.stub.Generate(
                generate_request(ids=[5] * (i * 7 + 1), max_tokens=500, n=1 + i % 3)
            )
            for i in range(100)
        ]
        await asyncio.sleep(0.2)
        for call in calls:
            call.cancel()
        await worker.wait_idle()
        assert reasons(await worker.generate()) == ["LENGTH"]
