"""Workers that die, stop answering or drain while a real model streams: the clients get what they would have got."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import AsyncExitStack
from typing import Any

import grpc
import httpx
import pytest

from protos.sluice.v1 import generation_pb2 as pb
from protos.sluice.v1.generation_pb2_grpc import GenerationServiceStub
from tests.edge.sse import Event, parse
from tests.integration.several_workers import (
    Cluster,
    WorkerProcess,
    running_cluster,
    wait_until,
)
from tests.integration.stack import PATIENCE, LoggedProcess
from tests.integration.stream_parts import number_of, read_native

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
STREAMS = 100
PROMPTS = ("Count to 10.", "What is streaming?", "Say hello.", "Repeat: é 漢字", "a")


def body_of(number: int) -> tuple[str, dict[str, Any]]:
    """One of 20 requests, by path and body: four dialects and shapes, five prompts."""
    prompt = PROMPTS[number % 5]
    sampling: dict[str, Any] = {"seed": number, "temperature": 1.0, "max_tokens": 60}
    more: dict[str, Any]
    match number // 5:
        case 0:
            penalties = {"repetition_penalty": 1.2, "stop": ["\n\n", "zz"]}
            return "/v1/streams", {"prompt": prompt, **sampling, **penalties, "ignore_eos": True}
        case 1:
            messages = [{"role": "user", "content": prompt}]
            fields = {"messages": messages, **sampling, "temperature": 0}
            more = {"logprobs": True, "top_logprobs": 2, "ignore_eos": True}
            return "/v1/chat/completions", {"model": "default", **fields, **more}
        case 2:
            more = {"n": 2, "logprobs": 1, "echo": True, "ignore_eos": True}
            return "/v1/completions", {"model": "default", "prompt": prompt, **sampling, **more}
        case _:
            messages = [{"role": "user", "content": f"What is the weather in {prompt}?"}]
            choice = ("auto", "required")[number % 2]
            more = {"messages": messages, "tools": [TOOL], "tool_choice": choice}
            return "/v1/chat/completions", {"model": "default", **more, **sampling}


def read_openai(events: list[Event]) -> dict[str, Any]:
    """As above, for chats and completions."""
    assert events[-1].data == "[DONE]", events[-1]
    chunks = [event.json() for event in events[:-1]]
    assert not any("error" in chunk for chunk in chunks), chunks[-1]
    usage = chunks[-1]["usage"]
    joined: dict[int, dict[str, Any]] = {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        one = joined.setdefault(choice["index"], {"text": "", "tokens": [], "calls": {}})
        delta = choice.get("delta", {})
        one["text"] += delta.get("content") or choice.get("text") or ""
        for call in delta.get("tool_calls", []):
            name, arguments = one["calls"].get(call["index"], (None, ""))
            name = call["function"].get("name") or name
            one["calls"][call["index"]] = name, arguments + call["function"].get("arguments", "")
        logprobs = choice.get("logprobs") or {}
        one["tokens"] += [entry["token"] for entry in logprobs.get("content") or []]
        one["tokens"] += logprobs.get("tokens") or []
        one["reason"] = choice["finish_reason"] or one.get("reason")
    return {"choices": joined, "completion_tokens": usage["completion_tokens"]}


async def generate(
    http: httpx.AsyncClient, number: int, names: dict[str, str] | None = None
) -> dict[str, Any]:
    """With `names` a native stream is kept, and its name added to them under its request's id."""
    path, body = body_of(number)
    if names is not None and path == "/v1/streams":
        body["resume_window"] = 300
    if path != "/v1/streams":
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    response = await http.post(path, json=body)
    assert response.status_code == 200, response.text
    events = parse(response.content).events
    if names is not None and "resume_window" in body:
        names[events[0].json()["request_id"]] = events[0].last_event_id.partition("-")[0]
    return read_native(events) if path == "/v1/streams" else read_openai(events)


