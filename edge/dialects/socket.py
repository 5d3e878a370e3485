"""The WebSocket at /v1/ws: what a text frame asks for, and the frames that answer it. Fields are the native dialect's.

A frame is a JSON object whose `type` is `generate` or `cancel`. The answers to a `generate` carry its `id`: `started`,
`delta`s, and a `finished` for each choice; or, at any point, `failed`, which is the last.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, Field

from edge.dialects import native
from edge.dialects.dialect import ParsedRequest, PromptLimits
from edge.dialects.native import NativeEncoder
from edge.dialects.native_schema import StreamMessage, StreamRequest
from edge.dialects.schema import RequestModel, validate
from edge.errors import EdgeError, invalid_request
from edge.finish_reason import finish_reason_name
from edge.json_codec import encode
from edge.response_schema import ErrorDetail, StreamDelta, StreamFinished, StreamStarted
from protos.sluice.v1 import generation_pb2 as pb

_MAX_ID = 128
_INPUTS = ("prompt", "token_ids", "messages", "message")
# What a frame has besides a request of the native dialect.
_FRAME_FIELDS = frozenset({"type", "id", "message"})


class SocketGenerate(StreamRequest):
    """Begins a generation. Exactly one of prompt, token_ids, messages and message."""

    type: Literal["generate"]
    id: str | None = Field(
        None,
        max_length=_MAX_ID,
        description="Comes back in the answers; the request's id if left out.",
    )
    message: StreamMessage | None = Field(
        None,
        description="The next message of the socket's conversation: the last messages that were sent, the answer to"
        " them, and so on. Turns that failed or were cancelled are not part of it.",
    )


class SocketCancel(RequestModel):
    """Ends the running generation with finish reason `cancelled`. One that comes too late changes nothing."""

    type: Literal["cancel"]
    id: str | None = Field(
        None, max_length=_MAX_ID, description="Which; whichever runs if left out."
    )


class SocketEvent(BaseModel):
    """What all answers have, besides what the event of that name has at /v1/streams."""

    id: str | None = Field(description="Of the request; null where a frame could not be read.")
    sequence_number: int = Field(description="Counts a request's messages from 0.")


class SocketStarted(SocketEvent, StreamStarted):
    """A generation was admitted."""

    type: Literal["started"]


class SocketDelta(SocketEvent, StreamDelta):
    """More of one choice."""

    type: Literal["delta"]


class SocketFinished(SocketEvent, StreamFinished):
    """The end of one choice."""

    type: Literal["finished"]


class SocketFailed(SocketEvent):
    """The end of a request that failed, or of a frame that asked for nothing that can be done."""

    type: Literal["failed"]
    status: int = Field(description="What the status of an HTTP answer would be.")
    error: ErrorDetail
    retry_after_ms: int | None = None


@dataclass(frozen=True)
class Cancel:
    """A wish to end a generation."""

    id: str | None


@dataclass(frozen=True)
class Generate:
    """A wish to begin one."""

    id: str
    parsed: ParsedRequest
    # The frame's message, by which the conversation goes on; it is the whole of the request's chat yet.
    continues: bool

    @property
    def chat(self) -> pb.Chat | None:
        """The request's conversation, if it is one."""
        prompt = self.parsed.requests[0].prompt
        return prompt.chat if prompt.HasField("chat") else None


def parse(body: Mapping[str, Any], limits: PromptLimits) -> Generate | Cancel:
    """What a frame asks for. Raises a 400 that names the field."""
    if body.get("type") == "cancel":
        return Cancel(validate(SocketCancel, body).id)
    if body.get("type") != "generate":
        raise invalid_request("type: must be generate or cancel.", "type")
    frame = validate(SocketGenerate, body)
    given = [name for name in _INPUTS if getattr(frame, name) is not None]
    if len(given) != 1:
        raise invalid_request(
            f"Give exactly one of {', '.join(_INPUTS)}.", given[1] if given else "message"
        )
    request = {name: value for name, value in body.items() if name not in _FRAME_FIELDS}
    if frame.message is not None:
        request["messages"] = [body["message"]]
    parsed = native.parse(request, limits)
    if parsed.requests[0].HasField("resume_window"):
        raise invalid_request("A socket's generation ends with the socket.", "resume_window")
    return Generate(frame.id or parsed.generation_id, parsed, frame.message is not None)


def id_of(body: Mapping[str, Any]) -> str | None:
    """The id of a frame that may be wrong otherwise."""
    given = body.get("id")
    return given if isinstance(given, str) and len(given) <= _MAX_ID else None


def failed(frame_id: str | None, error: EdgeError) -> bytes:
    """The answer to a frame that began nothing."""
    return SocketEncoder(frame_id).error(error)


class SocketEncoder(NativeEncoder):
    """Messages to frames."""

    def __init__(self, frame_id: str | None) -> None:
        super().__init__("")
        self._frame_id = frame_id
        self._open = {0}  # choices that have not ended

    @property
    def is_over(self) -> bool:
        """Whether every choice has ended."""
        return not self._open

    def encode(self, prompt: int, message: pb.GenerateResponse) -> bytes:
        """The frame of one message; none for a heartbeat."""
        if message.HasField("started"):
            self._open = set(range(message.started.n))
        elif message.HasField("finished"):
            self._open.discard(message.finished.choice_index)
        return super().encode(prompt, message)

    def error(self, error: EdgeError) -> bytes:
        """The frame of a failure."""
        self._open.clear()
        retry = {} if error.retry_after_ms is None else {"retry_after_ms": error.retry_after_ms}
        data = {"status": error.status, **error.body(), **retry}
        return self._event("failed", self._next_sequence_number, data, is_last=True)

    def cancelled(self) -> list[bytes]:
        """The ends of the choices that were still open."""
        reason = finish_reason_name(pb.FINISH_REASON_CANCELLED)
        choices, self._open = sorted(self._open), set()
        return [
            self._event(
                "finished",
                self._next_sequence_number + number,
                {"choice_index": choice, "finish_reason": reason},
                is_last=choice == choices[-1],
            )
            for number, choice in enumerate(choices)
        ]

    def _event(
        self,
        kind: Literal["started", "delta", "finished", "failed"],
        sequence_number: int,
        data: dict[str, Any],
        is_last: bool,  # noqa: ARG002
    ) -> bytes:
        head = {"type": kind, "id": self._frame_id, "sequence_number": sequence_number}
        return encode(head | data)
