"""An edge process before some scripted workers."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import httpx

from tests.edge.edge_process import PATIENCE, EdgeProcess, running_edge
from tests.edge.scripted_worker import ScriptedWorker, start_server

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


class Pool:
    """An edge before some scripted workers."""

    def __init__(self, edge: EdgeProcess, workers: list[ScriptedWorker], http: httpx.AsyncClient):
        self.edge, self.workers, self.http = edge, workers, http

    async def ask(self) -> httpx.Response:
        return await self.http.post("/v1/chat/completions", json=CHAT)

    def counts(self) -> list[int]:
        return [len(worker.calls) for worker in self.workers]


@contextlib.asynccontextmanager
async def running_pool(count: int, **settings: object) -> AsyncIterator[Pool]:
    async with contextlib.AsyncExitStack() as stack:
        workers = [ScriptedWorker() for _ in range(count)]
        ports = []
        for worker in workers:
            server, port = await start_server(worker, "127.0.0.1:0")
            stack.push_async_callback(server.stop, 0)
            ports.append(port)
        target = ",".join(f"127.0.0.1:{port}" for port in ports)
        edge = await stack.enter_async_context(running_edge(target, **settings))
        http = await stack.enter_async_context(
            httpx.AsyncClient(base_url=edge.url, timeout=PATIENCE, trust_env=False)
        )
        for port in ports:
            await serving(edge, f"127.0.0.1:{port}")
        yield Pool(edge, workers, http)


async def serving(edge: EdgeProcess, target: str, is_serving: bool = True, since: int = 0) -> None:
    await edge.line(
        lambda line: line.get("target") == target and line.get("serving") is is_serving, since
    )


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.005)
