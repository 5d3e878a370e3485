"""What a stranger may ask of the HTTP server: each limit has a setting, and each is refused by name."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from starlette.requests import Request
from websockets.asyncio.client import connect

from edge.command_line import read_settings
from edge.connection_limits import MAX_SURPLUS
from edge.dialects.dialect import PromptLimits
from edge.errors import EdgeError
from edge.request_body import read_parsed
from edge.settings import EdgeSettings
from tests.edge.edge_process import PATIENCE, EdgeProcess, running_edge
from tests.edge.raw_http import RawClient, request_bytes
from tests.edge.scripted_worker import ScriptedCall, ScriptedWorker

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
MODELS = request_bytes("/v1/models", method="GET")
SMALL = {
    "max_header_bytes": 2048,
    "max_headers": 10,
    "max_url_bytes": 300,
    "max_query_parameters": 5,
    "max_body_bytes": 1024,
    "max_json_depth": 5,
    "max_json_values": 20,
    "max_prompts": 2,
}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def strict_edge(shared_worker: tuple[ScriptedWorker, str]) -> AsyncIterator[EdgeProcess]:
    async with running_edge(shared_worker[1], **SMALL) as edge:
        yield edge


def get(path: str, *headers: str) -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", "host: edge", *headers, "", ""]).encode()


MANY = [f"x-{number}: 1" for number in range(9)]
NEST = request_bytes("/v1/completions", {"prompt": "x", "a": {"b": {"c": {"d": {"e": {}}}}}})
TEXTS = request_bytes("/v1/completions", {"prompt": ["x"] * 3})
BODY = request_bytes("/v1/completions", {"prompt": "x" * 1100})
CASES: dict[str, tuple[bytes, bytes, bytes]] = {
    # each with what is just allowed, what is one too many, and its refusal
    "headers": (
        get("/v1/models", *MANY),
        get("/v1/models", *MANY, "x-9: 1"),
        b"431 Request Header Fields Too Large",
    ),
    "header bytes": (
        get("/v1/models", "x: " + "y" * 1950),
        get("/v1/models", "x: " + "y" * 2048),
        b"431 Request Header Fields Too Large",
    ),
    "URL": (
        get("/v1/models?" + "x" * 289),
        get("/v1/models?" + "x" * 290),
        # named as the version of Python names it
        b"414 ",
    ),
    "parameters": (
        get("/v1/models?" + "&".join("abcde")),
        get("/v1/models?" + "&".join("abcdef")),
        b"400 Bad Request",
    ),
    "body": (request_bytes("/v1/completions", {"prompt": "x"}), BODY, b"413 "),
    "depth": (
        request_bytes("/v1/completions", {"prompt": "x", "logit_bias": {}}),
        NEST,
        b"400 Bad Request",
    ),
    "values": (
        request_bytes("/v1/completions", {"prompt": "x", "stop": ["y"] * 15}),
        request_bytes("/v1/completions", {"prompt": "x", "stop": ["y"] * 16}),
        b"400 Bad Request",
    ),
    "prompts": (
        request_bytes("/v1/completions", {"prompt": ["x"] * 2}),
        TEXTS,
        b"400 Bad Request",
    ),
}


@pytest.mark.parametrize("limit", CASES)
async def test_one_too_many_is_refused(
    strict_edge: EdgeProcess, worker: ScriptedWorker, limit: str
) -> None:
    fine, refused, status = CASES[limit]
    async with RawClient(strict_edge.port) as client:
        await client.send(fine)
        assert (await client.read_until(b"}")).startswith(b"HTTP/1.1 200")
    async with RawClient(strict_edge.port) as client:
        await client.send(refused)
        answer = await client.read_until(b'"code"')
        assert answer.startswith(b"HTTP/1.1 " + status)
        assert b'"type":"invalid_request_error"' in answer
    assert len(worker.calls) <= 2


@pytest.mark.parametrize(
    "name", [*SMALL, "max_connections", "max_connections_per_address", "read_timeout_seconds"]
)
def test_every_limit_can_be_set(name: str) -> None:
    flag = "--" + name.replace("_", "-")
    value = SMALL.get(name, 7)
    assert getattr(read_settings([f"{flag}={value}"]), name) == value
    with pytest.raises(SystemExit):
        read_settings([f"{flag}=0"])


class Upload:
    """A body of one field, whose last byte may have to wait for a word."""

    def __init__(self, size: int, *, is_slow: bool = False) -> None:
        data = b'{"prompt": "%b"}' % (b"x" * size)
        self._pieces = [data[:-1], data[-1:]]
        self.is_waiting, self.may_end = asyncio.Event(), asyncio.Event()
        if not is_slow:
            self.may_end.set()

    async def read(self, limits: PromptLimits) -> int:
        """The field's length."""
        request = Request({"type": "http", "headers": []}, self._receive)
        return await read_parsed(request, limits, lambda body: len(body["prompt"]))

    async def _receive(self) -> dict[str, Any]:
        if len(self._pieces) == 1:
            self.is_waiting.set()
            await self.may_end.wait()
        piece = self._pieces.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(self._pieces)}


