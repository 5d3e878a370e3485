"""The WebSocket, through the client that Python people use and through a bare socket."""

import asyncio
import base64
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf import json_format
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.frames import Frame, Opcode

from protos.sluice.v1 import generation_pb2 as pb
from tests.edge.edge_process import PATIENCE, EdgeProcess, fresh_id, running_edge
from tests.edge.fixtures import SHARED_SETTINGS
from tests.edge.raw_http import RawClient, request_bytes
from tests.edge.scripted_worker import (
    MODEL,
    ScriptedCall,
    ScriptedWorker,
    bad_field,
    error_info,
    failing,
    retry_in,
    texts,
)

PATH = "/v1/ws"


def url(edge: EdgeProcess) -> str:
    return f"ws://127.0.0.1:{edge.port}{PATH}"


class Client:
    """One conversation."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket

    async def send(self, frame: Any) -> None:
        """Sends a frame, JSON unless it is one already."""
        await self.socket.send(frame if isinstance(frame, str | bytes) else json.dumps(frame))

    async def generate(self, **fields: Any) -> None:
        await self.send({"type": "generate", **fields})

    async def event(self) -> dict[str, Any]:
        """The next frame of the server."""
        async with asyncio.timeout(PATIENCE):
            event: dict[str, Any] = json.loads(await self.socket.recv(decode=True))
        return event

    async def events(self) -> list[dict[str, Any]]:
        """All of one generation of one choice."""
        events = [await self.event()]
        while events[-1]["type"] not in ("finished", "failed"):
            events.append(await self.event())
        return events

    async def said(self, **fields: Any) -> str:
        """What the model says to that."""
        await self.generate(**fields)
        events = await self.events()
        assert events[-1]["type"] == "finished", events
        return "".join(event.get("text", "") for event in events)

    async def refused(self, frame: Any) -> dict[str, Any]:
        """The failure that answers a frame."""
        await self.send(frame)
        event = await self.event()
        assert event["type"] == "failed"
        return event

    async def closed(self) -> int | None:
        """The code with which the server closes."""
        async with asyncio.timeout(PATIENCE):
            with contextlib.suppress(ConnectionClosed):
                while True:
                    await self.socket.recv()
        return self.socket.close_code


@contextlib.asynccontextmanager
async def connected(edge: EdgeProcess, **options: Any) -> AsyncIterator[Client]:
    async with connect(url(edge), proxy=None, **options) as socket:
        yield Client(socket)


async def ended(worker: ScriptedWorker, number: int = -1) -> ScriptedCall:
    """A call that has ended, now or soon."""
    async with asyncio.timeout(PATIENCE):
        while not worker.calls:
            await asyncio.sleep(0.01)
        await worker.calls[number].ended.wait()
    return worker.calls[number]


async def hang(call: ScriptedCall) -> None:
    """Begins, says a word, and never ends."""
    await call.started()
    await call.delta("more")
    await call.hang()


async def echo(call: ScriptedCall) -> None:
    """Says how many messages there were."""
    await call.started()
    await call.delta(f"heard {len(call.request.prompt.chat.messages)}")
    await call.finished()


def chat(worker: ScriptedWorker) -> list[dict[str, Any]]:
    """The conversation that the worker was last told."""
    told = worker.calls[-1].request.prompt.chat
    return list(json_format.MessageToDict(told, preserving_proto_field_name=True)["messages"])


USER = {"role": "user", "content": "hi"}


async def test_a_generation(edge: EdgeProcess, worker: ScriptedWorker) -> None:
    worker.script = texts(["Hi\n", "ö\u2028"])
    async with connected(edge) as client:
        await client.generate(id="a", prompt="x", temperature=0)
        started, *deltas, finished = await client.events()
    assert worker.call.request.prompt.text == "x"
    assert worker.call.request.sampling.temperature == 0
    assert (started["type"], started["id"], started["model"]) == ("started", "a", MODEL)
    assert started["request_id"] == worker.call.request.request_id
    assert "".join(delta["text"] for delta in deltas) == "Hi\nö\u2028"
    assert {delta["type"] for delta in deltas} == {"delta"}
    assert (finished["type"], finished["finish_reason"]) == ("finished", "stop")
    assert finished["usage"]["completion_tokens"] == 2
    events = [started, *deltas, finished]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert {event["id"] for event in events} == {"a"}


async def test_the_id_is_the_requests_where_none_is_given(
    edge: EdgeProcess, worker: ScriptedWorker
) -> None:
    async with connected(edge) as client:
        await client.generate(prompt="x")
        ids = {event["id"] for event in await client.events()}
    assert ids == {worker.call.request.request_id}


async def test_a_conversation_goes_on_by_its_next_message_alone(
    edge: EdgeProcess, worker: ScriptedWorker
) -> None:
    worker.script = echo
    system = {"role": "system", "content": "Be short."}
    async with connected(edge) as client:
        assert await client.said(messages=[system, USER]) == "heard 2"
        assert await client.said(message=USER) == "heard 4"
        assert chat(worker) == [system, USER, {"role": "assistant", "content": "heard 2"}, USER]
        assert await client.said(prompt="beside it") == "heard 0"
        assert await client.said(message=USER) == "heard 6"
        assert await client.said(messages=[USER]) == "heard 1"
        assert await client.said(message=USER) == "heard 3"
    async with connected(edge) as other:
        assert await other.said(message=USER) == "heard 1"


async def test_an_answer_is_kept_with_its_reasoning_and_calls(
    edge: EdgeProcess, worker: ScriptedWorker
) -> None:
    async def calling(call: ScriptedCall) -> None:
        await call.started()
        await call.delta("Let me ", reasoning="h")
        await call.delta("see.", reasoning="m")
        first = pb.ToolCallDelta(index=0, id="t1", name="f", arguments="{")
        await call.delta("", tool_calls=[first, pb.ToolCallDelta(index=0, arguments="}")])
        await call.finished(pb.FINISH_REASON_TOOL_CALLS)

    worker.script = calling
    async with connected(edge) as client:
        await client.said(messages=[USER], tools=[{"name": "f"}])
        worker.script = echo
        result = {"role": "tool", "content": "1", "tool_call_id": "t1"}
        await client.said(message=result)
    call = {"id": "t1", "name": "f", "arguments": "{}"}
    answer = {"role": "assistant", "content": "Let me see.", "tool_calls": [call]}
    assert chat(worker) == [USER, answer | {"reasoning": "hm"}, result]


@pytest.mark.parametrize("end", ["cancel", "fail", "shutdown"])
async def test_a_turn_without_an_answer_leaves_the_conversation_as_it_was(
    edge: EdgeProcess, worker: ScriptedWorker, end: str
) -> None:
    async def script(call: ScriptedCall) -> None:
        await call.started()
        await call.delta("more")
        if end == "fail":
            await call.fail(grpc.StatusCode.INTERNAL)
        if end == "shutdown":
            await call.finished(pb.FINISH_REASON_SHUTDOWN)
            return
        await call.hang()

    async with connected(edge) as client:
        worker.script = echo
        assert await client.said(messages=[USER]) == "heard 1"
        worker.script = script
        await client.generate(message=USER)
        if end == "cancel":
            assert (await client.event())["type"] == "started"
            await client.send({"type": "cancel"})
        await client.events()
        worker.script = echo
        assert await client.said(message=USER) == "heard 3"


async def test_of_several_choices_the_first_is_kept(
    edge: EdgeProcess, worker: ScriptedWorker
) -> None:
    async def script(call: ScriptedCall) -> None:
        await call.started()
        for choice in (1, 0):
            await call.delta(f"choice {choice}", choice)
        await call.finished(choice=0, completion_tokens=None)
        await call.finished(choice=1)

    worker.script = script
    async with connected(edge) as client:
        await client.generate(messages=[USER], n=2)
        assert (await client.events())[-1]["choice_index"] == 0
        assert (await client.event())["choice_index"] == 1
        worker.script = echo
        await client.said(message=USER)
    assert chat(worker)[1] == {"role": "assistant", "content": "choice 0"}


async def test_cancel_ends_every_choice_and_the_call(
    edge: EdgeProcess, worker: ScriptedWorker
) -> None:
    async def script(call: ScriptedCall) -> None:
        await call.started()
        await call.finished(choice=1, completion_tokens=None)
        await call.hang()

    worker.script = script
    async with connected(edge) as client:
        await client.generate(id="a", prompt="x", n=3)
        assert [(await client.event())["type"] for _ in range(2)] == ["started", "finished"]
        await client.send({"type": "cancel", "id": "another"})  # which does not run
        await client.send({"type": "cancel", "id": "a"})
        last = [await client.event() for _ in range(2)]
        assert [event["choice_index"] for event in last] == [0, 2]
        assert {event["finish_reason"] for event in last} == {"cancelled"}
        assert [event["sequence_number"] for event in last] == [2, 3]
        assert (await ended(worker)).was_cancelled
        await client.send({"type": "cancel"})  # too late, and no harm
        worker.script = texts(["again"])
        assert await client.said(prompt="x") == "again"


async def test_cancel_before_the_first_message(edge: EdgeProcess, worker: ScriptedWorker) -> None:
    worker.script = ScriptedCall.hang
    async with connected(edge) as client:
        await client.generate(id="a", prompt="x")
        async with asyncio.timeout(PATIENCE):
            while not worker.calls:
                await asyncio.sleep(0.01)
        await client.send({"type": "cancel"})
        (event,) = await client.events()
        assert (event["type"], event["finish_reason"]) == ("finished", "cancelled")
    assert (await ended(worker)).was_cancelled


async def test_a_second_generation_is_refused_while_one_runs(
    edge: EdgeProcess, worker: ScriptedWorker
) -> None:
    worker.script = hang
    async with connected(edge) as client:
        await client.generate(id="a", prompt="x")
        assert [(await client.event())["id"] for _ in range(2)] == ["a", "a"]
        event = await client.refused({"type": "generate", "id": "b", "prompt": "y"})
        assert (event["id"], event["status"]) == ("b", 409)
        assert event["error"]["code"] == "generation_running"
        await client.send({"type": "cancel"})
        assert (await client.event())["finish_reason"] == "cancelled"
    assert len(worker.calls) == 1


async def test_many_generations_one_after_another(
    edge: EdgeProcess, worker: ScriptedWorker
) -> None:
    async with connected(edge) as client:
        for number in range(50):  # each sent as soon as the end before it is heard of
            worker.script = texts([str(number)])
            assert await client.said(prompt="x") == str(number)


async def test_generations_are_in_the_log(edge: EdgeProcess, worker: ScriptedWorker) -> None:
    client_id = fresh_id("socket-log")
    headers = {"x-request-id": client_id}
    async with connected(edge, additional_headers=headers) as client:
        assert client.socket.response is not None
        assert client.socket.response.headers["x-request-id"] == client_id
        await client.said(prompt="secret words")
        await client.generate(id="secret words", prompt=1)
        await client.event()
    turn = await edge.line(
        lambda line: line["event"] == "generation" and line["client_request_id"] == client_id
    )
    assert turn["generation_id"] == worker.call.request.request_id
    assert (turn["completion_tokens"], turn["finish_reasons"]) == (3, ["stop"])
    line = await edge.line(
        lambda line: line["event"] == "request" and line["client_request_id"] == client_id
    )
    assert (line["status"], line["route"], line["generations"]) == (101, PATH, 1)
    assert "secret words" not in json.dumps(edge.lines)


@pytest.mark.parametrize(
    ("frame", "param", "words"),
    [
        ("", None, "not valid JSON"),
        ("{", None, "not valid JSON"),
        ("[]", None, "must be a JSON object"),
        ("[" * 100 + "]" * 100, None, "nested deeper than"),
        ("{}", "type", "must be generate or cancel"),
        ({"type": "generate"}, "message", "exactly one of"),
        ({"type": "generate", "prompt": "x", "message": USER}, "message", "exactly one of"),
        ({"type": "generate", "message": {"role": "user"}}, "message.content", "is required"),
        ({"type": "generate", "prompt": "x", "temprature": 1}, "temprature", "Unrecognized"),
        ({"type": "generate", "prompt": "x", "id": 7}, "id", "string"),
        ({"type": "generate", "prompt": "x", "id": "x" * 129}, "id", "128"),
        ({"type": "generate", "prompt": "x", "tools": [{"name": "f"}]}, "tools", "messages alone"),
        ({"type": "cancel", "prompt": "x"}, "prompt", "Unrecognized"),
    ],
)
async def test_a_bad_frame_harms_nothing(
    edge: EdgeProcess, worker: ScriptedWorker, frame: Any, param: str | None, words: str
) -> None:
    async with connected(edge) as client:
        event = await client.refused(frame)
        assert (event["status"], event["id"]) == (400, None)
        assert event["error"]["type"] == "invalid_request_error"
        assert event["error"]["param"] == param
        assert words in event["error"]["message"]
        assert worker.calls == []
        assert await client.said(prompt="x") == "Hello wörld"


async def test_the_workers_failures_are_those_of_http(
    edge: EdgeProcess, worker: ScriptedWorker, http: httpx.AsyncClient
) -> None:
    async with connected(edge) as client:
        for script in (
            failing(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", retry_in(2), error_info("X")),
            failing(grpc.StatusCode.INVALID_ARGUMENT, "no", bad_field("stopping.max_tokens")),
            failing(grpc.StatusCode.NOT_FOUND, "no such model", error_info("MODEL_NOT_FOUND")),
            failing(grpc.StatusCode.INTERNAL, "internals"),
        ):
            worker.script = script
            answer = await http.post("/v1/streams", json={"prompt": "x"})
            event = await client.refused({"type": "generate", "id": "a", "prompt": "x"})
            assert {"error": event["error"]} == answer.json()
            assert (event["status"], event["id"]) == (answer.status_code, "a")
            wait = answer.headers.get("retry-after-ms")
            assert event.get("retry_after_ms") == (None if wait is None else int(wait))


async def test_a_conversation_is_bounded(target: str, worker: ScriptedWorker) -> None:
    worker.script = echo
    async with running_edge(target, max_body_bytes=2048) as edge, connected(edge) as client:
        long = {"role": "user", "content": "x" * 1100}
        assert await client.said(messages=[long]) == "heard 1"
        event = await client.refused({"type": "generate", "message": long})
        assert (event["status"], event["error"]["code"]) == (413, "conversation_too_large")
        assert await client.said(message=USER) == "heard 3"


async def test_a_frame_beyond_the_limit_closes(edge: EdgeProcess, worker: ScriptedWorker) -> None:
    async with connected(edge) as client:
        await client.generate(prompt="x" * SHARED_SETTINGS["max_body_bytes"])  # type: ignore[operator]
        assert await client.closed() == 1009
    assert worker.calls == []


async def test_a_message_of_too_many_pieces_closes(target: str, worker: ScriptedWorker) -> None:
    text = json.dumps({"type": "generate", "prompt": "x"})

    async def pieces(count: int) -> AsyncIterator[str]:
        for start in range(0, len(text), step := -(-len(text) // count)):
            yield text[start : start + step]

    async with running_edge(target, max_socket_fragments=4) as edge, connected(edge) as client:
        await client.socket.send(pieces(3))  # and an empty one at the end
        assert (await client.event())["type"] == "started"
        async with connected(edge) as other:
            with contextlib.suppress(ConnectionClosed):
                await other.socket.send(pieces(4))
            assert await other.closed() == 1009
    assert len(worker.calls) == 1


async def test_a_binary_frame_closes(edge: EdgeProcess, worker: ScriptedWorker) -> None:
    async with connected(edge) as client:
        await client.send(b"{}")
        assert await client.closed() == 1003


async def test_an_idle_socket_is_closed(target: str, worker: ScriptedWorker) -> None:
    worker.script = hang
    async with running_edge(target, socket_idle_seconds=2) as edge, connected(edge) as client:
        await client.generate(prompt="x")
        assert [(await client.event())["type"] for _ in range(2)] == ["started", "delta"]
        async with connected(edge) as idle:
            assert await idle.closed() == 1000
        await client.send({"type": "cancel"})  # one that generates is not idle
        assert (await client.event())["finish_reason"] == "cancelled"


async def test_pings_keep_a_silent_socket_alive(target: str, worker: ScriptedWorker) -> None:
    async with (
        running_edge(target, heartbeat_seconds=0.1) as edge,
        RawClient(edge.port) as client,
    ):
        await client.send(handshake())
        await client.read_until(b"\r\n\r\n\x89\x04")  # a ping of four bytes, which gets no pong
        await client.send(text_frame({"type": "generate", "prompt": "x"}))
        await client.read_until(b'"finish_reason":"stop"')


def handshake() -> bytes:
    return request_bytes(
        PATH,
        method="GET",
        upgrade="websocket",
        connection="Upgrade",
        sec_websocket_version="13",
        sec_websocket_key=base64.b64encode(os.urandom(16)).decode(),
    ).replace(b"content-length: 0\r\n", b"")


def text_frame(value: Any) -> bytes:
    return Frame(Opcode.TEXT, json.dumps(value).encode()).serialize(mask=True)


@pytest.mark.parametrize("manner", ["close", "abort", "half-close"])
@pytest.mark.parametrize("phase", ["queued", "decode"])
async def test_whoever_leaves_ends_the_generation(
    edge: EdgeProcess, worker: ScriptedWorker, manner: str, phase: str
) -> None:
    worker.script = hang if phase == "decode" else ScriptedCall.hang
    async with RawClient(edge.port) as client:
        await client.send(handshake())
        await client.read_until(b"\r\n\r\n")
        await client.send(text_frame({"type": "generate", "prompt": "x"}))
        async with asyncio.timeout(PATIENCE):
            while not worker.calls:
                await asyncio.sleep(0.01)
        if phase == "decode":
            await client.read_until(b"more")
        if manner == "close":
            await client.send(Frame(Opcode.CLOSE, b"\x03\xe8").serialize(mask=True))
        elif manner == "abort":
            client.reset()
        else:
            client.socket.shutdown(1)
        assert (await ended(worker)).was_cancelled


CLIENT = """
import asyncio, sys
from websockets.asyncio.client import connect
async def main():
    async with connect(sys.argv[1], proxy=None) as socket:
        await socket.send('{"type": "generate", "prompt": "x"}')
        await socket.recv()
        print("begun", flush=True)
        await asyncio.sleep(3600)
