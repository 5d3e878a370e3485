"""A response of /v1/responses, as far as its events are known."""

import re
from collections.abc import Sequence
from typing import Any, Final

from edge.dialects.common import shown_float
from edge.dialects.openai_wire import finish_reason
from edge.dialects.responses_annotation import Annotation
from edge.dialects.responses_output import COMPLETED, IN_PROGRESS, INCOMPLETE, Event, Output
from edge.errors import EdgeError
from protos.sluice.v1 import generation_pb2 as pb

_PREFIX: Final = "resp_"
# Of a response that is kept: its stream's name, with the prefix. Of one that is not, its request's id.
_KEPT_ID: Final = re.compile(rf"{_PREFIX}(?![0-9a-f]{{32}}$)([0-9A-Za-z_]{{16,128}})")
_REQUEST_ID: Final = re.compile(rf"{_PREFIX}[0-9a-f]{{32}}")
_CANCELLED: Final = 499  # the status of a generation that was aborted from elsewhere


def resume_id_of(response_id: str) -> str | None:
    """The name of the stream that a kept response is, or None if this is no such response's id."""
    match = _KEPT_ID.fullmatch(response_id)
    return None if match is None else match[1]


def is_request_id(response_id: str) -> bool:
    """Whether this is the id of a response that is not kept."""
    return _REQUEST_ID.fullmatch(response_id) is not None


class ResponseState:
    """Takes the messages of a stream in order. One that was kept brings its own `echo`."""

    def __init__(self, response_id: str, echo: dict[str, Any] | None = None) -> None:
        self._id = response_id
        self._echo = echo or {}
        self.is_stored = False
        self.conversation: Sequence[pb.ChatMessage] = ()  # what it answers, of one that was kept
        self.started = pb.Started()
        self._usage: dict[str, Any] | None = None
        self.output = Output(response_id)
        self.status = IN_PROGRESS
        self._error: dict[str, str] | None = None

    @property
    def is_started(self) -> bool:
        """Whether the worker has admitted the request."""
        return bool(self.started.request_id)

    def start(self, started: pb.Started) -> None:
        """Takes what the worker said of the request."""
        self.started = started
        if started.HasField("resume_id"):
            self.is_stored = True
            self._id = _PREFIX + started.resume_id
            self.output = Output(self._id)
        if started.HasField("annotation"):
            annotation = Annotation.unpack(started.annotation)
            self._echo, self.conversation = annotation.echo, annotation.conversation

    def add(self, message: pb.GenerateResponse) -> list[Event]:
        """Takes a message and gives the events of it, but for those of the whole response.

        Raises where the end is no success.
        """
        match message.WhichOneof("event"):
            case "started":
                self.start(message.started)
                return []
            case "delta":
                return self.output.take(message.delta)
            case "finished":
                return self._finish(message.finished)
            case _:
                return []

    def _finish(self, finished: pb.Finished) -> list[Event]:
        is_cut = finish_reason(finished) == "length"
        self.status = INCOMPLETE if is_cut else COMPLETED
        usage = finished.usage
        self._usage = {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self.output.reasoning_tokens},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }
        return self.output.end(self.status)

    def fail(self, error: EdgeError) -> None:
        """Takes the reason why nothing more comes."""
        self.output.break_off()
        self.status = "cancelled" if error.status == _CANCELLED else "failed"
        # the closest of OpenAI's codes
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        self._error = {"code": code, "message": error.message}

    def as_json(self) -> dict[str, Any]:
        """The object."""
        is_cut = self.status == INCOMPLETE
        return {
            "id": self._id,
            "object": "response",
            "created_at": self.started.created_at.seconds,
            "status": self.status,
            "error": self._error,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "model": self.started.model,
            "output": self.output.as_json(),
            "temperature": shown_float(self.started.sampling.temperature),
            "top_p": shown_float(self.started.sampling.top_p),
            "usage": self._usage,
            **self._echo,
            "store": self.is_stored,
        }
