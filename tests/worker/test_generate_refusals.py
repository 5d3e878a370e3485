"""Every field of the contract out of its range: the status, and the field that is named."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2

from protos.sluice.v1 import generation_pb2 as pb
from tests.worker.served_worker import Refusal, generate_request, refusal_of, serve_script

INVALID = grpc.StatusCode.INVALID_ARGUMENT


UNIMPLEMENTED = grpc.StatusCode.UNIMPLEMENTED


NAN, INF = float("nan"), float("inf")


def sampling(**fields: Any) -> dict[str, Any]:
    return {"sampling": pb.Sampling(**fields)}


def stopping(**fields: Any) -> dict[str, Any]:
    return {"stopping": pb.Stopping(**fields)}


def output(**fields: Any) -> dict[str, Any]:
    return {"output": pb.Output(**fields)}


def constraint(**fields: Any) -> dict[str, Any]:
    return {"constraint": pb.Constraint(**fields)}


def chat(*messages: pb.ChatMessage, **fields: Any) -> dict[str, Any]:
    return {"prompt": pb.Prompt(chat=pb.Chat(messages=messages, **fields))}


def continued(*choices: pb.DeliveredChoice, **fields: Any) -> dict[str, Any]:
    greedy = {"sampling": pb.Sampling(temperature=0)}
    return greedy | {"continuation": pb.Continuation(choices=choices)} | fields


USER = pb.ChatMessage(role="user", content="Hello")


DELIVERED = pb.DeliveredChoice


OUT_OF_RANGE: list[tuple[str, dict[str, Any]]] = [
    ("request_id", {"request_id": ""}),
    ("request_id", {"request_id": "a" * 129}),
    ("request_id", {"request_id": "a b"}),
    ("request_id", {"request_id": "a\n"}),
    ("request_id", {"request_id": "é"}),
    ("n", {"n": 0}),
    ("n", {"n": 17}),
    ("priority", {"priority": 101}),
    ("priority", {"priority": -101}),
    ("timeout", {"timeout": duration_pb2.Duration()}),
    ("timeout", {"timeout": duration_pb2.Duration(seconds=-1)}),
    ("caller.key_id", {"caller": pb.Caller()}),
    ("caller.key_id", {"caller": pb.Caller(key_id="k" * 65)}),
    ("caller.key_id", {"caller": pb.Caller(key_id="a b")}),
    ("caller.weight", {"caller": pb.Caller(key_id="k", weight=0)}),
    ("caller.weight", {"caller": pb.Caller(key_id="k", weight=0.0009)}),
    ("caller.weight", {"caller": pb.Caller(key_id="k", weight=1001)}),
    ("caller.weight", {"caller": pb.Caller(key_id="k", weight=NAN)}),
    ("caller.max_concurrent", {"caller": pb.Caller(key_id="k", max_concurrent=0)}),
    ("caller.tokens_per_minute", {"caller": pb.Caller(key_id="k", tokens_per_minute=0)}),
    ("prompt", {"prompt": pb.Prompt()}),
    ("prompt.text", {"text": ""}),
    ("prompt.token_ids", {"ids": []}),
    ("prompt.token_ids.ids[1]", {"ids": [1, 1_000_000]}),
    ("prompt.chat.messages", chat()),
    ("prompt.chat.messages", chat(*[USER] * 10_001)),
    ("prompt.chat.continue_final_message", chat(USER, continue_final_message=True)),
    (
        "prompt.chat.continue_final_message",
        chat(USER, pb.ChatMessage(role="assistant"), continue_final_message=True),
    ),
    (
        "prompt.chat.continue_final_message",
        chat(
            USER,
            pb.ChatMessage(role="assistant", content="a", tool_calls=[pb.ToolCall(name="f")]),
            continue_final_message=True,
        ),
    ),
    ("prompt.chat.messages[1].role", chat(USER, pb.ChatMessage(content="?"))),
    *[("sampling.temperature", sampling(temperature=bad)) for bad in (-0.1, 100.5, NAN, INF)],
    ("sampling.top_k", sampling(top_k=0)),
    *[("sampling.top_p", sampling(top_p=bad)) for bad in (0.0, -1.0, 1.5, NAN)],
    *[("sampling.min_p", sampling(min_p=bad)) for bad in (-0.1, 1.5, NAN)],
    *[
        ("sampling.repetition_penalty", sampling(repetition_penalty=bad))
        for bad in (0.0, 101.0, NAN)
    ],
    *[("sampling.presence_penalty", sampling(presence_penalty=bad)) for bad in (-2.1, 2.1, NAN)],
    *[("sampling.frequency_penalty", sampling(frequency_penalty=bad)) for bad in (-3.0, INF, NAN)],
    *[("sampling.logit_bias[5]", sampling(logit_bias={5: bad})) for bad in (-101.0, 101.0, NAN)],
    ("sampling.logit_bias[1000000]", sampling(logit_bias={1_000_000: 1.0})),
    ("sampling.logit_bias", sampling(logit_bias=dict.fromkeys(range(1025), 1.0))),
    ("stopping.max_tokens", stopping(max_tokens=0)),
    ("stopping.max_tokens", stopping(max_tokens=4096)),
    ("stopping.stop_sequences", stopping(stop_sequences=["x"] * 17)),
    ("stopping.stop_sequences[1]", stopping(stop_sequences=["x", ""])),
    ("stopping.stop_sequences[0]", stopping(stop_sequences=["x" * 1025])),
    ("stopping.stop_token_ids", stopping(stop_token_ids=[1] * 65)),
    ("stopping.stop_token_ids[0]", stopping(stop_token_ids=[1_000_000])),
    ("output.logprobs", output(logprobs=21)),
    ("constraint", {"constraint": pb.Constraint()}),
    ("constraint.json_schema", constraint(json_schema="")),
    ("constraint.json_schema", constraint(json_schema='{"type":')),
    ("constraint.json_schema", constraint(json_schema="[]")),
    ("constraint.json_schema", constraint(json_schema='{"type": "text"}')),
    ("constraint.json_schema", constraint(json_schema='{"uniqueItems": true}')),
    ("constraint.json_schema", constraint(json_schema='{"$ref": "https://example.com/s"}')),
    ("constraint.json_schema", constraint(json_schema='{"enum": []}')),
    ("constraint.json_schema", constraint(json_schema='{"items":' * 5000 + "{}" + "}" * 5000)),
    ("constraint.json_schema", constraint(json_schema=f'{{"const": "{"x" * 131_072}"}}')),
    ("constraint.regex", constraint(regex=" ")),
    ("constraint.regex", constraint(regex="(")),
    ("constraint.regex", constraint(regex="(?=a)a")),
    ("constraint.regex", constraint(regex="()")),
    ("constraint.regex", constraint(regex="a" * 131_073)),
    ("constraint.lark", constraint(lark="start: missing")),
    ("constraint.lark", constraint(lark="start: <|im_end|>")),
    ("constraint.choice.texts", constraint(choice=pb.ChoiceList())),
    ("constraint.choice.texts[1]", constraint(choice=pb.ChoiceList(texts=["a", ""]))),
    ("constraint.choice.texts", constraint(choice=pb.ChoiceList(texts=["a"] * 4097))),
    ("constraint.choice.texts", constraint(choice=pb.ChoiceList(texts=["a" * 99_999] * 2))),
    ("output.prompt_logprobs", output(prompt_logprobs=True)),
    ("output.prompt_logprobs", output(prompt_logprobs=True, echo=True)),
    ("output.prompt_logprobs", output(prompt_logprobs=True, logprobs=1)),
    ("sampling.seed", continued(sampling=pb.Sampling(temperature=1))),
    ("sampling.seed", continued(sampling=pb.Sampling())),
    ("continuation.choices", continued(DELIVERED(completion_tokens=3))),
    ("continuation.choices[0].choice_index", continued(DELIVERED(choice_index=1))),
    ("continuation.choices[1].choice_index", continued(DELIVERED(), DELIVERED(), n=2)),
    ("continuation.choices[0].token_ids[1]", continued(DELIVERED(token_ids=[5, 1_000_000]))),
    ("continuation.choices[0].token_ids", continued(DELIVERED(token_ids=[5] * 5))),
    ("continuation.choices[0].token_ids", continued(DELIVERED(token_ids=[5] * 5000))),
    (
        "continuation.choices[0].token_ids[1]",
        continued(DELIVERED(token_ids=[6, 5]), stopping=pb.Stopping(stop_token_ids=[5])),
    ),
    ("continuation.choices[0].text_characters", continued(DELIVERED(text_characters=5000))),
    ("continuation.choices[0].echoed_tokens", continued(DELIVERED(echoed_tokens=1))),
    ("continuation.choices[0].reasoning_characters", continued(DELIVERED(reasoning_characters=1))),
    ("continuation.choices[0].tool_calls", continued(DELIVERED(tool_calls=1))),
    (
        "continuation.choices[0].completion_tokens",
        continued(DELIVERED(completion_tokens=1, tool_calls=1), n=2),
    ),
    (
        "continuation.sequence_number",
        {
            "continuation": pb.Continuation(sequence_number=2**64 - 1),
            "sampling": pb.Sampling(temperature=0),
        },
    ),
    (
        "continuation.resume_id",
        {"continuation": pb.Continuation(resume_id=f"rs_{'0' * 48}")},
    ),
    (
        "continuation.choices[0].echoed_tokens",
        continued(DELIVERED(echoed_tokens=1_000), output=pb.Output(echo=True)),
    ),
    (
        "continuation.choices[0].echoed_tokens",
        continued(DELIVERED(token_ids=[5], echoed_tokens=1), output=pb.Output(echo=True)),
    ),
    ("continuation.choices[0].completion_tokens", continued(DELIVERED(completion_tokens=5), n=2)),
    (
        "continuation.choices[0].completion_tokens",
        continued(DELIVERED(completion_tokens=1, token_ids=[5]), n=2),
    ),
]


async def test_a_value_out_of_range_is_invalid_argument_and_named() -> None:
    async with serve_script() as worker:
        for field, fields in OUT_OF_RANGE:
            refusal = await refusal_of(worker.stub.Generate(generate_request(**fields)))
            assert (refusal.code, refusal.field) == (INVALID, field), fields
            assert field in refusal.message
            assert not refusal.has_retry


@pytest.mark.parametrize(
    "path",
    [
        "",
        "sampling",
        "stopping",
        "output",
        "prompt",
        "prompt.token_ids",
        "prompt.chat",
        "prompt.chat.messages[0]",
        "continuation",
        "continuation.choices[0]",
    ],
)
async def test_a_field_that_this_contract_does_not_know_is_not_ignored(
    path: str,
) -> None:
    request = generate_request(output=pb.Output(token_ids=True), sampling=pb.Sampling(top_k=5))
    if path == "prompt.token_ids":
        request.prompt.token_ids.ids.append(5)
    elif path.startswith("prompt.chat"):
        request.prompt.chat.messages.append(USER)
    elif path.startswith("continuation"):
        request.sampling.seed = 1
        request.continuation.choices.add()
    message: Any = request
    for name in path.removesuffix("[0]").split(".") if path else ():
        message = getattr(message, name)
    if path.endswith("[0]"):
        message = message[0]
    message.MergeFromString(b"\x98\x06\x01")  # field 99, the number 1
    async with serve_script() as worker:
        refusal = await refusal_of(worker.stub.Generate(request))
    assert (refusal.code, refusal.field) == (UNIMPLEMENTED, f"{path}.99" if path else "99")


async def test_a_delivered_stop_sequence_is_refused() -> None:
    async with serve_script() as worker:
        tokens = worker.served.tokenizer.encode("one two three")
        request = generate_request(
            **continued(DELIVERED(token_ids=tokens)),
            max_tokens=100,
            stopping=pb.Stopping(stop_sequences=["never", "e tw"]),
        )
        refusal = await refusal_of(worker.stub.Generate(request))
    assert (refusal.code, refusal.field) == (INVALID, "continuation.choices[0].token_ids")
    assert "'e tw'" in refusal.message


async def test_a_request_without_a_prompt() -> None:
    async with serve_script() as worker:
        refusal = await refusal_of(worker.stub.Generate(pb.GenerateRequest()))
    assert (refusal.code, refusal.field) == (INVALID, "prompt")


async def test_another_model_is_not_found() -> None:
    async with serve_script(model_name="mine", model_aliases=("alias",)) as worker:
        for name in ("", "other", "Mine"):
            refusal = await refusal_of(worker.stub.Generate(generate_request(model=name)))
            assert refusal.code == grpc.StatusCode.NOT_FOUND
            assert refusal.info.reason == "MODEL_NOT_FOUND"
        for name in ("mine", "alias"):
            messages = await worker.generate(model=name)
            assert messages[0].started.model == "mine"


async def test_an_id_in_use_already_exists() -> None:
    async with serve_script(step_milliseconds=5) as worker:
        first = worker.stub.Generate(generate_request(request_id="r1", max_tokens=1000))
        await first.read()
        refusal = await refusal_of(worker.stub.Generate(generate_request(request_id="r1")))
        assert (refusal.code, refusal.field) == (grpc.StatusCode.ALREADY_EXISTS, "request_id")
        first.cancel()


async def test_the_side_calls_refuse_the_same_way() -> None:
    async with serve_script() as worker:
        stub = worker.stub
        bad_calls: list[tuple[Awaitable[Any], grpc.StatusCode, str]] = [
            (stub.Abort(pb.AbortRequest()), INVALID, "request_id"),
            (stub.Tokenize(pb.TokenizeRequest()), INVALID, "prompt"),
            (
                stub.Tokenize(pb.TokenizeRequest(prompt=pb.Prompt(token_ids=pb.TokenIds(ids=[1])))),
                INVALID,
                "prompt.token_ids",
            ),
            (stub.Detokenize(pb.DetokenizeRequest(token_ids=[10**6])), INVALID, "token_ids[0]"),
            (stub.GetModel(pb.GetModelRequest(model="x")), grpc.StatusCode.NOT_FOUND, "model"),
            (stub.Tokenize(pb.TokenizeRequest(model="x")), grpc.StatusCode.NOT_FOUND, "model"),
            (stub.Detokenize(pb.DetokenizeRequest(model="x")), grpc.StatusCode.NOT_FOUND, "model"),
        ]
        for call, code, field in bad_calls:
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call
            refusal = Refusal(error.value)
            assert (refusal.code, refusal.field) == (code, field)
