"""What the worker's shutdown cuts short is told apart from success in every dialect, streamed or not."""

from typing import Any

import httpx
import pytest

from protos.sluice.v1 import generation_pb2 as pb
from tests.edge.edge_process import EdgeProcess
from tests.edge.raw_http import RawClient, request_bytes, split_chunked
from tests.edge.scripted_worker import ScriptedCall, ScriptedWorker

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "model": "default"}
# What a stream that did not succeed ends with.
STREAMS: dict[str, tuple[str, dict[str, Any], bytes]] = {
    "chat": ("/v1/chat/completions", CHAT | {"stream": True}, b'"type":"unavailable"'),
    "completions": ("/v1/completions", {"prompt": "hi", "stream": True}, b'"type":"unavailable"'),
    "responses": ("/v1/responses", {"input": "hi", "stream": True}, b'"type":"error"'),
    "messages": ("/v1/messages", CHAT | {"max_tokens": 9, "stream": True}, b"event: error"),
    "tgi": ("/generate_stream", {"inputs": "hi"}, b'"error_type"'),
    "triton": ("/v2/models/default/generate_stream", {"text_input": "hi"}, b'"error"'),
    "native": ("/v1/streams", {"prompt": "hi"}, b'"finish_reason":"shutdown"'),
}
WHOLE: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", CHAT),
    "completions": ("/v1/completions", {"prompt": "hi"}),
    "responses": ("/v1/responses", {"input": "hi"}),
    "messages": ("/v1/messages", CHAT | {"max_tokens": 9}),
    "tgi": ("/generate", {"inputs": "hi"}),
    "triton": ("/v2/models/default/generate", {"text_input": "hi"}),
}
SUCCESSES = (b"[DONE]", b"response.completed", b"message_stop", b'"finish_reason":"stop"')


async def cut_short(call: ScriptedCall) -> None:
    await call.started()
    await call.delta("partly")
    await call.finished(pb.FINISH_REASON_SHUTDOWN)


@pytest.mark.parametrize("dialect", STREAMS)
async def test_a_stream_ends_with_a_failure_and_not_with_a_success(
    edge: EdgeProcess, worker: ScriptedWorker, dialect: str
) -> None:
    worker.script = cut_short
    path, body, failure = STREAMS[dialect]
    async with RawClient(edge.port) as client:
        await client.send(request_bytes(path, body, connection="close"))
        head, stream, is_complete = split_chunked(await client.read_to_end())
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"partly" in stream or dialect == "tgi"  # which holds a token back until the next one
    last = stream.rstrip().rsplit(b"\n\n", 1)[-1]
    assert failure in last
    assert not any(word in stream for word in SUCCESSES)
    assert is_complete == (dialect == "native")  # whose last event says it all


@pytest.mark.parametrize("dialect", WHOLE)
async def test_an_answer_that_is_not_streamed_is_a_503(
    http: httpx.AsyncClient, worker: ScriptedWorker, dialect: str
) -> None:
    worker.script = cut_short
    path, body = WHOLE[dialect]
    response = await http.post(path, json=body)
    assert response.status_code == 503
    assert "partly" not in response.text
