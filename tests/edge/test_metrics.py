"""/metrics of the edge: what happened is what it says, in labels that no client can add to."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from functools import partial

import grpc
import httpx
import pytest

from edge.metrics import PHASES
from tests.edge.edge_process import PATIENCE, EdgeProcess, running_edge
from tests.edge.raw_http import RawClient, request_bytes
from tests.edge.scripted_worker import ScriptedWorker, failing
from tests.edge.test_disconnect import CHAT, LEAVE, hang_in
from tests.metrics_text import Scrape, documented_names

PATH = "/v1/chat/completions"


@contextlib.asynccontextmanager
async def client_of(edge: EdgeProcess) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=edge.url, timeout=PATIENCE, trust_env=False) as client:
        yield client


async def scrape(client: httpx.AsyncClient) -> Scrape:
    answer = await client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return Scrape(answer.text)


async def wait_for(client: httpx.AsyncClient, condition: Callable[[Scrape], bool]) -> Scrape:
    async with asyncio.timeout(PATIENCE):
        while not condition(seen := await scrape(client)):
            await asyncio.sleep(0.01)
    return seen


async def test_answers_are_counted_by_route_and_status(target: str, worker: ScriptedWorker) -> None:
    async with running_edge(target) as edge, client_of(edge) as client:
        streamed = await client.post(PATH, json=CHAT | {"stream": True})
        assert (await client.post(PATH, json=CHAT)).status_code == 200
        assert (await client.post(PATH, json={})).status_code == 400
        worker.script = failing(grpc.StatusCode.RESOURCE_EXHAUSTED)
        assert (await client.post(PATH, json=CHAT | {"stream": True})).status_code == 429

        def count(status: int) -> float:
            return seen("sluice_edge_requests_total", route=PATH, method="POST", status=str(status))

        seen = await scrape(client)
        assert (count(200), count(400), count(429)) == (2, 1, 1)
        assert seen("sluice_edge_request_seconds_count", route=PATH) == 4
        assert seen("sluice_edge_time_to_first_token_seconds_count") == 2
        assert seen("sluice_edge_sent_bytes_total") > len(streamed.content)
        assert seen("sluice_edge_failures_total", type="overloaded") == 1
        assert seen("sluice_edge_failures_total", type="invalid_request_error") == 1
        assert seen("sluice_edge_generations") == 0
        assert seen("sluice_edge_workers_ready") == 1
        assert seen.total("sluice_cancel_seconds_count") == 0


async def test_nothing_that_a_client_writes_becomes_a_label(target: str) -> None:
    async with running_edge(target) as edge, client_of(edge) as client:
        for number in range(5):
            await client.get(f"/nowhere/{number}")
            await client.get(f"/v1/models/model-{number}")
            await client.request("REPORT", f"/else/{number}")
            await client.request(["PUT", "LOCK", "PURGE", "PATCH", "MKCOL"][number], "/health")
            await client.post(PATH, json=CHAT | {"model": f"m{number}"}, headers={"x-api-key": "k"})
        seen = await scrape(client)
        routes = seen.labels("sluice_edge_requests_total", "route")
        assert routes == {"none", "/v1/models/{model:path}", "/health", PATH}
        methods = seen.labels("sluice_edge_requests_total", "method")
        assert methods == {"GET", "POST", "other"}


def has_cancelled(times: int, seen: Scrape) -> bool:
    return seen.total("sluice_cancel_seconds_count") == times


@pytest.mark.parametrize("manner", LEAVE)
async def test_who_leaves_shows_in_the_histogram_of_the_phase(
    target: str, worker: ScriptedWorker, manner: str
) -> None:
    names = dict(zip(PHASES, ("queue", "prefill", "decode"), strict=True))
    async with running_edge(target) as edge, client_of(edge) as client:
        for number, (phase, name) in enumerate(names.items(), 1):
            reached = asyncio.Event()
            worker.script = hang_in(name, reached)
            leaving = await RawClient(edge.port).__aenter__()
            await leaving.send(request_bytes(PATH, CHAT | {"stream": True}))
            async with asyncio.timeout(PATIENCE):
                await reached.wait()
            if phase == "decode":
                await wait_for(
                    client, lambda s: s("sluice_edge_time_to_first_token_seconds_count") > 0
                )
            elif phase == "prefill":
                await leaving.read_until(b"\r\n\r\n")
            assert (await scrape(client))("sluice_edge_generations") == 1
            await LEAVE[manner](leaving)
            seen = await wait_for(client, partial(has_cancelled, number))
            assert seen("sluice_cancel_seconds_count", phase=phase) == 1
            await wait_for(client, lambda s: s("sluice_edge_generations") == 0)
            with contextlib.suppress(OSError):
                leaving.socket.close()


async def test_every_name_is_documented_and_every_documented_name_exists(
    http: httpx.AsyncClient,
) -> None:
    seen = await scrape(http)
    assert seen.names() == documented_names("edge")
    assert seen("sluice_tasks") >= 1
    assert seen("process_open_fds") > 3
