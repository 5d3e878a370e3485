"""The rules that every OpenAI client survives, each by its number in the client contracts."""

import asyncio
from typing import Any

import httpx
import pytest

from protos.sluice.v1 import generation_pb2 as pb
from tests.edge.edge_process import EdgeProcess, running_edge
from tests.edge.raw_http import RawClient, request_bytes, split_chunked
from tests.edge.scripted_worker import CREATED, MODEL, ScriptedCall, ScriptedWorker, hello, texts
from tests.edge.sse import openai_chunks, parse

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
STREAMS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", CHAT | {"stream": True}),
    "completions": ("/v1/completions", {"prompt": "hi", "stream": True}),
}
PING = b": ping\n\n"
BOTH = pytest.mark.parametrize("route", STREAMS)


async def stream(http: httpx.AsyncClient, route: str, **fields: Any) -> bytes:
    path, body = STREAMS[route]
    response = await http.post(path, json=body | fields)
    assert response.status_code == 200, response.text
    return response.content


def text_of(answer: dict[str, Any]) -> str:
    """The text of an answer's or a chunk's first choice."""
    choice = answer["choices"][0]
    message = choice.get("message") or choice.get("delta") or {}
    text: str = choice.get("text") or message.get("content") or ""
    return text


async def test_rule_1_exact_bytes_of_a_chat_stream(http: httpx.AsyncClient) -> None:
    raw = await stream(http, "chat", stream_options={"include_usage": True})
    request_id = parse(raw).events[0].json()["id"]
    assert request_id.startswith("chatcmpl-")
    head = (
        f'data: {{"id":"{request_id}","object":"chat.completion.chunk","created":{CREATED},'
        f'"model":"{MODEL}","choices":['
    )

    def choice(delta: str, finish: str = "null") -> str:
        return (
            head + f'{{"index":0,"delta":{delta},"logprobs":null,"finish_reason":{finish}}}],'
            '"usage":null}\n\n'
        )

    expected = (
        choice('{"role":"assistant","content":""}')
        + choice('{"content":"Hel"}')
        + choice('{"content":"lo"}')
        + choice('{"content":" wörld"}')
        + choice("{}", '"stop"')
        + head
        + '],"usage":{"prompt_tokens":7,"completion_tokens":3,"total_tokens":10,'
        '"prompt_tokens_details":{"cached_tokens":4}}}\n\n'
        "data: [DONE]\n\n"
    )
    assert raw == expected.encode()


async def test_rule_1_exact_bytes_of_a_completions_stream(http: httpx.AsyncClient) -> None:
    raw = await stream(http, "completions")
    request_id = parse(raw).events[0].json()["id"]
    assert request_id.startswith("cmpl-")
    head = (
        f'data: {{"id":"{request_id}","object":"text_completion","created":{CREATED},'
        f'"model":"{MODEL}","choices":[{{"index":0,"text":'
    )
    expected = "".join(
        f'{head}"{text}","logprobs":null,"finish_reason":{finish}}}]}}\n\n'
        for text, finish in [
            ("Hel", "null"),
            ("lo", "null"),
            (" wörld", "null"),
            ("", '"stop"'),
        ]
    )
    assert raw == (expected + "data: [DONE]\n\n").encode()


@BOTH
async def test_rule_2_only_data_lines(http: httpx.AsyncClient, route: str) -> None:
    raw = await stream(http, route, n=2)
    assert b"\r" not in raw
    assert all(line == b"" or line.startswith(b"data: ") for line in raw.split(b"\n"))


