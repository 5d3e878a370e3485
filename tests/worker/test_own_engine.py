"""An engine that a user brought: what reaches it, what comes of what it yields, and what it does not honour."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from protos.sluice.v1 import generation_pb2 as pb
from tests.worker.own_engines import EOS, Obedient
from tests.worker.own_worker import own_worker
from tests.worker.served_worker import (
    generate_request,
    kinds,
    read_rest,
    read_until,
    reasons,
    refusal_of,
    texts,
)

REQUIRED_CALL = pb.Prompt(
    chat=pb.Chat(
        messages=[pb.ChatMessage(role="user", content="say yes")],
        tools=[pb.Tool(name="f")],
        tool_choice=pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_REQUIRED),
    )
)


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


async def test_choices_of_an_engine_that_never_waits_take_turns() -> None:
    async with own_worker() as own:
        messages = await own.say("spin", n=2, max_tokens=200)
        first_end = kinds(messages).index("finished")
        assert {m.delta.choice_index for m in messages[1:first_end]} == {0, 1}


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
