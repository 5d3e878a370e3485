"""huggingface_hub's InferenceClient, unchanged."""

from collections.abc import AsyncIterator

import grpc
import pytest
import pytest_asyncio
from huggingface_hub import AsyncInferenceClient
from huggingface_hub.errors import HfHubHTTPError

from tests.edge.edge_process import EdgeProcess
from tests.edge.scripted_worker import ScriptedCall, ScriptedWorker, failing, texts

MESSAGES = [{"role": "user", "content": "x"}]


@pytest_asyncio.fixture(loop_scope="session")
async def client(edge: EdgeProcess) -> AsyncIterator[AsyncInferenceClient]:
    """A client without a model name, which then sends one of its own."""
    async with AsyncInferenceClient(base_url=edge.url, api_key="none", timeout=20) as client:
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
