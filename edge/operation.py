"""A row of the route table: what is served, and what the OpenAPI document says of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from pydantic import BaseModel
from starlette.types import ASGIApp

from edge import response_schema as shape
from edge.dialects.dialect import ParsedRequest, PromptLimits
from edge.error_response import Refuse, error_response
from edge.generate_endpoint import GenerateEndpoint, Parse

# Every status that a generation may be refused with before its 200.
GENERATE_ERRORS = (400, 401, 403, 404, 408, 409, 413, 415, 429, 431, 499, 500, 503, 504)

EVENT_STREAM = "text/event-stream"
DONE = "Ends with `data: [DONE]`."

BodyParse: TypeAlias = Callable[[dict[str, Any], PromptLimits], ParsedRequest]


class Generate(Protocol):
    """Makes the endpoint of a dialect."""

    def __call__(self, parse: Parse, refuse: Refuse = ...) -> GenerateEndpoint: ...


@dataclass(frozen=True)
class SocketShape:
    """What answers a WebSocket at the path of a GET, what its clients send, and what they are sent."""

    app: ASGIApp
    frames: tuple[type[BaseModel], ...]
    events: tuple[type[BaseModel], ...]


@dataclass(frozen=True)
class Operation:
    """One method of one path."""

    method: str
    path: str
    endpoint: ASGIApp | Callable[..., Any]
    summary: str
    # The body of a 200; None where it has none.
    answer: type[BaseModel] | None
    errors: tuple[int, ...]
    body: type[BaseModel] | None = None
    query: type[BaseModel] | None = None
    # Data of the server-sent events, by event name; "" where events have none, as the lines of other streams have.
    events: dict[str, type[BaseModel]] = field(default_factory=dict)
    stream_type: str = EVENT_STREAM
    other_answers: dict[int, str] = field(default_factory=dict)
    # Other media types that the 200 may have, and what they hold.
    other_content: dict[str, str] = field(default_factory=dict)
    # How a stream of events without names ends.
    last_event: str = DONE
    # The body of every failure; None where it is the error's message as plain text.
    error: type[BaseModel] | None = shape.Error
    # Answers who brings no API key where one is needed, in the dialect's form.
    refuse: Refuse = error_response
    # Whether it never needs one.
    is_open: bool = False
    socket: SocketShape | None = None