async def test_large_bodies_share_a_limit() -> None:
    limits = PromptLimits.of(EdgeSettings(max_bodies_bytes=150_000))
    slow = Upload(100_000, is_slow=True)
    reading = asyncio.create_task(slow.read(limits))
    await slow.is_waiting.wait()
    for _ in range(2):  # who is refused takes no room
        with pytest.raises(EdgeError, match="Too many large request bodies") as refused:
            await Upload(100_000).read(limits)
        assert refused.value.status == 429
        assert {"retry-after", "connection"} <= refused.value.http_headers().keys()
    assert await Upload(1).read(limits) == 1
    slow.may_end.set()
    assert await reading == 100_000
    assert await Upload(100_000).read(limits) == 100_000

    left = Upload(100_000, is_slow=True)
    reading = asyncio.create_task(left.read(limits))
    await left.is_waiting.wait()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert await Upload(100_000).read(limits) == 100_000


class ClientFrom(RawClient):
    """A connection from another address of this machine."""

    def __init__(self, port: int, address: str) -> None:
        super().__init__(port)
        self.socket.bind((address, 0))


async def test_one_address_does_not_take_all_connections(
    target: str, worker: ScriptedWorker
) -> None:
    async def hanging(call: ScriptedCall) -> None:
        await call.started()
        await call.hang()

    worker.script = hanging
    stream = request_bytes("/v1/chat/completions", CHAT | {"stream": True})
    async with (
        running_edge(target, max_connections_per_address=2) as edge,
        RawClient(edge.port) as first,
        RawClient(edge.port) as second,
    ):
        for client in (first, second):
            await client.send(stream)
            await client.read_until(b"assistant")
        async with RawClient(edge.port) as third, RawClient(edge.port) as fourth:
            await third.send(request_bytes("/health", method="GET"))
            assert (await third.read_until(b"status")).startswith(b"HTTP/1.1 200")
            await fourth.send(MODELS)
            assert (await fourth.read_to_end()).startswith(b"HTTP/1.1 429")
            async with RawClient(edge.port) as fifth:
                # the fourth has been closed: four are open again, which is not yet beyond twice as many
                await fifth.send(MODELS)
                assert (await fifth.read_to_end()).startswith(b"HTTP/1.1 429")
                silent = [RawClient(edge.port) for _ in range(6)]
                closed = 0
                for client in silent:
                    await client.__aenter__()
                    await client.send(MODELS)
                for client in silent:
                    try:
                        answer = await client.read_to_end()
                    except ConnectionResetError:
                        answer = b""
                    closed += answer == b""
                    assert answer == b"" or answer.startswith(b"HTTP/1.1 429")
                    client.socket.close()
                assert closed > 0
        async with ClientFrom(edge.port, "127.0.0.2") as other:
            await other.send(MODELS)
            assert (await other.read_until(b"list")).startswith(b"HTTP/1.1 200")
        assert not any(call.was_cancelled for call in worker.calls)
        first.socket.close()
        async with asyncio.timeout(PATIENCE):
            await worker.calls[0].ended.wait()
            while True:  # until the edge has seen that the others are gone as well
                async with RawClient(edge.port) as later:
                    await later.send(MODELS)
                    if (await later.read_until(b"\r\n")).startswith(b"HTTP/1.1 200"):
                        break


