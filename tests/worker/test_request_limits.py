"""What a stranger may ask of the gRPC server: each limit has a setting, and each is refused by name."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio
from pydantic import ValidationError

from inference_worker.count_limits import CONTRACT, CountLimits
from inference_worker.settings import WorkerSettings
from protos.sluice.v1 import generation_pb2 as pb
from protos.sluice.v1 import generation_pb2_grpc
from tests.worker.served_worker import ServedWorker, generate_request, serve_script

SMALL = CountLimits(
    max_messages=2,
    max_tools=1,
    max_tool_bytes=100,
    max_template_arguments=1,
    max_template_bytes=30,
    max_stop_sequences=2,
    max_stop_characters=5,
    max_stop_token_ids=2,
    max_logit_biases=2,
    max_logprobs=2,
    max_grammar_texts=2,
)
SETTINGS = {name: getattr(SMALL, name) for name in CountLimits.__dataclass_fields__}


@pytest_asyncio.fixture
async def worker() -> AsyncIterator[ServedWorker]:
    async with serve_script(
        **SETTINGS,
        max_choices=2,
        max_grammar_bytes=20,
        context_length=64,
        max_message_bytes=4096,
        max_metadata_bytes=2048,
        max_streams=2,
        step_milliseconds=50,
    ) as worker:
        yield worker


def chat(count: int, **fields: Any) -> pb.Prompt:
    messages = [pb.ChatMessage(role="user", content="x")] * count
    return pb.Prompt(chat=pb.Chat(messages=messages, **fields))


def choice(texts: str) -> pb.Constraint:
    return pb.Constraint(choice=pb.ChoiceList(texts=texts))


def tool(name: str, size: int = 0) -> pb.Tool:
    return pb.Tool(name=name, description="x" * size)


# limit -> the field that is named, what is just allowed, what is too much
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "max_messages": (
        "prompt.chat.messages",
        {"prompt": chat(2)},
        {"prompt": chat(3)},
    ),
    "max_tools": (
        "prompt.chat.tools",
        {"prompt": chat(1, tools=[tool("a")])},
        {"prompt": chat(1, tools=[tool("a"), tool("b")])},
    ),
    "max_tool_bytes": (
        "prompt.chat.tools",
        {"prompt": chat(1, tools=[tool("a", 20)])},
        {"prompt": chat(1, tools=[tool("a", 100)])},
    ),
    "max_template_arguments": (
        "prompt.chat.template_arguments",
        {"prompt": chat(1, template_arguments={"a": 1})},
        {"prompt": chat(1, template_arguments={"a": 1, "b": 1})},
    ),
    "max_template_bytes": (
        "prompt.chat.template_arguments",
        {"prompt": chat(1, template_arguments={"a": "x" * 10})},
        {"prompt": chat(1, template_arguments={"a": "x" * 30})},
    ),
    "max_stop_sequences": (
        "stopping.stop_sequences",
        {"stopping": pb.Stopping(stop_sequences="ab")},
        {"stopping": pb.Stopping(stop_sequences="abc")},
    ),
    "max_stop_characters": (
        "stopping.stop_sequences[0]",
        {"stopping": pb.Stopping(stop_sequences=["x" * 5])},
        {"stopping": pb.Stopping(stop_sequences=["x" * 6])},
    ),
    "max_stop_token_ids": (
        "stopping.stop_token_ids",
        {"stopping": pb.Stopping(stop_token_ids=[5, 6])},
        {"stopping": pb.Stopping(stop_token_ids=[5, 6, 7])},
    ),
    "max_logit_biases": (
        "sampling.logit_bias",
        {"sampling": pb.Sampling(logit_bias={5: 1, 6: 1})},
        {"sampling": pb.Sampling(logit_bias={5: 1, 6: 1, 7: 1})},
    ),
    "max_logprobs": (
        "output.logprobs",
        {"output": pb.Output(logprobs=2)},
        {"output": pb.Output(logprobs=3)},
    ),
    "max_choices": ("n", {"n": 2}, {"n": 3}),
    "max_grammar_bytes": (
        "constraint.regex",
        {},
        {"constraint": pb.Constraint(regex="a" * 21)},
    ),
    "max_grammar_texts": (
        "constraint.choice.texts",
        {},
        {"constraint": choice("abc")},
    ),
    "context_length": ("prompt", {"ids": [5] * 60}, {"ids": [5] * 64}),
}


@pytest.mark.parametrize("limit", CASES)
async def test_one_too_many_is_refused(worker: ServedWorker, limit: str) -> None:
    field, fine, refused = CASES[limit]
    assert await worker.generate(**fine)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await worker.generate(**refused)
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (error.value.details() or "").startswith(f"{field}:")


async def test_a_prompt_to_tokenize_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serve_script(context_length=64) as worker:
        longest = worker.served.tokenizer.max_token_bytes
        assert longest is not None
        request = pb.TokenizeRequest(prompt=pb.Prompt(text="x" * 64 * longest))
        assert len((await worker.stub.Tokenize(request)).token_ids) > 64
    async with serve_script(max_tokenize_bytes=40) as worker:
        tokenizer = worker.served.tokenizer
        for fine, refused, field in (
            (pb.Prompt(text="é" * 20), pb.Prompt(text="é" * 20 + "x"), "prompt.text"),
            (chat(2), chat(20), "prompt.chat.messages"),
        ):
            assert (await worker.stub.Tokenize(pb.TokenizeRequest(prompt=fine))).token_ids
            with monkeypatch.context() as patch:
                for method in ("encode", "encode_chat"):
                    patch.setattr(tokenizer, method, None)
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await worker.stub.Tokenize(pb.TokenizeRequest(prompt=refused))
            assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert (error.value.details() or "").startswith(f"{field}: at most 40 bytes")


def test_every_count_has_a_setting_that_can_only_lower_it() -> None:
    assert CountLimits.of(WorkerSettings(**SETTINGS)) == SMALL
    assert CountLimits.of(WorkerSettings()) == CONTRACT
    for name in SETTINGS:
        with pytest.raises(ValidationError):
            WorkerSettings(**{name: getattr(CONTRACT, name) + 1})


async def test_a_large_message_or_much_metadata_is_refused(worker: ServedWorker) -> None:
    assert await worker.generate(text="x" * 40)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await worker.generate(text="x" * 5000)
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    for size, is_fine in ((500, True), (4000, False)):
        call = worker.stub.GetLoad(pb.GetLoadRequest(), metadata=[("x-much", "y" * size)])
        assert (await call.code() is grpc.StatusCode.OK) == is_fine


async def test_more_calls_than_a_connection_may_have_wait(worker: ServedWorker) -> None:
    """Those of other connections do not."""
    long = generate_request(max_tokens=40)
    running = [worker.stub.Generate(long) for _ in range(2)]
    for call in running:
        await call.read()
    waiting = asyncio.ensure_future(worker.stub.GetLoad(pb.GetLoadRequest()))
    # a channel of its own, which does not share the other's connection
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(worker.address, options=options) as channel:
        other: generation_pb2_grpc.GenerationServiceAsyncStub = (
            generation_pb2_grpc.GenerationServiceStub(channel)
        )
        load = await other.GetLoad(pb.GetLoadRequest())
        assert load.requests == 2
        assert not waiting.done()
    for call in running:
        call.cancel()
    assert (await waiting).requests <= 2
