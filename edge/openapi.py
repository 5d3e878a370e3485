"""The OpenAPI document, made from the route table and the pydantic models.

It is of OpenAPI 3.2, the first one that can say what the events of a stream are.
"""

import re
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from edge.gate import QUERY_PARAMETER
from edge.generate_endpoint import GenerateEndpoint
from edge.operation import DONE, EVENT_STREAM, Operation, SocketShape
from edge.response_schema import Error
from edge.version import version_of_sluice

_REF = "#/components/schemas/{model}"
_PATH_PARAMETER = re.compile(r"\{(\w+)(?::\w+)?\}")
_ID_HEADERS = {
    name: {"schema": {"type": "string"}, "description": "The request's id."}
    for name in ("x-request-id", "request-id")
}
_RETRY_HEADERS = {
    "retry-after": {
        "schema": {"type": "integer", "minimum": 1},
        "description": "Seconds to wait: 1 to 5, but for a limit of the key's own.",
    },
    "retry-after-ms": {
        "schema": {"type": "integer", "minimum": 1000},
        "description": "The same in milliseconds.",
    },
}
_REQUEST_ID_PARAMETER = {
    "name": "x-request-id",
    "in": "header",
    "required": False,
    "description": "Comes back in the answer and stands in the log. Ignored unless it is 1 to 128 letters, digits and"
    " `._:-`.",
    "schema": {"type": "string"},
}
_LAST_EVENT_ID_PARAMETER = {
    "name": "Last-Event-ID",
    "in": "header",
    "required": False,
    "description": "Sent by an EventSource that reconnects.",
    "schema": {"type": "string"},
}
_TIMEOUT_PARAMETER = {
    "name": "X-Request-Timeout",
    "in": "header",
    "required": False,
    "description": "Seconds until the generation has to end; at most the server's own limit.",
    "schema": {"type": "number", "exclusiveMinimum": 0},
}
_IN_QUERY = "query"
_SECURITY = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    _IN_QUERY: {
        "type": "apiKey",
        "in": "query",
        "name": QUERY_PARAMETER,
        "description": "A token of POST /v1/tokens.",
    },
}
_REASONS = {
    499: "The generation was aborted from elsewhere",
    529: "Overloaded, as Anthropic says it",
}


def document(operations: Sequence[Operation], *, needs_key: bool) -> dict[str, Any]:
    """The whole document."""
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        path = _PATH_PARAMETER.sub(r"{\1}", operation.path)
        described = _operation(operation)
        if needs_key and not operation.is_open:
            described["security"] = [
                {name: []} for name in _SECURITY if name != _IN_QUERY or operation.method == "GET"
            ]
        paths.setdefault(path, {})[operation.method.lower()] = described
    return {
        "openapi": "3.2.0",
        "info": {
            "title": "Sluice",
            "version": version_of_sluice(),
            "description": "Streams a language model's tokens as server-sent events.",
        },
        "paths": paths,
        "components": {
            "schemas": _schemas(operations),
            **({"securitySchemes": _SECURITY} if needs_key else {}),
        },
    }


def _schemas(operations: Sequence[Operation]) -> dict[str, Any]:
    answers: list[type[BaseModel]] = [Error]
    bodies: list[type[BaseModel]] = []
    for operation in operations:
        answers += operation.events.values()
        answers += [operation.error] if operation.error else []
        answers += [operation.answer] if operation.answer else []
        bodies += [operation.body] if operation.body else []
        if operation.socket is not None:
            answers += operation.socket.events
            bodies += operation.socket.frames
    _, definitions = models_json_schema(
        [
            *((model, "validation") for model in dict.fromkeys(answers)),
            *((model, "validation") for model in dict.fromkeys(bodies)),
        ],
        ref_template=_REF,
    )
    schemas: dict[str, Any] = definitions["$defs"]
    return schemas


def _operation(operation: Operation) -> dict[str, Any]:
    described: dict[str, Any] = {
        "summary": operation.summary,
        "operationId": _operation_id(operation),
        "parameters": _parameters(operation),
        "responses": _responses(operation),
    }
    if operation.body is not None:
        described["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": _ref(operation.body)}},
        }
    return described


def _operation_id(operation: Operation) -> str:
    words = re.findall(r"\w+", operation.path.replace(":path", ""))
    return "_".join([operation.method.lower(), *words])