async def test_connections_far_beyond_the_limit_are_closed(
    target: str, worker: ScriptedWorker
) -> None:
    """They would take the files that the edge needs to reach its workers."""
    async with (
        running_edge(target, max_connections=1) as edge,
        contextlib.AsyncExitStack() as stack,
    ):
        clients = [RawClient(edge.port) for _ in range(1 + MAX_SURPLUS + 3)]
        for client in clients:
            await stack.enter_async_context(client)
        for client in clients[-3:]:
            with contextlib.suppress(ConnectionResetError):
                assert await client.read_to_end() == b""
        await clients[-4].send(MODELS)
        assert (await clients[-4].read_to_end()).startswith(b"HTTP/1.1 429")
        await clients[0].send(MODELS)
        assert (await clients[0].read_until(b"list")).startswith(b"HTTP/1.1 200")


async def test_a_socket_counts_until_it_is_closed(target: str, worker: ScriptedWorker) -> None:
    async with running_edge(target, max_connections_per_address=1) as edge:

        async def status() -> bytes:
            async with RawClient(edge.port) as client:
                await client.send(MODELS)
                return (await client.read_until(b"\r\n"))[9:12]

        for _ in range(3):
            async with connect(f"ws://127.0.0.1:{edge.port}/v1/ws", proxy=None):
                assert await status() == b"429"
            async with asyncio.timeout(PATIENCE):
                while await status() != b"200":
                    await asyncio.sleep(0.01)


async def dribble(client: RawClient, data: bytes) -> bytes:
    """Sends a byte now and then until the server has had enough; what it answered."""
    answer = asyncio.ensure_future(client.read_to_end())
    for byte in data:
        await asyncio.wait({answer}, timeout=0.05)
        if answer.done():
            return answer.result()
        with contextlib.suppress(
            ConnectionError
        ):  # it is closing; what it said is still to be read
            await client.send(bytes([byte]))
    raise AssertionError("everything was taken")


# Requests that go on and on, by how they begin, and what the client is told when its time is over.
ENDLESS = {
    "head": (b"GET /", b"HTTP/1.1 408 "),
    "header": (b"GET /v1/models HTTP/1.1\r\nhost: edge\r\nx: ", b"HTTP/1.1 408 "),
    "body": (
        b"POST /v1/completions HTTP/1.1\r\nhost: edge\r\ncontent-length: 20000\r\n\r\n",
        b"HTTP/1.1 408 ",
    ),
    "chunks": (
        b"POST /v1/completions HTTP/1.1\r\nhost: edge\r\ntransfer-encoding: chunked\r\n\r\n2710\r\n",
        b"HTTP/1.1 408 ",
    ),
    "nothing": (b"", b""),
}


async def test_a_request_that_never_ends_is_cut_off(
    slow_edge: EdgeProcess, worker: ScriptedWorker
) -> None:
    async def answer_to(begin: bytes) -> bytes:
        async with RawClient(slow_edge.port) as client:
            if not begin:
                return await client.read_to_end()
            await client.send(begin)
            return await dribble(client, b"x" * 10_000)

    answers = await asyncio.gather(*(answer_to(begin) for begin, _ in ENDLESS.values()))
    for part, answer in zip(ENDLESS, answers, strict=True):
        assert answer[: len(b"HTTP/1.1 408 ")] == ENDLESS[part][1], part
    assert worker.calls == []


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def slow_edge(shared_worker: tuple[ScriptedWorker, str]) -> AsyncIterator[EdgeProcess]:
    async with running_edge(shared_worker[1], read_timeout_seconds=2) as edge:
        yield edge


async def test_dribbling_clients_hold_up_nobody(
    slow_edge: EdgeProcess, worker: ScriptedWorker
) -> None:
    dribbling = [RawClient(slow_edge.port) for _ in range(50)]
    try:
        for client in dribbling:
            await client.__aenter__()
            await client.send(b"POST /v1/completions HTTP/1.1\r\nhost: ed")
        async with RawClient(slow_edge.port) as client:
            await client.send(MODELS)
            assert (await client.read_until(b"list")).startswith(b"HTTP/1.1 200")
        for client in dribbling:
            assert (await client.read_to_end()).startswith(b"HTTP/1.1 408 ")
    finally:
        for client in dribbling:
            client.socket.close()


async def test_a_pipelined_dribble_is_cut_off_too(
    slow_edge: EdgeProcess, worker: ScriptedWorker
) -> None:
    async with RawClient(slow_edge.port) as client:
        client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await client.send(MODELS)
        await client.read_until(b"list")
        client.received = b""
        answer = await dribble(client, b"GET /v1/models HTTP/1.1\r\n" + b"x" * 10_000)
        assert answer.startswith(b"HTTP/1.1 408 ")