@BOTH
async def test_rule_3_heartbeats_are_blocks_of_their_own(
    target: str, worker: ScriptedWorker, route: str
) -> None:
    steps = asyncio.Queue[None]()

    async def script(call: ScriptedCall) -> None:
        await call.started()
        await steps.get()
        await call.delta("a")
        await call.send(heartbeat=pb.Heartbeat())
        await steps.get()
        await call.finished()

    worker.script = script
    async with running_edge(target, heartbeat_seconds=0.1) as edge, RawClient(edge.port) as client:
        await client.send(request_bytes(*STREAMS[route], connection="close"))
        for _ in range(2):
            before = client.received.count(PING)
            while client.received.count(PING) < before + 2:
                await client.read_more()
            steps.put_nowait(None)
        _, raw, is_complete = split_chunked(await client.read_to_end())
    assert is_complete
    blocks = raw.removesuffix(b"\n\n").split(b"\n\n")
    pings = [block for block in blocks if b":" in block[:1]]
    assert len(pings) >= 4
    assert set(pings) == {b": ping"}
    assert all(block.startswith(b"data: ") for block in blocks if block not in pings)
    assert len(openai_chunks(raw)) >= 2


async def test_first_message_late_sends_the_200_and_pings(
    target: str, worker: ScriptedWorker
) -> None:
    go = asyncio.Event()

    async def script(call: ScriptedCall) -> None:
        await go.wait()
        await hello(call)

    worker.script = script
    async with running_edge(target, first_message_seconds=0.2, heartbeat_seconds=0.2) as edge:
        async with RawClient(edge.port) as client:
            await client.send(request_bytes(*STREAMS["chat"]))
            head = await client.read_until(b": ping\n\n")
            assert head.startswith(b"HTTP/1.1 200")
            assert b"data:" not in head
            go.set()
            await client.read_until(b"[DONE]")
        # An unstreamed answer has nothing to send early.
        go.clear()
        async with RawClient(edge.port) as client:
            await client.send(request_bytes("/v1/chat/completions", CHAT))
            await asyncio.sleep(0.5)
            go.set()
            assert (await client.read_until(b"usage")).count(b"HTTP/1.1") == 1


SEPARATORS = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei\rj\nk"


@BOTH
async def test_rule_4_no_raw_line_separators(
    http: httpx.AsyncClient, worker: ScriptedWorker, route: str
) -> None:
    worker.script = texts([SEPARATORS, *SEPARATORS])
    raw = await stream(http, route)
    assert rb"a\u2028b\u2029c\u0085d\u000be" in raw
    lines = raw.decode().splitlines()
    assert all(line == "" or line.startswith("data: ") for line in lines)
    assert "".join(map(text_of, openai_chunks(raw))) == SEPARATORS * 2
    path, body = STREAMS[route]
    whole = await http.post(path, json=body | {"stream": False})
    assert len(whole.text.splitlines()) == 1
    assert text_of(whole.json()) == SEPARATORS * 2


@pytest.mark.parametrize("n", [1, 3])
async def test_rule_5_role_once_for_each_choice_in_order(
    http: httpx.AsyncClient, worker: ScriptedWorker, n: int
) -> None:
    async def script(call: ScriptedCall) -> None:
        await call.started()
        for choice in reversed(range(n)):
            await call.delta("x", choice)
        for choice in reversed(range(n)):
            await call.finished(choice=choice, completion_tokens=n if choice == 0 else None)

    worker.script = script
    choices = [c["choices"][0] for c in openai_chunks(await stream(http, "chat", n=n))]
    assert worker.call.request.n == n
    assert [c["index"] for c in choices[:n]] == list(range(n))
    assert all(c["delta"] == {"role": "assistant", "content": ""} for c in choices[:n])
    assert all("role" not in c["delta"] for c in choices[n:])


@pytest.mark.parametrize("prompts", [1, 2])
async def test_rule_5_completions_show_choices_in_index_order(
    http: httpx.AsyncClient, worker: ScriptedWorker, prompts: int
) -> None:
    async def script(call: ScriptedCall) -> None:
        await call.started()
        await call.delta("x", 1)
        await call.delta("x", 0)
        await call.finished(choice=1, completion_tokens=None)
        await call.finished(choice=0)

    worker.script = script
    raw = await stream(http, "completions", n=2, prompt=["p"] * prompts)
    indexes = [chunk["choices"][0]["index"] for chunk in openai_chunks(raw)]
    assert list(dict.fromkeys(indexes)) == list(range(2 * prompts))


