"""What a wire format provides."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from edge.errors import EdgeError
from protos.sluice.v1 import generation_pb2 as pb


class StreamEncoder(Protocol):
    """Turns the messages of one generation into server-sent events. May raise EdgeError instead."""

    def encode(self, prompt: int, message: pb.GenerateResponse) -> bytes:
        """The events of one message; nothing for a heartbeat."""

    def end(self) -> bytes:
        """The events after the last message."""

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
    max_prompts: int


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
