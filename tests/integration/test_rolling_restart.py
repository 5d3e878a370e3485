"""All processes are restarted one after the other under load, and no client notices."""

from __future__ import annotations

import asyncio
import json
import signal
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx
import pytest

from tests.edge.sse import parse
from tests.integration.several_workers import (
    RestartableProcess,
    WorkerProcess,
    running_workers,
    wait_until,
)
from tests.integration.stack import PATIENCE, LoggedProcess

SCRIPTED = "inference_worker.scripted_model"
# A text that does not come back to where it was: what is lost or told twice shows.
SCRIPT = " ".join(str(number) for number in range(2000))
SCRIPTED_FLAGS = {"text": SCRIPT, "step_milliseconds": 20}
LONG, SHORT = 120, 10  # tokens; a long answer takes more than two seconds
MESSAGES = [{"role": "user", "content": "Count."}]


class EdgeProcess(RestartableProcess):
    """An edge."""

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def wait_ready(self) -> None:
        self.log.wait_for_line(event="edge listening")
        wait_until(lambda: self.ready_status() == 200)

    def ready_status(self) -> int:
        return httpx.get(f"{self.url}/ready", trust_env=False, timeout=PATIENCE).status_code


@contextmanager
def running_edges(count: int, workers: Sequence[WorkerProcess]) -> Iterator[list[EdgeProcess]]:
    """Start edges before the workers, and wait until they are ready; at the end none is left."""
    targets = ",".join(worker.address for worker in workers)
    # refuses only when it has read what had been sent to it before it was told to stop
    flags: dict[str, object] = {"host": "127.0.0.1", "worker": targets, "unready_seconds": 0.2}
    edges = [EdgeProcess("edge", flags) for _ in range(count)]
    try:
        for edge in edges:
            edge.start()
        for edge in edges:
            edge.wait_ready()
        yield edges
    finally:
        for edge in edges:
            edge.kill()


class Balancer:
    """What stands before the edges: gives each request to the next of them, unless that was taken out."""

    def __init__(self, edges: Sequence[EdgeProcess]) -> None:
        self._edges = list(edges)
        self._sending: Counter[int] = Counter()  # requests of which not all has been sent, by port
        self.running: Counter[int] = (
            Counter()
        )  # requests that were sent and have not ended, by port

    @asynccontextmanager
    async def send(
        self, http: httpx.AsyncClient, path: str, body: dict[str, Any]
    ) -> AsyncIterator[httpx.Response]:
        """Send a request, and have its response while the block runs."""
        self._edges.append(edge := self._edges.pop(0))
        port = edge.port
        self._sending[port] += 1

        async def trace(event: str, info: object) -> None:
            if event == "http11.send_request_body.complete":
                self._sending[port] -= 1
                self.running[port] += 1

        sent = http.stream("POST", edge.url + path, json=body, extensions={"trace": trace})
        async with sent as response:
            yield response
        self.running[port] -= 1

    async def take_out(self, edge: EdgeProcess) -> None:
        """Send it nothing from now on; what was on its way has been sent."""
        self._edges.remove(edge)
        while self._sending[edge.port]:
            await asyncio.sleep(0.001)

    def put_in(self, edge: EdgeProcess) -> None:
        self._edges.append(edge)


@dataclass(frozen=True)
class Request:
    """What a client asks for, and how it reads the text of the answer."""

    dialect: str
    max_tokens: int

    @property
    def path(self) -> str:
        return {
            "native": "/v1/streams",
            "chat": "/v1/chat/completions",
            "whole": "/v1/completions",
            "anthropic": "/v1/messages",
        }[self.dialect]

    @property
    def body(self) -> dict[str, Any]:
        limit = {"max_tokens": self.max_tokens}
        match self.dialect:
            case "native":
                return {"prompt": "Count.", **limit}
            case "whole":
                return {"model": "default", "prompt": "Count.", **limit}
            case _:
                return {"model": "default", "messages": MESSAGES, "stream": True, **limit}

    def text_of(self, content: bytes) -> str:
        """The text of an answer that is whole and ended for its length."""
        if self.dialect == "whole":
            (choice,) = json.loads(content)["choices"]
            assert choice["finish_reason"] == "length"
            return str(choice["text"])
        events = parse(content).events
        match self.dialect:
            case "native":
                assert events[-1].json()["finish_reason"] == "length"
                return "".join(event.json()["text"] for event in events if event.type == "delta")
            case "chat":
                assert events[-1].data == "[DONE]"
                choices = [choice for event in events[:-1] for choice in event.json()["choices"]]
                assert choices[-1]["finish_reason"] == "length"
                return "".join(choice["delta"].get("content") or "" for choice in choices)
            case _:
                assert events[-1].type == "message_stop"
                deltas = [event for event in events if event.type == "content_block_delta"]
                return "".join(event.json()["delta"]["text"] for event in deltas)


