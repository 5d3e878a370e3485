"""TGI's routes."""

from typing import Any

from pydantic import BaseModel

from edge.dialects import tgi, tgi_schema
from edge.dialects.tgi_endpoints import TgiEndpoints
from edge.operation import GENERATE_ERRORS, BodyParse, Generate, Operation
from edge.route_tables.bodies import from_body


def operations(generate: Generate, info: TgiEndpoints) -> list[Operation]:
    """Their rows."""

    def generation(
        path: str, parse: BodyParse, summary: str, body: type[BaseModel], **more: Any
    ) -> Operation:
        endpoint = generate(from_body(parse), tgi.refuse)
        answer = more.pop("answer", None)
        return Operation(
            "POST",
            path,
            endpoint,
            summary,
            answer,
            GENERATE_ERRORS,
            body=body,
            last_event="The last one has the whole text.",
            error=tgi_schema.TgiError,
            refuse=tgi.refuse,
            **more,
        )

    events = {"": tgi_schema.TgiStreamEvent}
    return [
        generation(
            "/generate",
            tgi.parse_generate,
            "Continues a text, as TGI does.",
            tgi_schema.TgiGenerateRequest,
            answer=tgi_schema.TgiGeneration,
        ),
        generation(
            "/generate_stream",
            tgi.parse_stream,
            "Streams the continuation of a text, as TGI does.",
            tgi_schema.TgiGenerateRequest,
            events=events,
        ),
        generation(
            "/",
            tgi.parse,
            "Continues a text, streamed or not, as TGI does.",
            tgi_schema.TgiRequest,
            answer=tgi_schema.TgiGenerations,
            events=events,
        ),
        Operation(
            "GET",
            "/info",
            info.info,
            "Describes the served model, as TGI does.",
            tgi_schema.TgiInfo,
            (500, 503, 504),
            error=tgi_schema.TgiError,
            refuse=tgi.refuse,
        ),
        Operation(
            "POST",
            "/tokenize",
            info.tokenize,
            "Gives the tokens of a text, as TGI does.",
            tgi_schema.TgiInputTokens,
            (400, 408, 413, 415, 429, 431, 500, 503, 504),
            body=tgi_schema.TgiTokenizeRequest,
            error=tgi_schema.TgiError,
            refuse=tgi.refuse,
        ),
    ]
