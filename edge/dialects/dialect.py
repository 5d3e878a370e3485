"""What a wire format provides."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeAlias

from edge.errors import EdgeError
from edge.settings import EdgeSettings
from protos.sluice.v1 import generation_pb2 as pb

Headers: TypeAlias = Sequence[tuple[bytes, bytes]]

_NEVER_STORED: Headers = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]


def stream_headers(content_type: str) -> Headers:
    """Headers of an answer that comes piece by piece and that nobody on the way may hold back."""
    return [(b"content-type", content_type.encode()), *_NEVER_STORED]


class StreamEncoder(ABC):
    """Turns the messages of one generation into the pieces of a stream, server-sent events unless it says otherwise.

    May raise EdgeError instead.
    """

    headers: ClassVar[Headers] = stream_headers("text/event-stream; charset=utf-8")
    # What a silent stream sends now and then; empty where the format has nothing that means nothing.
    ping: ClassVar[bytes] = b": ping\n\n"
    # Whether a failed stream breaks off behind its error. Unless every reader knows the error for one, it has to.
    is_cut_on_error: ClassVar[bool] = True

    @abstractmethod
    def encode(self, prompt: int, message: pb.GenerateResponse) -> bytes:
        """The events of one message; nothing for a heartbeat."""

    @abstractmethod
    def end(self) -> bytes:
        """The events after the last message."""

    @abstractmethod
    def error(self, error: EdgeError) -> bytes:
        """The event that ends a failed stream."""


class Collector(Protocol):
    """Gathers the messages of one generation into one JSON body. May raise EdgeError."""

    def add(self, prompt: int, message: pb.GenerateResponse) -> None:
        """Takes one message."""

    def body(self) -> bytes:
        """The whole answer, after the last message."""


@dataclass(frozen=True)
class PromptLimits:
    """What a request may hold at most."""

    max_body_bytes: int
    max_json_depth: int
    max_json_values: int
    max_prompts: int
    # The window of requests that say nothing of one, where their dialect is one that resumes.
    resume_window_seconds: float = 0
    # Of all bodies together that are read and parsed at once.
    max_bodies_bytes: float = math.inf

    @classmethod
    def of(cls, settings: EdgeSettings) -> "PromptLimits":
        """Those that are set."""
        return cls(
            settings.max_body_bytes,
            settings.max_json_depth,
            settings.max_json_values,
            settings.max_prompts,
            settings.resume_window_seconds,
            settings.max_bodies_bytes,
        )


@dataclass(frozen=True)
class ParsedRequest:
    """A request as a dialect understood it."""

    # The id that the client sees, and the worker too if there is one prompt. Of several each has this as the prefix of
    # its own, so that no id aborts them all: DELETE does not find this one, and closing the connection ends them.
    generation_id: str
    # One for each prompt.
    requests: Sequence[pb.GenerateRequest]
    streamed: bool
    encoder: Callable[[], StreamEncoder]
    collector: Callable[[], Collector]
    # From the path of a field of the worker's contract to what the dialect calls it.
    field_name: Callable[[str], str]


def sse_data(payload: bytes) -> bytes:
    """An event of data alone."""
    return b"data: " + payload + b"\n\n"
