"""The openai package, unchanged."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import openai
import pytest
import pytest_asyncio

from protos.sluice.v1 import generation_pb2 as pb
from tests.clients.contract import Answer, Client, ClientContract, Errors, Question
from tests.edge.edge_process import PATIENCE, EdgeProcess
from tests.edge.scripted_worker import (
    MODEL,
    ScriptedCall,
    ScriptedWorker,
    bad_field,
    failing,
    hello,
    retry_in,
)

HELLO = "Hello wörld"


class OpenAI(Client):
    """The synchronous client, asked as the README does."""

    def ask(self, question: Question) -> Answer:
        with self._connect(question) as client:
            completion = client.chat.completions.create(**self._body(question))
        (choice,), usage = completion.choices, completion.usage
        return Answer(
            choice.message.content,
            choice.finish_reason,
            usage.prompt_tokens,
            usage.completion_tokens,
        )

    def stream(self, question: Question) -> Answer:
        text, finish_reason, usage = "", "", None
        with (
            self._connect(question) as client,
            client.chat.completions.create(
                **self._body(question), stream=True, stream_options={"include_usage": True}
            ) as stream,
        ):
            for chunk in stream:
                usage = chunk.usage or usage
                for choice in chunk.choices:
                    text += choice.delta.content or ""
                    finish_reason = choice.finish_reason or finish_reason
        assert usage
        return Answer(text, finish_reason, usage.prompt_tokens, usage.completion_tokens)

    def leave(self, question: Question) -> str:
        with (
            self._connect(question) as client,
            client.chat.completions.create(**self._body(question), stream=True) as stream,
        ):
            texts = (choice.delta.content for chunk in stream for choice in chunk.choices)
            return str(next(filter(None, texts)))

    def _connect(self, question: Question) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{question.url}/v1", api_key=question.key, max_retries=0)

    def _body(self, question: Question) -> Any:
        return {
            "model": question.model,
            "messages": [{"role": "user", "content": question.content}],
            "max_tokens": question.max_tokens,
            "temperature": question.temperature,
        }


class TestOpenAI(ClientContract):
    errors = Errors(
        bad_field="BadRequestError",
        wrong_key="AuthenticationError",
        no_such_model="NotFoundError",
        overloaded="RateLimitError",
        midway="APIError",
    )

    @pytest.fixture
    def client(self) -> OpenAI:
        return OpenAI()


@pytest_asyncio.fixture(loop_scope="session")
async def client(edge: EdgeProcess) -> AsyncIterator[openai.AsyncOpenAI]:
    """A client that does not retry."""
    async with openai.AsyncOpenAI(
        base_url=f"{edge.url}/v1", api_key="none", max_retries=0, timeout=20
    ) as client:
        yield client


async def test_chat(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="default", messages=[{"role": "user", "content": "x"}]
    )
    assert answer.choices[0].message.content == HELLO
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == MODEL
    assert answer.usage
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (7, 10)
    assert answer._request_id
    # An answer goes back as it came.
    await client.chat.completions.create(
        model="default",
        messages=[
            {"role": "user", "content": "x"},
            answer.choices[0].message,  # type: ignore[list-item]  # the documented way
            {"role": "user", "content": "y"},
        ],
    )


async def test_streamed_chat_with_choices_and_usage(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": "x"}],
        n=2,
        stream=True,
        stream_options={"include_usage": True},
    )
    texts = ["", ""]
    finishes: list[str | None] = [None, None]
    usage = None
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            finishes[choice.index] = choice.finish_reason
    assert texts == [HELLO, HELLO]
    assert finishes == ["stop", "stop"]
    assert usage
    assert usage.completion_tokens == 6


async def test_the_accumulating_stream_helper(client: openai.AsyncOpenAI) -> None:
    async with client.chat.completions.stream(
        model="default", messages=[{"role": "user", "content": "x"}]
    ) as stream:
        async for _ in stream:
            pass
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == HELLO


async def test_logprobs(client: openai.AsyncOpenAI, worker: ScriptedWorker) -> None:
    async def script(call: ScriptedCall) -> None:
        await call.started()
        token = pb.Candidate(token_id=1, token=b"a", logprob=-0.5)
        await call.delta("a", logprobs=[pb.TokenLogprob(token=token, top=[token])])
        await call.finished()

    worker.script = script
    answer = await client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": "x"}],
        logprobs=True,
        top_logprobs=1,
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs
    assert logprobs.content
    assert (logprobs.content[0].token, logprobs.content[0].logprob) == ("a", -0.5)
    assert logprobs.content[0].top_logprobs[0].bytes == [97]
    text = await client.completions.create(model="default", prompt="x", logprobs=1)
    assert text.choices[0].logprobs
    assert text.choices[0].logprobs.token_logprobs == [-0.5]


async def test_completions(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="default", prompt=["x", "y"])
    assert [(choice.index, choice.text) for choice in answer.choices] == [(0, HELLO), (1, HELLO)]
    stream = await client.completions.create(model="default", prompt=[1, 2], stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == HELLO


async def test_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == [MODEL]
    assert (await client.models.retrieve("default")).id == "default"
    with pytest.raises(openai.NotFoundError) as caught:
        await client.models.retrieve("gpt-99")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, openai.BadRequestError),
        (grpc.StatusCode.UNIMPLEMENTED, openai.BadRequestError),
        (grpc.StatusCode.UNAUTHENTICATED, openai.AuthenticationError),
        (grpc.StatusCode.PERMISSION_DENIED, openai.PermissionDeniedError),
        (grpc.StatusCode.NOT_FOUND, openai.NotFoundError),
        (grpc.StatusCode.ALREADY_EXISTS, openai.ConflictError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, openai.RateLimitError),
        (grpc.StatusCode.UNAVAILABLE, openai.InternalServerError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, openai.InternalServerError),
        (grpc.StatusCode.INTERNAL, openai.InternalServerError),
    ],
)
async def test_errors_raise_their_exceptions(
    client: openai.AsyncOpenAI,
    worker: ScriptedWorker,
    code: grpc.StatusCode,
    expected: type[openai.APIStatusError],
    streamed: bool,
) -> None:
    worker.script = failing(code, "no", bad_field("sampling.top_p"))
    with pytest.raises(expected) as caught:
        await client.chat.completions.create(
            model="default", messages=[{"role": "user", "content": "x"}], stream=streamed
        )
    assert caught.value.param == "top_p"
    assert caught.value.request_id


async def test_overload_is_retried_after_the_time_given(
    client: openai.AsyncOpenAI, worker: ScriptedWorker
) -> None:
    full = failing(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", retry_in(0.1))

    async def script(call: ScriptedCall) -> None:
        await (full if len(worker.calls) == 1 else hello)(call)

    worker.script = script
    answer = await client.with_options(max_retries=2).chat.completions.create(
        model="default", messages=[{"role": "user", "content": "x"}]
    )
    assert answer.choices[0].message.content == HELLO
    assert len(worker.calls) == 2


@pytest.mark.parametrize("code", [grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE])
async def test_a_failure_midway_raises(
    client: openai.AsyncOpenAI, worker: ScriptedWorker, code: grpc.StatusCode
) -> None:
    async def script(call: ScriptedCall) -> None:
        await call.started()
        await call.delta("partly")
        await call.fail(code)

    worker.script = script
    stream = await client.chat.completions.create(
        model="default", messages=[{"role": "user", "content": "x"}], stream=True
    )
    received: list[str | None] = []

    async def read() -> None:
        async for chunk in stream:
            received.extend(choice.delta.content for choice in chunk.choices)

    with pytest.raises(openai.APIError) as caught:
        await read()
    assert received == ["", "partly"]
    assert type(caught.value) is openai.APIError, "the error event, not a broken connection"


async def test_breaking_out_cancels(client: openai.AsyncOpenAI, worker: ScriptedWorker) -> None:
    async def script(call: ScriptedCall) -> None:
        await call.started()
        while True:
            await call.delta("more")
            await asyncio.sleep(0.01)

    worker.script = script
    async with await client.chat.completions.create(
        model="default", messages=[{"role": "user", "content": "x"}], stream=True
    ) as stream:
        async for chunk in stream:
            if chunk.choices[0].delta.content:
                break
    await asyncio.wait_for(worker.call.ended.wait(), PATIENCE)
    assert worker.call.was_cancelled


async def test_unsupported_features_are_refused_at_once(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": "x"}],
            verbosity="high",
        )
    assert caught.value.param == "verbosity"