async def generate_all(
    cluster: Cluster,
    numbers: list[int],
    when_running: Any = None,
    names: dict[str, str] | None = None,
) -> list[dict[str, Any]]:
    """All at once; `when_running` is called once the first worker has begun to generate."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=cluster.url, timeout=PATIENCE, limits=limits, trust_env=False
    ) as http:
        before = cluster.workers[0].load().generated_tokens
        tasks = [asyncio.create_task(generate(http, number, names)) for number in numbers]

        def is_busy() -> bool:
            load = cluster.workers[0].load()
            return load.running > 10 and load.generated_tokens > before + 50

        if when_running is not None:
            await asyncio.to_thread(wait_until, is_busy)
            when_running()
        return await asyncio.gather(*tasks)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    flags = {"deterministic": True, "drain_seconds": 0, "max_running": 64}
    with running_cluster(2, flags, {"failover_seconds": 60}) as running:
        yield running


@pytest.fixture(scope="module")
def uncut(cluster: Cluster) -> list[dict[str, Any]]:
    """What each of the requests gets when nothing happens."""
    return asyncio.run(generate_all(cluster, list(range(20))))


def is_kept(worker: WorkerProcess, resume_id: str) -> bool:
    request = pb.GenerateRequest(resume=pb.Resume(resume_id=resume_id, snapshot=True))
    with grpc.insecure_channel(worker.address) as channel:
        try:
            list(GenerationServiceStub(channel).Generate(request, timeout=PATIENCE))
        except grpc.RpcError as error:
            return error.code() is not grpc.StatusCode.NOT_FOUND
        return True


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP])
def test_no_stream_is_harmed_when_its_worker_is(
    cluster: Cluster, uncut: list[dict[str, Any]], number: signal.Signals
) -> None:
    worker, other = cluster.workers
    numbers = [index % 20 for index in range(STREAMS)]
    moved = len(cluster.lines("stream lost its worker"))
    names: dict[str, str] = {}
    answers = asyncio.run(generate_all(cluster, numbers, lambda: worker.send(number), names))
    for index, answer in zip(numbers, answers, strict=True):
        assert answer == uncut[index]
    wait_until(lambda: len(cluster.lines("stream lost its worker")) > moved)
    moves = cluster.lines("stream lost its worker")[moved:]
    assert {line["outcome"] for line in moves} == {"continued"}
    assert {line["target"] for line in moves} == {worker.address}

    if number is signal.SIGSTOP:
        # it comes back and knows of nothing, but is told to end and to forget what went on elsewhere
        worker.send(signal.SIGCONT)
        lost = [names[line["request_id"]] for line in moves if line["request_id"] in names]
        assert lost
        wait_until(lambda: not any(is_kept(worker, name) for name in lost))
        wait_until(lambda: worker.load().requests == 0)
        assert all(is_kept(other, name) for name in lost)
        worker.send(signal.SIGKILL)
    assert worker.wait() == {signal.SIGTERM: 0}.get(number, -signal.SIGKILL)
    cluster.restart(worker)
    asyncio.run(generate_all(cluster, [0, 1]))
    assert worker.load().generated_tokens > 0  # it takes its share again
    assert other.log.process.poll() is None


# Long enough to be cut off twice; each is begun once on either worker.
RESUMED: tuple[dict[str, Any], ...] = (
    {"n": 2, "seed": 5, "temperature": 1.0, "logprobs": 2, "return_token_ids": True},
    {"seed": 8, "temperature": 1.0, "repetition_penalty": 1.2},  # and a stop sequence
)


def stream_body(fields: dict[str, Any]) -> dict[str, Any]:
    more = {"max_tokens": 600, "ignore_eos": True, "resume_window": 60}
    return {"prompt": "What is streaming?", **more, **fields}


def joined(events: list[Event]) -> dict[int, dict[str, Any]]:
    """What the events of the native dialect say together, by choice."""
    choices: dict[int, dict[str, Any]] = {}
    assert [event.type for event in events].count("started") == 1
    numbers = [number_of(event) for event in events]
    assert numbers == sorted(set(numbers))
    for data in (event.json() for event in events[1:]):
        choice = choices.setdefault(
            data["choice_index"], {"text": "", "token_ids": [], "logprobs": [], "tokens": 0}
        )
        assert "error" not in data, data
        if "finish_reason" in data:
            choice["reason"] = data["finish_reason"]
            choice["completion_tokens"] = data.get("usage", {}).get("completion_tokens")
            continue
        choice["text"] += data["text"]
        choice["token_ids"] += data.get("token_ids", [])
        choice["logprobs"] += data.get("logprobs", [])
        choice["tokens"] += data["token_count"]
    return choices


class Cut:
    """A stream of the native dialect whose reader loses one connection after the other."""

    def __init__(self, body: dict[str, Any]) -> None:
        self.body = body
        self.events: list[Event] = []
        self._data = b""

    async def open(self, url: str, stack: AsyncExitStack) -> None:
        """Connects, with the last event's id if there is one, and reads until text has come."""
        headers = {"last-event-id": self.events[-1].last_event_id} if self.events else {}
        http = await stack.enter_async_context(
            httpx.AsyncClient(base_url=url, timeout=PATIENCE, trust_env=False)
        )
        response = await stack.enter_async_context(
            http.stream("POST", "/v1/streams", json=self.body, headers=headers)
        )
        assert response.status_code == 200, await response.aread()
        self._pieces = response.aiter_bytes()
        self._data = b""
        while b"event: delta" not in self._data[: self._data.rfind(b"\n\n") + 2]:
            self._data += await anext(self._pieces)

    def lose(self) -> None:
        """Keeps the events that came whole."""
        self.events += parse(self._data[: self._data.rfind(b"\n\n") + 2]).events

    async def read_to_end(self) -> list[Event]:
        async for piece in self._pieces:
            self._data += piece
        self.events += parse(self._data).events
        return self.events


