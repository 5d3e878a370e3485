"""One scripted worker and one edge for all tests that can share them."""

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest
import pytest_asyncio

from tests.edge.edge_process import PATIENCE, EdgeProcess, running_edge
from tests.edge.scripted_worker import ScriptedWorker, start_server

# Settings of the shared edge: limits small enough to reach.
SHARED_SETTINGS = {"max_body_bytes": 65536, "max_prompts": 4, "cors_origins": "https://a.example"}


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def shared_worker() -> AsyncIterator[tuple[ScriptedWorker, str]]:
    """A worker and its target."""
    worker = ScriptedWorker()
    server, port = await start_server(worker, "127.0.0.1:0")
    yield worker, f"127.0.0.1:{port}"
    await server.stop(0)


@pytest_asyncio.fixture(loop_scope="session")
async def worker(shared_worker: tuple[ScriptedWorker, str]) -> AsyncIterator[ScriptedWorker]:
    """The shared worker, fresh; no call of a test lives on in the next one."""
    shared_worker[0].reset()
    yield shared_worker[0]
    async with asyncio.timeout(PATIENCE):
        for call in shared_worker[0].calls:
            await call.ended.wait()
    shared_worker[0].reset()


@pytest.fixture
def target(shared_worker: tuple[ScriptedWorker, str], worker: ScriptedWorker) -> str:
    """The shared worker's gRPC target."""
    return shared_worker[1]


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def shared_edge(shared_worker: tuple[ScriptedWorker, str]) -> AsyncIterator[EdgeProcess]:
    """An edge before the shared worker."""
    async with running_edge(shared_worker[1], **SHARED_SETTINGS) as edge:
        yield edge


@pytest.fixture
def edge(shared_edge: EdgeProcess, worker: ScriptedWorker) -> EdgeProcess:
    """The shared edge, before a fresh worker; its log has lines of this test alone, but for what came late."""
    shared_edge.lines.clear()
    return shared_edge


@pytest_asyncio.fixture(loop_scope="session")
async def http(edge: EdgeProcess) -> AsyncIterator[httpx.AsyncClient]:
    """A plain client of the shared edge."""
    async with httpx.AsyncClient(base_url=edge.url, timeout=PATIENCE, trust_env=False) as client:
        yield client
