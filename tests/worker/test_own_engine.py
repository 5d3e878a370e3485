"""A worker with an engine that a user brought: what is theirs, what stays ours, and whose failure is whose."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from inference_worker.own_engine.loader import load_own_engine
from inference_worker.settings import WorkerSettings
from protos.sluice.v1 import generation_pb2 as pb
from tests.patience import PATIENCE
from tests.worker.own_engines import EOS, Obedient
from tests.worker.served_worker import (
    ServedWorker,
    environment,
    generate_request,
    kinds,
    read_rest,
    read_until,
    reasons,
    refusal_of,
    serve,
    texts,
)

MODULE = "tests.worker.own_engines"
REQUIRED_CALL = pb.Prompt(
    chat=pb.Chat(
        messages=[pb.ChatMessage(role="user", content="say yes")],
        tools=[pb.Tool(name="f")],
        tool_choice=pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_REQUIRED),
    )
)


class OwnWorker:
    """A served worker and the engine behind it."""

    def __init__(self, worker: ServedWorker, engine: Obedient) -> None:
        self.served = worker
        self.stub = worker.stub
        self.engine = engine

    async def say(self, text: str, **fields: Any) -> list[pb.GenerateResponse]:
        return await self.served.generate(text=text, **({"max_tokens": 100} | fields))

    async def wait_ended(self, *ended: tuple[str, int]) -> None:
        async with asyncio.timeout(PATIENCE):
            while sorted(self.engine.ended) != sorted(ended):
                await asyncio.sleep(0.002)


@asynccontextmanager
async def own_worker(**settings: Any) -> AsyncIterator[OwnWorker]:
    name = f"{MODULE}:Obedient"
    given: dict[str, Any] = {"port": 0, "engine": name} | settings
    chosen = WorkerSettings(**given)
    served = await asyncio.to_thread(load_own_engine, chosen, name)
    engine = served.opened.engine
    assert isinstance(engine, Obedient)
    async with serve(served, chosen) as worker:
        yield OwnWorker(worker, engine)
    assert engine.is_closed or worker.crashes


async def test_text_comes_through_and_is_counted() -> None:
    async with own_worker() as own:
        messages = await own.say("say Grüße 👋🏽 to all")
        assert texts(messages) == {0: "Grüße 👋🏽 to all "}
        assert reasons(messages) == ["STOP"]
        whole = await own.stub.Tokenize(pb.TokenizeRequest(prompt=pb.Prompt(text="Grüße 👋🏽")))
        usage = messages[-1].finished.usage
        assert usage.completion_tokens == messages[-1].finished.completion_tokens
        assert usage.prompt_tokens == messages[0].started.prompt_tokens > 0
        assert usage.completion_tokens >= len(whole.token_ids)
        assert messages[-1].finished.timings.HasField("time_to_first_token")
        assert own.engine.aborted == []


async def test_every_cut_by_max_tokens_is_a_beginning_of_the_text() -> None:
    async with own_worker() as own:
        whole = await own.say("say Grüße 👋🏽 to all")
        count = whole[-1].finished.usage.completion_tokens
        for max_tokens in range(1, count):
            messages = await own.say("say Grüße 👋🏽 to all", max_tokens=max_tokens)
            assert texts(whole)[0].startswith(texts(messages).get(0, ""))
            assert reasons(messages) == ["LENGTH"]
            assert messages[-1].finished.usage.completion_tokens == max_tokens


async def test_token_ids_become_text_of_the_models_tokenizer() -> None:
    async with own_worker() as own:
        prompt = pb.Prompt(text="Grüße 👋🏽")
        ids = list((await own.stub.Tokenize(pb.TokenizeRequest(prompt=prompt))).token_ids)
        command = f"ids {' '.join(map(str, ids))} {EOS} 70"
        messages = await own.say(command, output=pb.Output(token_ids=True))
        assert texts(messages) == {0: "Grüße 👋🏽"}
        assert [i for m in messages for i in m.delta.token_ids] == ids
        assert messages[-1].finished.stop_token_id == EOS
        ignoring = await own.say(command, stopping=pb.Stopping(ignore_eos=True))
        assert reasons(ignoring) == ["STOP"]
        assert not ignoring[-1].finished.HasField("stop_token_id")
        assert [request.ignore_eos for request in own.engine.requests] == [False, True]


async def test_stop_sequences_end_a_choice_and_close_its_generator() -> None:
    async with own_worker() as own:
        stopping = pb.Stopping(stop_sequences=["a la la"])
        messages = await own.say("endless", stopping=stopping, request_id="r")
        assert texts(messages) == {0: "l"}
        assert reasons(messages) == ["STOP_SEQUENCE"]
        assert messages[-1].finished.stop_sequence == "a la la"
        await own.wait_ended(("r", 0))
        assert own.engine.aborted == []  # nobody gave it up


async def test_choices_echo_and_seeds() -> None:
    async with own_worker() as own:
        messages = await own.say(
            "say yes", n=3, sampling=pb.Sampling(seed=2**63 - 1), output=pb.Output(echo=True)
        )
        assert texts(messages) == dict.fromkeys(range(3), "say yesyes ")
        assert sorted(r.choice_index for r in own.engine.requests) == [0, 1, 2]
        seeds = {request.sampling.seed for request in own.engine.requests}
        assert len(seeds) == 3
        assert all(-(2**63) <= seed < 2**63 for seed in seeds)
        echoed = await own.say("say yes", max_tokens=0, output=pb.Output(echo=True))
        assert texts(echoed) == {0: "say yes"}
        assert reasons(echoed) == ["LENGTH"]
        assert len(own.engine.requests) == 3  # there was nothing to ask it for


async def test_logprobs_come_through_and_their_absence_fails() -> None:
    async with own_worker() as own:
        messages = await own.say("score", output=pb.Output(logprobs=2))
        tokens = [entry for message in messages for entry in message.delta.logprobs]
        assert [(t.token.token_id, t.token.logprob, len(t.top)) for t in tokens] == [
            (70, -0.5, 2),
            (71, -0.5, 2),
        ]
        for command in ("ids 70", "say x"):
            call = own.stub.Generate(generate_request(text=command, output=pb.Output(logprobs=2)))
            assert (await refusal_of(call)).code == grpc.StatusCode.INTERNAL


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"prompt": REQUIRED_CALL}, "prompt.chat.tool_choice"),
        ({"sampling": pb.Sampling(top_p=0.5)}, "sampling.top_p"),
        ({"sampling": pb.Sampling(top_k=1)}, "sampling.top_k"),
        ({"sampling": pb.Sampling(repetition_penalty=1.5)}, "sampling.repetition_penalty"),
        ({"sampling": pb.Sampling(logit_bias={1: 1.0})}, "sampling.logit_bias"),
        ({"output": pb.Output(echo=True, logprobs=0, prompt_logprobs=True)}, "output.prompt_logprobs"),
        ({"constraint": pb.Constraint(regex="a+")}, "constraint"),
    ],
)  # fmt: skip
async def test_what_the_engine_does_not_declare_is_refused_by_name(
    fields: dict[str, Any], named: str
) -> None:
    async with own_worker() as own:
        refusal = await refusal_of(own.stub.Generate(generate_request(**fields)))
        assert (refusal.code, refusal.field) == (grpc.StatusCode.UNIMPLEMENTED, named)
        assert own.engine.requests == []


async def test_each_declared_feature_is_refused_once_it_is_not_declared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Obedient, "honours", frozenset())
    asked: dict[str, dict[str, Any]] = {
        "sampling.temperature": {"sampling": pb.Sampling(temperature=0)},
        "sampling.seed": {"sampling": pb.Sampling(seed=0)},
        "stopping.ignore_eos": {"stopping": pb.Stopping(ignore_eos=True)},
        "output.logprobs": {"output": pb.Output(logprobs=0)},
    }
    async with own_worker() as own:
        for named, fields in asked.items():
            refusal = await refusal_of(own.stub.Generate(generate_request(**fields)))
            assert (refusal.code, refusal.field) == (grpc.StatusCode.UNIMPLEMENTED, named)


async def test_a_value_that_changes_nothing_is_no_request() -> None:
    async with own_worker() as own:
        neutral = pb.Sampling(temperature=0.25, top_p=1, min_p=0, repetition_penalty=1)
        messages = await own.say("say x", sampling=neutral)
        assert texts(messages) == {0: "x "}
        assert messages[0].started.sampling.temperature == 0.25


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


async def test_choices_of_an_engine_that_never_waits_take_turns() -> None:
    async with own_worker() as own:
        messages = await own.say("spin", n=2, max_tokens=200)
        first_end = kinds(messages).index("finished")
        assert {m.delta.choice_index for m in messages[1:first_end]} == {0, 1}


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


async def test_max_running_bounds_the_generators_and_the_queue_is_told() -> None:
    async with own_worker(max_running=2, max_waiting=1) as own:
        running = [own.stub.Generate(generate_request(text="slow", max_tokens=200)) for _ in "ab"]
        for call in running:
            await read_until(call, "delta")
        waiting = own.stub.Generate(generate_request(text="say x"))
        await read_until(waiting, "started")
        await own.served.wait_for(running=2, waiting=1, requests=3)
        assert len(own.engine.requests) == 2
        refusal = await refusal_of(own.stub.Generate(generate_request(text="say x")))
        assert refusal.code == grpc.StatusCode.RESOURCE_EXHAUSTED
        running[0].cancel()
        assert kinds(await read_rest(waiting)) == ["delta", "finished"]
        running[1].cancel()


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


async def test_it_takes_no_continuations_and_says_so() -> None:
    async with own_worker() as own:
        call = own.stub.Generate(generate_request(text="say hello", is_continuable=True))
        asked = [message async for message in call]
        assert not asked[0].started.is_continuable
        assert all(not message.delta.token_ids for message in asked)
        delivered = pb.DeliveredChoice(token_ids=[5])
        continuation = pb.Continuation(choices=[delivered])
        sampling = pb.Sampling(temperature=0)
        refusal = await refusal_of(
            own.stub.Generate(
                generate_request(text="say a", continuation=continuation, sampling=sampling)
            )
        )
        assert refusal.code == grpc.StatusCode.UNIMPLEMENTED


async def test_an_engine_whose_loop_ends_crashes_the_worker() -> None:
    async with own_worker() as own:
        refusal = await refusal_of(
            own.stub.Generate(generate_request(text="collapse", max_tokens=50))
        )
        assert (refusal.code, refusal.info.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_LOST")
        (crash,) = own.served.crashes
        assert isinstance(crash, SystemExit)


async def test_the_model_is_described_and_the_settings_arrive() -> None:
    async with own_worker(context_length=100) as own:
        model = await own.stub.GetModel(pb.GetModelRequest())
        assert (model.architecture, model.dtype, model.device) == ("Obedience", "int1", "abacus")
        assert (model.context_length, model.parameter_count) == (100, 3)
        assert list(model.eos_token_ids) == [EOS]
        assert model.default_sampling.temperature == 0.25
        assert own.engine.settings.context_length == 100
        refusal = await refusal_of(own.stub.Generate(generate_request(text="x", max_tokens=100)))
        assert refusal.info.reason == "CONTEXT_EXCEEDED"


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