@BOTH
async def test_rule_6_usage(http: httpx.AsyncClient, worker: ScriptedWorker, route: str) -> None:
    plain = openai_chunks(await stream(http, route))
    assert all("usage" not in chunk for chunk in plain)
    assert all(chunk["choices"] for chunk in plain)
    for options in ({}, {"include_usage": False}, None):
        chunks = openai_chunks(await stream(http, route, stream_options=options))
        assert all("usage" not in chunk for chunk in chunks)

    asked = openai_chunks(await stream(http, route, stream_options={"include_usage": True}))
    usage = {
        "prompt_tokens": 7,
        "completion_tokens": 3,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    assert asked[-1]["choices"] == []
    assert asked[-1]["usage"] == usage
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in asked[:-1])

    running = openai_chunks(
        await stream(http, route, stream_options={"continuous_usage_stats": True})
    )
    counts = [chunk["usage"]["completion_tokens"] for chunk in running]
    assert counts == sorted(counts)
    assert set(counts) == {0, 1, 2, 3} if route == "chat" else {1, 2, 3}
    assert running[-1]["choices"] == []
    assert running[-1]["usage"] == usage


# Rule 7 has files of its own: test_error_table.py and test_failure_midway.py.


@BOTH
@pytest.mark.parametrize("accept", ["application/json", "text/event-stream", "*/*"])
async def test_rule_8_stream_alone_decides(
    http: httpx.AsyncClient, route: str, accept: str
) -> None:
    path, body = STREAMS[route]
    for streamed in (True, False, None):
        response = await http.post(
            path, json=body | {"stream": streamed}, headers={"accept": accept}
        )
        kind = "text/event-stream; charset=utf-8" if streamed else "application/json"
        assert response.headers["content-type"] == kind


@BOTH
async def test_rule_9_headers(http: httpx.AsyncClient, route: str) -> None:
    path, body = STREAMS[route]
    response = await http.post(path, json=body, headers={"accept-encoding": "gzip, br, zstd"})
    headers = response.headers
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    assert headers["cache-control"] == "no-cache"
    assert headers["x-accel-buffering"] == "no"
    assert "content-encoding" not in headers
    assert headers["x-request-id"] == headers["request-id"]


@pytest.mark.parametrize(
    "model", ["dummy", "tgi", "default", "http://127.0.0.1:9/v1", "org/tiny", None]
)
@BOTH
async def test_rule_11_the_worker_decides_model_names(
    http: httpx.AsyncClient, worker: ScriptedWorker, route: str, model: str | None
) -> None:
    raw = await stream(http, route, model=model)
    request = worker.call.request
    assert (request.model if request.HasField("model") else None) == model
    assert {chunk["model"] for chunk in openai_chunks(raw)} == {MODEL}


@BOTH
async def test_rule_12_text_is_the_same_streamed_and_not(
    http: httpx.AsyncClient, worker: ScriptedWorker, route: str
) -> None:
    parts = ["👩", "\u200d👧", "e\u0301", "字", "\ufffd"]
    worker.script = texts(parts)
    streamed = [text_of(chunk) for chunk in openai_chunks(await stream(http, route))]
    path, body = STREAMS[route]
    whole = (await http.post(path, json=body | {"stream": False})).json()
    assert "".join(streamed) == text_of(whole) == "".join(parts)
    assert [part for part in streamed if part] == parts


async def test_a_stream_ends_with_a_last_chunk(edge: EdgeProcess) -> None:
    async with RawClient(edge.port) as client:
        await client.send(request_bytes(*STREAMS["chat"], connection="close"))
        head, body, is_complete = split_chunked(await client.read_to_end())
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert is_complete
    assert body.endswith(b"data: [DONE]\n\n")