async def cut_by_edge_and_worker(cluster: Cluster, bodies: list[dict[str, Any]]) -> list[Cut]:
    """Each stream, read through an edge that is killed, then through another one whose worker is killed."""
    cuts = [Cut(body) for body in bodies]
    flags = {"host": "127.0.0.1", "port": 0, "failover_seconds": 60}
    flags["worker"] = ",".join(worker.address for worker in cluster.workers)
    first = LoggedProcess("edge", flags)
    async with AsyncExitStack() as stack:
        port = (await asyncio.to_thread(first.wait_for_line, event="edge listening"))["port"]
        for cut in cuts:
            await cut.open(f"http://127.0.0.1:{port}", stack)
        first.stop(signal.SIGKILL)
        for cut in cuts:
            cut.lose()
        await asyncio.gather(*(cut.open(cluster.url, stack) for cut in cuts))
        cluster.workers[0].send(signal.SIGKILL)
        await asyncio.gather(*(cut.read_to_end() for cut in cuts))
    return cuts


def test_a_resumed_stream_outlives_its_worker_too(cluster: Cluster) -> None:
    def read(body: dict[str, Any], last_event_id: str = "") -> list[Event]:
        headers = {"last-event-id": last_event_id} if last_event_id else {}
        url = f"{cluster.url}/v1/streams"
        response = httpx.post(url, json=body, headers=headers, timeout=PATIENCE)
        assert response.status_code == 200, response.text
        return parse(response.content).events

    bodies = [stream_body(fields) for fields in RESUMED]
    uncut = [joined(read(body)) for body in bodies]
    bodies[1]["stop"] = [uncut[1][0]["text"][-40:-20]]
    uncut[1] = joined(read(bodies[1]))
    assert uncut[1][0]["reason"] == "stop_sequence"

    moved = len(cluster.lines("stream lost its worker"))
    cuts = asyncio.run(cut_by_edge_and_worker(cluster, [b for b in bodies for _ in range(2)]))
    for index, cut in enumerate(cuts):
        assert joined(cut.events) == uncut[index // 2]
    moves = cluster.lines("stream lost its worker")[moved:]
    assert {line["outcome"] for line in moves} == {"continued"}
    assert len(moves) == len(bodies)  # each was once on the worker that was killed

    # what came since it moved is kept where it is now
    by_id = {cut.events[0].json()["request_id"]: cut for cut in cuts}
    for line in moves:
        cut = by_id[line["request_id"]]
        later = [e for e in cut.events if number_of(e) > line["sequence_number"]]
        assert read(cut.body, later[0].last_event_id) == later[1:]

    worker = cluster.workers[0]
    assert worker.wait() == -signal.SIGKILL
    cluster.restart(worker)