REQUESTS = [
    *(Request(dialect, LONG) for dialect in ("native", "chat", "whole", "anthropic") * 2),
    Request("native", SHORT),
]


@dataclass
class Clients:
    """Each asks again and again, whatever happens to the processes."""

    balancer: Balancer
    right: dict[int, str]  # text by max_tokens
    is_over: bool = False

    async def ask(self, http: httpx.AsyncClient, request: Request) -> None:
        """Any failure, and any difference, is raised."""
        async with self.balancer.send(http, request.path, request.body) as response:
            content = await response.aread()
        assert response.status_code == 200, content
        assert request.text_of(content) == self.right[request.max_tokens]

    async def ask_forever(self, request: Request) -> None:
        async with httpx.AsyncClient(timeout=PATIENCE, trust_env=False) as http:
            while not self.is_over:
                await self.ask(http, request)

    @asynccontextmanager
    async def asking(self) -> AsyncIterator[None]:
        """Clients ask while the block runs, and every answer that has begun is read to its end."""
        async with asyncio.TaskGroup() as tasks:
            for request in REQUESTS:
                tasks.create_task(self.ask_forever(request))
            yield
            self.is_over = True


def right_text(edge: EdgeProcess, max_tokens: int) -> str:
    """What is said when nothing happens."""
    request = Request("whole", max_tokens)
    response = httpx.post(
        edge.url + request.path, json=request.body, timeout=PATIENCE, trust_env=False
    )
    text = request.text_of(response.content)
    assert SCRIPT.startswith(text.strip())
    assert len(text) >= max_tokens
    return text


def ended_after(process: LoggedProcess, event: str) -> list[dict[str, Any]]:
    """What the process logged, after this event, of generations that ended."""
    events = [line["event"] for line in process.lines]
    later = process.lines[events.index(event) :]
    return [line for line in later if line["event"] == "request"]


def has_some(worker: WorkerProcess) -> bool:
    """Whether some generations run there."""
    return worker.load().running > 1


async def restart(process: WorkerProcess | EdgeProcess) -> LoggedProcess:
    """As an orchestrator does: SIGTERM, and the next one when it is gone, until that is ready. Gives the old one."""
    old = process.log
    process.send(signal.SIGTERM)
    assert await asyncio.to_thread(process.wait) == 0
    process.start()
    await asyncio.to_thread(process.wait_ready)
    return old


@pytest.mark.timeout(300)  # eight processes start, beside clients that do not wait for them
async def test_a_rolling_restart_fails_no_request() -> None:
    # those of the first worker go on at the other one, those of the second come to their end
    flags = [{**SCRIPTED_FLAGS, "drain_seconds": seconds} for seconds in (0, 30)]
    with running_workers(flags, SCRIPTED) as workers, running_edges(2, workers) as edges:
        right = {length: right_text(edges[0], length) for length in (LONG, SHORT)}
        balancer = Balancer(edges)
        clients = Clients(balancer, right)
        old_workers, old_edges = [], []
        async with clients.asking():
            for worker in workers:
                await asyncio.to_thread(wait_until, partial(has_some, worker))
                old_workers.append(await restart(worker))
            for edge in edges:
                while balancer.running[edge.port] < 2:
                    await asyncio.sleep(0.001)
                await balancer.take_out(edge)
                old_edges.append(await restart(edge))
                balancer.put_in(edge)
        losses = [
            line for log in old_edges for line in log.lines if "lost its worker" in line["event"]
        ]
        assert {(loss["target"], loss["outcome"]) for loss in losses} == {
            (workers[0].address, "continued")
        }
        assert ended_after(old_workers[1], "draining")
        for log in old_edges:
            assert ended_after(log, "edge stopping")
