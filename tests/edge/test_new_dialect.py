"""A dialect is one file, and a row of the route table: one that the edge does not have, in an edge that is given it."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import pytest_asyncio

from edge.api_keys import ApiKey, digest_of, line_of
from protos.sluice.v1 import generation_pb2 as pb
from tests.edge.edge_process import PATIENCE, ROOT, EdgeProcess, running_edge
from tests.edge.raw_http import RawClient, request_bytes
from tests.edge.scripted_worker import (
    MODEL,
    ScriptedCall,
    ScriptedWorker,
    bad_field,
    error_info,
    failing,
    retry_in,
)

PATH = "/ollama/api/generate"
BODY: dict[str, Any] = {"model": "m", "prompt": "hi"}
KEY = {"authorization": "Bearer secret"}
EXAMPLE = ROOT / "examples" / "lines_dialect.py"
LIMIT = 65536
TABLE_BEGINS = "    return [\n"


def row() -> str:
    """The row that the example's docstring tells."""
    lines = EXAMPLE.read_text().split("\n\n")[2].splitlines()
    assert lines[0].strip() == "Operation("
    return "".join(f"    {line}\n" for line in lines)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def new_edge(
    shared_worker: tuple[ScriptedWorker, str], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[EdgeProcess]:
    """An edge with one file more, and one row."""
    folder: Path = tmp_path_factory.mktemp("edge")
    shutil.copytree(ROOT / "edge", folder / "edge", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(EXAMPLE, folder / "edge" / "dialects")
    table = folder / "edge" / "routes.py"
    text = table.read_text()
    assert TABLE_BEGINS in text
    text = text.replace(TABLE_BEGINS, TABLE_BEGINS + row(), 1)
    text = text.replace("    anthropic,\n", "    anthropic,\n    lines_dialect,\n", 1)
    table.write_text(text)
    keys = line_of(ApiKey("tests", (digest_of("secret"),)))
    async with running_edge(shared_worker[1], folder, api_keys=keys, max_body_bytes=LIMIT) as edge:
        yield edge


@pytest_asyncio.fixture(loop_scope="session")
async def http(new_edge: EdgeProcess, worker: ScriptedWorker) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(
        base_url=new_edge.url, timeout=PATIENCE, trust_env=False, headers=KEY
    ) as client:
        yield client


def lines_of(response: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(line) for line in response.content.splitlines()]


async def test_it_streams(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    options = {"temperature": 0.5, "num_predict": 5, "stop": ["x"]}
    response = await http.post(PATH, json=BODY | {"options": options})
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/x-ndjson"
    *texts, last = lines_of(response)
    assert [line["response"] for line in texts] == ["Hel", "lo", " wörld"]
    assert not any(line["done"] for line in texts)
    assert (last["done"], last["done_reason"], last["eval_count"]) == (True, "stop", 3)
    request = worker.call.request
    assert (request.prompt.text, request.model) == ("hi", "m")
    assert (request.sampling.temperature, request.stopping.max_tokens) == (0.5, 5)
    assert request.caller.key_id == "tests"


async def test_it_answers_whole(http: httpx.AsyncClient) -> None:
    response = await http.post(PATH, json=BODY | {"stream": False})
    assert response.headers["content-type"] == "application/json"
    assert response.json() == {
        "model": "m",
        "response": "Hello wörld",
        "done": True,
        "done_reason": "stop",
        "prompt_eval_count": 7,
        "eval_count": 3,
    }


@pytest.mark.parametrize("streamed", [True, False])
async def test_every_refusal_is_in_its_own_words(
    http: httpx.AsyncClient, worker: ScriptedWorker, streamed: bool
) -> None:
    async def refused(**request: Any) -> tuple[int, str, httpx.Headers]:
        given: dict[str, Any] = {"json": BODY | {"stream": streamed}} | request
        response = await http.post(PATH, **given)
        told = response.json()
        assert list(told) == ["error"]
        return response.status_code, told["error"], response.headers

    status, words, _ = await refused(json=BODY | {"options": {"mirostat": 1}})
    assert (status, "mirostat" in words) == (400, True)
    assert (await refused(content=b"{"))[0] == 400
    assert (await refused(headers={"authorization": "Bearer wrong"}))[0] == 401
    assert (await refused(content=b"x", headers={"content-encoding": "gzip"}))[0] == 415
    assert (await refused(json=BODY | {"prompt": "x" * LIMIT}))[0] == 413
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    worker.script = failing(
        invalid,
        "stopping.max_tokens: too many",
        error_info("INVALID_FIELD"),
        bad_field("stopping.max_tokens"),
    )
    assert (await refused())[:2] == (400, "options.num_predict: too many")
    worker.script = failing(
        grpc.StatusCode.RESOURCE_EXHAUSTED, "full", error_info("QUEUE_FULL"), retry_in(2)
    )
    status, words, headers = await refused()
    assert (status, words, headers["retry-after"]) == (429, "full", "2")


async def test_a_failure_midway_is_the_last_line(
    http: httpx.AsyncClient, worker: ScriptedWorker
) -> None:
    async def script(call: ScriptedCall) -> None:
        await call.started()
        await call.delta("partly")
        await call.finished(pb.FINISH_REASON_SHUTDOWN)

    worker.script = script
    *_, text, failure = lines_of(await http.post(PATH, json=BODY))
    assert text["response"] == "partly"
    assert list(failure) == ["error"]


@pytest.mark.parametrize("streamed", [True, False])
async def test_who_leaves_ends_the_generation(
    new_edge: EdgeProcess, worker: ScriptedWorker, streamed: bool
) -> None:
    reached = asyncio.Event()

    async def script(call: ScriptedCall) -> None:
        await call.started()
        await call.delta("one")
        reached.set()
        await call.hang()

    worker.script = script
    async with RawClient(new_edge.port) as client:
        await client.send(request_bytes(PATH, BODY | {"stream": streamed}, **KEY))
        async with asyncio.timeout(PATIENCE):
            await reached.wait()
    async with asyncio.timeout(PATIENCE):
        await worker.call.ended.wait()
    assert worker.call.was_cancelled


async def test_it_is_documented_and_counted(http: httpx.AsyncClient) -> None:
    document = (await http.get("/openapi.json")).json()
    operation = document["paths"][PATH]["post"]
    content = operation["responses"]["200"]["content"]
    assert set(content) == {"application/json", "application/x-ndjson"}
    told = content["application/x-ndjson"]["itemSchema"]["anyOf"]
    names = [schema["$ref"].rpartition("/")[2] for schema in told]
    assert names == ["LinesAnswer", "LinesFailure"]
    assert {"LinesRequest", *names} <= document["components"]["schemas"].keys()
    assert operation["responses"]["429"]["content"]["application/json"]["schema"] == told[1]
    await http.post(PATH, json=BODY)
    assert f'route="{PATH}"' in (await http.get("/metrics")).text
    model = (await http.get("/v1/models")).json()["data"][0]["id"]
    assert model == MODEL, "and what was there is there"