def _parameters(operation: Operation) -> list[dict[str, Any]]:
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in _PATH_PARAMETER.findall(operation.path)
    ]
    if operation.query is not None:
        schema = operation.query.model_json_schema(ref_template=_REF)
        parameters += [
            _query_parameter(name, value, name in schema.get("required", ()))
            for name, value in schema["properties"].items()
            if value.get("type") != "null"
        ]
    if "finished" in operation.events:
        parameters.append(_LAST_EVENT_ID_PARAMETER)
    if isinstance(operation.endpoint, GenerateEndpoint):
        parameters.append(_TIMEOUT_PARAMETER)
    return [*parameters, _REQUEST_ID_PARAMETER]


def _query_parameter(name: str, schema: dict[str, Any], is_required: bool) -> dict[str, Any]:
    # A query parameter is left out rather than null.
    members = [member for member in schema.get("anyOf", ()) if member.get("type") != "null"]
    kept = {key: value for key, value in schema.items() if key not in ("anyOf", "default", "title")}
    description = kept.pop("description", "")
    return {
        "name": name,
        "in": "query",
        "required": is_required,
        "description": description,
        "schema": members[0] if members else kept,
    }


def _responses(operation: Operation) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if operation.answer is not None:
        content["application/json"] = {"schema": _ref(operation.answer)}
    if operation.events:
        describe = _event_stream if operation.stream_type == EVENT_STREAM else _lines
        content[operation.stream_type] = describe(operation)
    for media_type, held in operation.other_content.items():
        content[media_type] = {"schema": {"type": "string", "format": "binary"}}
        content[media_type]["schema"]["description"] = held
    responses: dict[str, Any] = {
        "200": {"description": "Done.", "headers": _ID_HEADERS, "content": content}
    }
    if operation.socket is not None:
        responses = {"101": _socket(operation.socket)}
    for status, description in operation.other_answers.items():
        responses[str(status)] = {"description": description, "headers": _ID_HEADERS}
        if operation.answer is not None:
            responses[str(status)]["content"] = content
    refusals = set() if operation.is_open else {401, 403}
    refusals |= {414} if operation.query is not None else set()
    for status in sorted({*operation.errors, *refusals, 429, 500}):
        responses[str(status)] = {
            "description": _REASONS.get(status) or HTTPStatus(status).phrase,
            "headers": _ID_HEADERS | (_RETRY_HEADERS if status in (429, 503, 529) else {}),
            "content": _failure(operation),
        }
    return responses


def _socket(socket: SocketShape) -> dict[str, Any]:
    return {
        "description": "The socket is open. OpenAPI has no words for what follows: text frames of the client are of"
        " x-client-frames, those of the server of x-server-frames.",
        "headers": _ID_HEADERS,
        "x-client-frames": {"oneOf": [_ref(model) for model in socket.frames]},
        "x-server-frames": {"oneOf": [_ref(model) for model in socket.events]},
    }


def _failure(operation: Operation) -> dict[str, Any]:
    if operation.error is None:
        return {"text/plain": {"schema": {"type": "string"}}}
    return {"application/json": {"schema": _ref(operation.error)}}


def _event_stream(operation: Operation) -> dict[str, Any]:
    """What each event is: its name, its id and the schema of its data."""
    events = operation.events
    items = [_event(name, model, has_id="finished" in events) for name, model in events.items()]
    if operation.error and not {"error", "failed"} & events.keys():
        items.append(_event("" if "" in events else "error", operation.error))
    if operation.last_event == DONE and "" in events:
        done = _named("")
        done["properties"]["data"] = {"const": "[DONE]"}
        items.append(done)
    told = f" {operation.last_event}" if "" in events else ""
    ending = " After the event of a failure the body breaks off." if operation.error else ""
    return {
        "itemSchema": {
            "anyOf": items,
            "description": f"A server-sent event.{told} A silent stream gets `: ping` comments.{ending}",
        },
    }


def _lines(operation: Operation) -> dict[str, Any]:
    """What each JSON value of another stream is."""
    models = [*operation.events.values(), *([operation.error] if operation.error else [])]
    return {"itemSchema": {"anyOf": [_ref(model) for model in models]}}


def _event(name: str, model: type[BaseModel], *, has_id: bool = False) -> dict[str, Any]:
    schema = _named(name)
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": _ref(model)}
    schema["properties"]["data"] = data
    if has_id:
        schema["required"].append("id")
        schema["properties"]["id"] = {"type": "string"}
    return schema


def _named(name: str) -> dict[str, Any]:
    """An event of this name, or of none."""
    if not name:
        # to its reader, it is one of type "message"
        unnamed = {"event": {"const": "message"}, "id": False}
        return {"type": "object", "required": ["data"], "properties": unnamed}
    return {
        "type": "object",
        "required": ["event", "data"],
        "properties": {"event": {"const": name}},
    }


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REF.format(model=model.__name__)}
