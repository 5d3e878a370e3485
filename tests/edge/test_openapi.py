"""The document at /openapi.json is valid, complete, and true of what is sent."""

import re
from typing import Any

import httpx
import jsonschema
import pytest
import pytest_asyncio
from openapi_spec_validator import validate
from starlette.applications import Starlette
from starlette.routing import Route, WebSocketRoute

from edge.app import create_apps
from edge.drain import Drain
from edge.errors import FINISH_TABLE, STATUS_TABLE
from edge.gate import Gate
from edge.settings import EdgeSettings
from tests.edge.scripted_worker import ScriptedWorker
from tests.edge.sse import openai_chunks, parse


@pytest_asyncio.fixture(loop_scope="session")
async def document(http: httpx.AsyncClient) -> dict[str, Any]:
    """The document as served."""
    document: dict[str, Any] = (await http.get("/openapi.json")).json()
    return document


def operations(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [
        (method.upper(), path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]


def check(document: dict[str, Any], name: str, value: Any) -> None:
    schema = {
        "$ref": f"#/components/schemas/{name}",
        "components": document["components"],
    }
    jsonschema.validate(value, schema)


async def test_it_is_valid(document: dict[str, Any]) -> None:
    validate(document)


def made(settings: EdgeSettings) -> Starlette:
    return create_apps(settings, Drain(), Gate(settings)).public


async def test_every_route_is_in_it(document: dict[str, Any]) -> None:
    app = made(EdgeSettings(playground=False))
    served = {
        (method, re.sub(r":\w+}", "}", route.path))
        for route in app.routes
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    }
    sockets = {route.path for route in app.routes if isinstance(route, WebSocketRoute)}
    assert len(served) + len(sockets) == len(app.routes)
    described = {path for _, path, what in operations(document) if "101" in what["responses"]}
    assert described == sockets
    assert {(method, path) for method, path, _ in operations(document)} == served
    whole = made(EdgeSettings())
    pages = [getattr(route, "path", "") for route in whole.routes[len(app.routes) :]]
    assert pages == ["/", "/static"]
    ids = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(set(ids)) == len(ids)


async def test_every_error_status_is_in_it(document: dict[str, Any]) -> None:
    possible = {row.status for row in (*STATUS_TABLE.values(), *FINISH_TABLE.values())} | {
        408,
        413,
        415,
        431,
    }
    for method, path, operation in operations(document):
        if "text/event-stream" in operation["responses"].get("200", {}).get("content", {}):
            documented = {int(status) for status in operation["responses"]}
            assert possible <= documented, (method, path)
            if path == "/v1/streams":
                assert {204, 410} <= documented


async def test_frames_are_in_it(document: dict[str, Any]) -> None:
    for method in ("get", "post"):
        content = document["paths"]["/v1/streams"][method]["responses"]["200"]["content"]
        assert content["application/octet-stream"]["schema"]["format"] == "binary"


async def test_every_parameter_is_in_it(document: dict[str, Any]) -> None:
    get = document["paths"]["/v1/streams"]["get"]
    query = {p["name"]: p for p in get["parameters"] if p["in"] == "query"}
    assert query["prompt"]["required"]
    assert {"max_tokens", "temperature", "stop", "seed", "n"} <= set(query)
    assert "logit_bias" not in query
    assert query["stop"]["schema"]["type"] == "array"
    headers = {p["name"] for p in get["parameters"] if p["in"] == "header"}
    assert headers == {"Last-Event-ID", "x-request-id", "X-Request-Timeout"}
    body = document["components"]["schemas"]["ChatCompletionRequest"]
    assert body["additionalProperties"] is False
    assert body["required"] == ["messages"]
    assert all(
        "description" in field or name in ("messages", "stream_options", "UNSUPPORTED")
        for name, field in document["components"]["schemas"]["StreamRequest"]["properties"].items()
    )


async def test_answers_are_as_documented(
    http: httpx.AsyncClient, document: dict[str, Any], worker: ScriptedWorker
) -> None:
    chat = {"messages": [{"role": "user", "content": "x"}], "n": 2}
    usage = {"stream": True, "stream_options": {"continuous_usage_stats": True}}
    check(document, "ChatCompletion", (await http.post("/v1/chat/completions", json=chat)).json())
    for chunk in openai_chunks(
        (await http.post("/v1/chat/completions", json=chat | usage)).content
    ):
        check(document, "ChatCompletionChunk", chunk)
    text = {"prompt": ["x", "y"]}
    check(document, "Completion", (await http.post("/v1/completions", json=text)).json())
    for chunk in openai_chunks((await http.post("/v1/completions", json=text | usage)).content):
        check(document, "Completion", chunk)
    names = {"started": "StreamStarted", "delta": "StreamDelta", "finished": "StreamFinished"}
    for event in parse((await http.get("/v1/streams?prompt=x&n=2")).content).events:
        check(document, names[event.type], event.json())
    check(document, "ModelList", (await http.get("/v1/models")).json())
    check(document, "ModelObject", (await http.get("/v1/models/default")).json())
    check(document, "Health", (await http.get("/health")).json())
    check(document, "Readiness", (await http.get("/ready")).json())
    check(document, "Aborted", (await http.delete("/v1/streams/x")).json())
    check(document, "Error", (await http.post("/v1/completions", json={})).json())


async def test_it_tells_what_delete_does_not_find(document: dict[str, Any]) -> None:
    operation = document["paths"]["/v1/streams/{request_id}"]["delete"]
    assert "several prompts is not found" in operation["summary"]


async def test_the_check_above_can_fail(document: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        check(document, "Health", {"status": "sick"})
