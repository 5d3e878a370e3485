"""Every way to ask for structured output, and the contract's constraint that it becomes."""

from __future__ import annotations

import json
from typing import Any

import grpc
import httpx
import pytest

from protos.sluice.v1 import generation_pb2 as pb
from tests.edge.scripted_worker import ScriptedWorker, bad_field, failing

SCHEMA = {"type": "object", "properties": {"é": {"type": "string"}}}
SCHEMA_TEXT = '{"type":"object","properties":{"é":{"type":"string"}}}'
ANY_OBJECT = '{"type":"object"}'
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
    "/v1/completions": {"prompt": "x"},
    "/v1/streams": {"prompt": "x"},
}
OPENAI = ["/v1/chat/completions", "/v1/completions"]
NAMED = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
FORMS: list[tuple[dict[str, Any], str, pb.Constraint]] = [
    (
        {"response_format": NAMED},
        "response_format.json_schema.schema",
        pb.Constraint(json_schema=SCHEMA_TEXT),
    ),
    (
        {"response_format": {"type": "json_object"}},
        "response_format",
        pb.Constraint(json_schema=ANY_OBJECT),
    ),
    ({"guided_json": SCHEMA}, "guided_json", pb.Constraint(json_schema=SCHEMA_TEXT)),
    ({"guided_json": "{}"}, "guided_json", pb.Constraint(json_schema="{}")),
    ({"guided_regex": "a+"}, "guided_regex", pb.Constraint(regex="a+")),
    (
        {"guided_choice": ["a", "b"]},
        "guided_choice",
        pb.Constraint(choice=pb.ChoiceList(texts=["a", "b"])),
    ),
    ({"guided_grammar": "start: X"}, "guided_grammar", pb.Constraint(lark="start: X")),
    (
        {"structured_outputs": {"json": SCHEMA}},
        "structured_outputs.json",
        pb.Constraint(json_schema=SCHEMA_TEXT),
    ),
    ({"structured_outputs": {"regex": "a"}}, "structured_outputs.regex", pb.Constraint(regex="a")),
    (
        {"structured_outputs": {"choice": ["a"]}},
        "structured_outputs.choice",
        pb.Constraint(choice=pb.ChoiceList(texts=["a"])),
    ),
    (
        {"structured_outputs": {"grammar": "start: X"}},
        "structured_outputs.grammar",
        pb.Constraint(lark="start: X"),
    ),
    (
        {"structured_outputs": {"json_object": True}},
        "structured_outputs.json_object",
        pb.Constraint(json_schema=ANY_OBJECT),
    ),
]
NATIVE: list[tuple[dict[str, Any], pb.Constraint]] = [
    ({"json_schema": SCHEMA}, pb.Constraint(json_schema=SCHEMA_TEXT)),
    ({"regex": "a"}, pb.Constraint(regex="a")),
    ({"choice": ["a"]}, pb.Constraint(choice=pb.ChoiceList(texts=["a"]))),
    ({"lark": "start: X"}, pb.Constraint(lark="start: X")),
]


async def error_of(http: httpx.AsyncClient, path: str, **fields: Any) -> dict[str, Any]:
    response = await http.post(path, json=BODIES[path] | fields)
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


@pytest.mark.parametrize("path", OPENAI)
@pytest.mark.parametrize(("fields", "name", "constraint"), FORMS, ids=lambda v: str(v)[:40])
async def test_each_form_becomes_the_constraint(
    http: httpx.AsyncClient,
    worker: ScriptedWorker,
    path: str,
    fields: dict[str, Any],
    name: str,
    constraint: pb.Constraint,
) -> None:
    response = await http.post(path, json=BODIES[path] | fields)
    assert response.status_code == 200, response.text
    assert worker.call.request.constraint == constraint
    # and what is wrong with it is named as the client knows it
    kind = constraint.WhichOneof("grammar")
    worker.script = failing(grpc.StatusCode.INVALID_ARGUMENT, "no", bad_field(f"constraint.{kind}"))
    assert (await error_of(http, path, **fields))["param"] == name


@pytest.mark.parametrize(("fields", "constraint"), NATIVE)
async def test_the_native_form(
    http: httpx.AsyncClient,
    worker: ScriptedWorker,
    fields: dict[str, Any],
    constraint: pb.Constraint,
) -> None:
    await http.post("/v1/streams", json={"prompt": "x", "constraint": fields})
    assert worker.call.request.constraint == constraint


@pytest.mark.parametrize("path", OPENAI)
async def test_plain_text_is_no_constraint(
    http: httpx.AsyncClient, worker: ScriptedWorker, path: str
) -> None:
    await http.post(path, json=BODIES[path] | {"response_format": {"type": "text"}})
    assert not worker.call.request.HasField("constraint")


@pytest.mark.parametrize("path", OPENAI)
async def test_two_at_once_are_both_named(
    http: httpx.AsyncClient, worker: ScriptedWorker, path: str
) -> None:
    error = await error_of(http, path, response_format={"type": "json_object"}, guided_regex="a")
    assert error["param"] == "guided_regex"
    assert "response_format" in error["message"]
    error = await error_of(http, path, structured_outputs={"regex": "a", "choice": ["a"]})
    assert error["param"] == "structured_outputs.choice"
    assert "structured_outputs.regex" in error["message"]
    assert worker.calls == []


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (OPENAI[0], {"response_format": {"type": "xml"}}, "response_format"),
        (OPENAI[0], {"response_format": {}}, "response_format"),
        (
            OPENAI[0],
            {"response_format": {"type": "json_schema"}},
            "response_format.json_schema",
        ),
        (OPENAI[0], {"guided_json": 3}, "guided_json"),
        (OPENAI[1], {"guided_choice": "a"}, "guided_choice"),
        (OPENAI[1], {"structured_outputs": {"xml": "a"}}, "structured_outputs.xml"),
        ("/v1/streams", {"constraint": {}}, "constraint"),
        ("/v1/streams", {"constraint": {"regex": "a", "lark": "b"}}, "constraint"),
    ],
)
async def test_a_wrong_form_is_named(
    http: httpx.AsyncClient, worker: ScriptedWorker, path: str, fields: dict[str, Any], param: str
) -> None:
    error = await error_of(http, path, **fields)
    assert str(error["param"]).startswith(param), json.dumps(error)
    assert worker.calls == []
