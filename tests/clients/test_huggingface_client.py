"""huggingface_hub's InferenceClient, unchanged."""

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from tests.clients.contract import Answer, Client, ClientContract, Errors, Question
from tests.edge.edge_process import EdgeProcess
from tests.edge.scripted_worker import ScriptedCall, ScriptedWorker, failing, texts
from tests.patience import PATIENCE

MESSAGES = [{"role": "user", "content": "x"}]


class HuggingFace(Client):
    """The synchronous client."""

    def ask(self, question: Question) -> Answer:
        with self._connect(question) as client:
            answer = client.chat_completion(**self._body(question))
        (choice,), usage = answer.choices, answer.usage
        return Answer(
            choice.message.content or "",
            choice.finish_reason,
            usage.prompt_tokens,
            usage.completion_tokens,
        )

    def stream(self, question: Question) -> Answer:
        options: Any = {"stream": True, "stream_options": {"include_usage": True}}
        with self._connect(question) as client:
            chunks = list(client.chat_completion(**self._body(question), **options))
        choices = [choice for chunk in chunks for choice in chunk.choices]
        usage = chunks[-1].usage
        return Answer(
            "".join(choice.delta.content or "" for choice in choices),
            choices[-1].finish_reason,
            usage.prompt_tokens,
            usage.completion_tokens,
        )

    def leave(self, question: Question) -> str:
        with self._connect(question) as client:
            for chunk in client.chat_completion(**self._body(question), stream=True):
                if text := chunk.choices[0].delta.content:
                    return str(text)
        raise AssertionError("no text came")

    def _connect(self, question: Question) -> InferenceClient:
        return InferenceClient(base_url=question.url, api_key=question.key)

    def _body(self, question: Question) -> Any:
        return {
            "messages": [{"role": "user", "content": question.content}],
            "model": question.model,
            "max_tokens": question.max_tokens,
            "temperature": question.temperature,
        }


class TestHuggingFace(ClientContract):
    errors = Errors(
        bad_field="BadRequestError",
        wrong_key="HfHubHTTPError",
        no_such_model="HfHubHTTPError",
        overloaded="HfHubHTTPError",
        midway="UnknownError",
    )

    @pytest.fixture
    def client(self) -> HuggingFace:
        return HuggingFace()


@pytest_asyncio.fixture(loop_scope="session")
async def client(edge: EdgeProcess) -> AsyncIterator[AsyncInferenceClient]:
    """A client without a model name, which then sends one of its own."""
    async with AsyncInferenceClient(base_url=edge.url, api_key="none", timeout=PATIENCE) as client:
        yield client


async def test_chat(client: AsyncInferenceClient, worker: ScriptedWorker) -> None:
    answer = await client.chat_completion(MESSAGES, max_tokens=5)
    assert answer.choices[0].message.content == "Hello wörld"
    assert worker.call.request.stopping.max_tokens == 5
    assert worker.call.request.model in ("dummy", "tgi")


async def test_streamed_chat_keeps_line_separators(
    client: AsyncInferenceClient, worker: ScriptedWorker
) -> None:
    parts = ["a\u2028b", "\u2029", "\x85", "end"]
    worker.script = texts(parts)
    received = [
        chunk.choices[0].delta.content or ""
        async for chunk in await client.chat_completion(MESSAGES, stream=True)
    ]
    assert "".join(received) == "".join(parts)


async def test_a_refusal_raises(client: AsyncInferenceClient, worker: ScriptedWorker) -> None:
    worker.script = failing(grpc.StatusCode.RESOURCE_EXHAUSTED)
    with pytest.raises(HfHubHTTPError) as caught:
        await client.chat_completion(MESSAGES, stream=True)
    assert caught.value.response.status_code == 429


async def test_a_failure_midway_raises(
    client: AsyncInferenceClient, worker: ScriptedWorker
) -> None:
    async def script(call: ScriptedCall) -> None:
        await call.started()
        await call.delta("partly")
        await call.fail(grpc.StatusCode.INTERNAL)

    worker.script = script
    stream = await client.chat_completion(MESSAGES, stream=True)
    with pytest.raises(Exception, match="failed to process"):
        [chunk async for chunk in stream]
