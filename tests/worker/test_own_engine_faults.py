"""An engine that a user brought: given up, deaf, blocking, failing, or none at all; whose failure is whose."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import grpc
import pytest

from inference_worker.own_engine.loader import load_own_engine
from inference_worker.settings import WorkerSettings
from protos.sluice.v1 import generation_pb2 as pb
from tests.worker.own_worker import MODULE, own_worker
from tests.worker.served_worker import (
    environment,
    generate_request,
    read_rest,
    read_until,
    reasons,
    refusal_of,
    texts,
)


@pytest.mark.parametrize("way", ["close", "deadline", "abort"])
@pytest.mark.parametrize("command", ["slow", "silent"])
async def test_giving_up_reaches_the_engine(way: str, command: str) -> None:
    async with own_worker() as own:
        request = generate_request(text=command, request_id="r", n=2, max_tokens=200)
        if way == "deadline":
            request.timeout.seconds = 2
        call = own.stub.Generate(request, timeout=60)
        await read_until(call, "started")
        while len(own.engine.requests) < 2:
            await asyncio.sleep(0.002)
        match way:
            case "close":
                call.cancel()
            case "deadline":
                if command == "silent":
                    with pytest.raises(grpc.aio.AioRpcError, match="DEADLINE_EXCEEDED"):
                        await read_rest(call)
                else:
                    assert reasons(await read_rest(call)) == ["DEADLINE", "DEADLINE"]
            case _:
                await own.stub.Abort(pb.AbortRequest(request_id="r"))
                assert reasons(await read_rest(call)) == ["CANCELLED", "CANCELLED"]
        await own.wait_ended(("r", 0), ("r", 1))
        assert own.engine.aborted == ["r"]


async def test_a_request_given_up_in_the_queue_never_reaches_generate() -> None:
    async with own_worker(max_running=1) as own:
        running = own.stub.Generate(generate_request(text="silent", request_id="first"))
        await read_until(running, "started")
        waiting = own.stub.Generate(generate_request(text="say x", request_id="second"))
        await read_until(waiting, "started")
        waiting.cancel()
        await own.served.wait_for(waiting=0, requests=1)
        running.cancel()
        await own.wait_ended(("first", 0))
        assert sorted(own.engine.aborted) == ["first", "second"]


async def test_an_engine_that_ignores_its_cancellation_holds_nobody_up() -> None:
    async with own_worker() as own:
        call = own.stub.Generate(generate_request(text="stubborn", request_id="r", max_tokens=200))
        await read_until(call, "delta")
        await own.stub.Abort(pb.AbortRequest(request_id="r"))
        assert reasons(await read_rest(call)) == ["CANCELLED"]
        await own.wait_ended(("r", 0))


async def test_an_engine_that_ends_when_it_is_cancelled_has_not_failed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with own_worker() as own:
        call = own.stub.Generate(generate_request(text="quitting", request_id="r", max_tokens=200))
        await read_until(call, "delta")
        call.cancel()
        await own.wait_ended(("r", 0))
        await own.served.wait_idle()
    assert "failed" not in capsys.readouterr().out


async def test_the_worker_answers_while_the_engine_blocks() -> None:
    async with own_worker() as own:
        call = own.stub.Generate(generate_request(text="block"))
        await read_until(call, "started")
        while not own.engine.requests:
            await asyncio.sleep(0.002)
        await own.served.load()
        assert own.engine.ended == []  # it still blocks, and the load was told
        own.engine.may_go_on.set()
        assert texts(await read_rest(call)) == {0: "done"}


@pytest.mark.parametrize(
    "command",
    ["raise", "exit", "cancel", "unknown"]
    + [f"nonsense {what}" for what in ("float", "large", "negative", "bool", "none")],
)
async def test_what_fails_fails_alone_and_tells_nothing(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async with own_worker() as own:
        other = own.stub.Generate(generate_request(text="endless", max_tokens=50))
        await read_until(other, "delta")
        request = generate_request(text=command, request_id="bad", n=2, max_tokens=200)
        refusal = await refusal_of(own.stub.Generate(request))
        assert refusal.code == grpc.StatusCode.INTERNAL
        assert refusal.message == "internal error; request bad"
        assert "secret" not in str(refusal.status)
        assert reasons(await read_rest(other)) == ["LENGTH"]
    log = capsys.readouterr().out
    assert "request failed" in log
    if command in ("raise", "exit", "cancel"):
        assert f"secret of {command.replace('raise', 'generate')}" in log


@pytest.mark.parametrize("error", [RuntimeError, SystemExit, asyncio.CancelledError])
async def test_an_abort_or_close_that_fails_is_the_logs_alone(
    error: type[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    async with own_worker() as own:
        own.engine.bad_end, own.engine.closes_badly = error, True
        call = own.stub.Generate(generate_request(text="silent", request_id="bad-abort"))
        await read_until(call, "started")
        call.cancel()
        await own.served.wait_idle()
        assert texts(await own.say("say x")) == {0: "x "}
    log = capsys.readouterr().out
    assert "secret of abort" in log
    assert "secret of close" in log


async def test_an_engine_whose_loop_ends_crashes_the_worker() -> None:
    async with own_worker() as own:
        refusal = await refusal_of(
            own.stub.Generate(generate_request(text="collapse", max_tokens=50))
        )
        assert (refusal.code, refusal.info.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_LOST")
        (crash,) = own.served.crashes
        assert isinstance(crash, SystemExit)


@pytest.mark.parametrize(
    ("engine", "problem"),
    [
        ("no_such_module:Engine", "cannot import no_such_module: ModuleNotFoundError"),
        (f"{MODULE}:Missing", f"{MODULE} has no Missing"),
        (f"{MODULE}:A_NUMBER", "A_NUMBER is not callable: 12"),
        (f"{MODULE}:make_dict", "which has no initialize, generate, abort, close"),
        (f"{MODULE}:Clumsy", "Clumsy() failed: ValueError: cannot even be made"),
        (f"{MODULE}:Failing", "initialize failed: RuntimeError: no weights at all"),
        (f"{MODULE}:Leaving", "initialize failed: SystemExit: 3"),
        (f"{MODULE}:Cardless", "initialize must give an EngineCard"),
        (f"{MODULE}:Boastful", "unknown 'temprature'"),
        (f"{MODULE}:Listing", "the card's honours: ['seed'] is no set"),
        (f"{MODULE}:Endless", "the card's eos_token_ids: None is no whole number"),
        (f"{MODULE}:Shapeless", "the card's context_length: None is no whole number"),
        (f"{MODULE}:Blocking", "initialize must be `async def`"),
        (f"{MODULE}:Awaiting", "generate must be an async generator"),
    ],
)
def test_an_engine_that_cannot_be_served_says_why(engine: str, problem: str) -> None:
    with pytest.raises(Exception, match=r".") as caught:
        load_own_engine(WorkerSettings(engine=engine), engine)
    message = str(caught.value)
    assert problem in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("engine", "code", "line"),
    [
        (f"{MODULE}:Leaving", 1, f"cannot load {MODULE}:Leaving: initialize failed: SystemExit: 3"),
        ("not a name", 2, "--engine: "),
    ],
)
def test_the_start_ends_with_one_line(engine: str, code: int, line: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "inference_worker", "--port", "0", "--engine", engine],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment(),
    )
    assert done.returncode == code
    assert done.stderr.count("\n") == 1
    assert line in done.stderr