asyncio.run(main())
"""


async def test_a_client_that_is_killed_ends_its_generation(
    edge: EdgeProcess, worker: ScriptedWorker
) -> None:
    worker.script = hang
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CLIENT, url(edge), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(PATIENCE):
            assert await process.stdout.readline() == b"begun\n"
    finally:
        process.kill()
        await process.wait()
    assert (await ended(worker)).was_cancelled


async def test_a_reader_that_does_not_read_stalls_itself_alone_and_is_dropped(
    target: str, worker: ScriptedWorker
) -> None:
    written = 0

    async def script(call: ScriptedCall) -> None:
        nonlocal written
        if call.request.prompt.text == "short":
            await call.started()
            await call.finished()
            return
        await call.started()
        while True:
            await call.delta("x" * 1000)
            written += 1000

    worker.script = script
    async with (
        running_edge(target, send_timeout_seconds=2) as edge,
        RawClient(edge.port, receive_buffer=4096) as client,
    ):
        await client.send(handshake())
        await client.read_until(b"\r\n\r\n")
        await client.send(text_frame({"type": "generate", "prompt": "long"}))
        await client.read_until(b"xxx")
        async with connected(edge) as other:
            await other.said(prompt="short")
        assert (await ended(worker, 0)).was_cancelled
        await edge.line(lambda line: line.get("finish") == "send_timeout")
    assert written < 1_000_000, "back-pressure must reach the worker"


async def test_pings_of_a_reader_that_does_not_read_are_not_answered_without_end(
    edge: EdgeProcess, worker: ScriptedWorker
) -> None:
    async def script(call: ScriptedCall) -> None:
        await call.started()
        while True:
            await call.delta("x" * 1000)

    worker.script = script
    ping = Frame(Opcode.PING, b"x" * 125).serialize(mask=True)
    async with RawClient(edge.port, receive_buffer=4096) as client:
        await client.send(handshake())
        await client.read_until(b"\r\n\r\n")
        await client.send(text_frame({"type": "generate", "prompt": "x"}))
        await client.read_until(b"xxx")
        await client.send(ping * 10_000)  # all of it is taken, for the edge reads on
    assert (await ended(worker)).was_cancelled


async def test_shutdown_closes_idle_sockets_at_once_and_others_at_their_end(
    target: str, worker: ScriptedWorker
) -> None:
    go_on = asyncio.Event()

    async def script(call: ScriptedCall) -> None:
        await call.started()
        await go_on.wait()
        await call.delta("the end")
        await call.finished()

    worker.script = script
    async with (
        running_edge(target, drain_seconds=PATIENCE) as edge,
        connected(edge) as idle,
        connected(edge) as busy,
    ):
        await busy.generate(prompt="x")
        assert (await busy.event())["type"] == "started"
        edge.process.send_signal(signal.SIGTERM)
        assert await idle.closed() == 1001
        with pytest.raises(InvalidStatus) as refused:
            async with connected(edge):
                pass
        assert refused.value.response.status_code == 503
        go_on.set()
        assert [event["type"] for event in await busy.events()] == ["delta", "finished"]
        assert await busy.closed() == 1001
        assert await edge.wait() == 0


async def test_shutdown_tells_a_generation_that_stays(target: str, worker: ScriptedWorker) -> None:
    worker.script = hang
    async with running_edge(target, drain_seconds=0.2) as edge, connected(edge) as client:
        await client.generate(id="a", prompt="x")
        edge.process.send_signal(signal.SIGTERM)
        *_, last = await client.events()
        assert (last["type"], last["status"], last["id"]) == ("failed", 503, "a")
        assert await client.closed() == 1001
        assert await edge.wait() == 0


@pytest.mark.parametrize(
    ("origin", "is_let_in"),
    [
        (None, True),
        ("https://a.example", True),
        ("http://127.0.0.1:{port}", True),
        ("https://b.example", False),
        ("http://127.0.0.1", False),
        ("null", False),
        ("http://[", False),
    ],
)
async def test_pages_from_elsewhere_open_nothing(
    edge: EdgeProcess, worker: ScriptedWorker, origin: str | None, is_let_in: bool
) -> None:
    given = None if origin is None else origin.replace("{port}", str(edge.port))
    if is_let_in:
        async with connected(edge, origin=given) as client:
            assert await client.said(prompt="x")
        return
    with pytest.raises(InvalidStatus) as refused:
        async with connected(edge, origin=given):
            pass
    response = refused.value.response
    assert response.status_code == 403
    assert json.loads(response.body or b"")["error"]["code"] == "origin_not_allowed"


async def test_a_plain_get_is_told_what_this_is(http: httpx.AsyncClient) -> None:
    response = await http.get(PATH)
    assert response.status_code == 426
    assert response.headers["upgrade"] == "websocket"
    assert response.json()["error"]["type"] == "invalid_request_error"


async def test_elsewhere_the_offer_is_declined(edge: EdgeProcess, worker: ScriptedWorker) -> None:
    async with RawClient(edge.port) as client:
        await client.send(handshake().replace(PATH.encode(), b"/health"))
        assert (await client.read_until(b"ok")).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("change", "status"),
    [
        (lambda raw: raw.replace(b"sec-websocket-key", b"x-key"), b"400"),
        (lambda raw: raw.replace(b"version: 13", b"version: 8"), b"400"),
        (lambda raw: raw.replace(b"host: ", b"x-long: " + b"x" * 9000 + b"\r\nhost: "), b"431"),
        (lambda raw: raw.replace(b"host: ", b"x: y\r\n" * 200 + b"host: "), b"431"),
        (lambda raw: raw + text_frame({"type": "cancel"}), b"400"),
    ],
)
async def test_a_wrong_handshake_is_answered_and_closed(
    edge: EdgeProcess, worker: ScriptedWorker, change: Any, status: bytes
) -> None:
    async with RawClient(edge.port) as client:
        await client.send(change(handshake()))
        assert (await client.read_to_end()).startswith(b"HTTP/1.1 " + status)


async def test_sockets_count_as_connections(target: str, worker: ScriptedWorker) -> None:
    async with running_edge(target, max_connections=2) as edge:
        async with connected(edge) as first, connected(edge):
            with pytest.raises(InvalidStatus) as refused:
                async with connected(edge):
                    pass
            assert refused.value.response.status_code == 429
            assert await first.said(prompt="x")
        async with asyncio.timeout(PATIENCE):
            while True:  # until the server has seen them leave
                with contextlib.suppress(InvalidStatus):
                    async with connected(edge) as next_one:
                        assert await next_one.said(prompt="x")
                        break


async def test_the_handshake_has_to_come_in_time(target: str, worker: ScriptedWorker) -> None:
    async with running_edge(target, read_timeout_seconds=2) as edge, connected(edge) as client:
        async with RawClient(edge.port) as late:
            await late.send(handshake()[:-2])
            assert (await late.read_to_end()).startswith(b"HTTP/1.1 408")
        assert await client.said(prompt="x")  # which the limit did not end meanwhile
