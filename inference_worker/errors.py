"""What can go wrong with a request, and the one table that says which gRPC status each case becomes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Self

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

ERROR_DOMAIN: Final = "sluice"
STATUS_DETAILS_KEY: Final = "grpc-status-details-bin"  # where gRPC carries a google.rpc.Status
_MAX_MESSAGE_CHARS: Final = 500  # a status travels in a header, and those are limited to 8 KiB


class SluiceError(Exception):
    """A refusal or failure that its caller is told about. The text is for the caller: nothing internal in it."""

    field: str | None = None  # path of the request field at fault
    retry_after: float | None = None  # seconds, where retrying helps
    hold: float = (
        0.0  # seconds for which whoever calls may say it to others of the same key, without asking
    )

    @property
    def metadata(self) -> dict[str, str]:
        """Facts for programs, besides the text."""
        return {}

    def alike(self) -> Self:
        """Another one that says the same, to be kept: without the traceback and the cause, which hold on to all that
        the failed code had at hand, and of which the first grows whenever the same error is raised again.
        """
        other = type(self).__new__(type(self), *self.args)
        other.__dict__.update(self.__dict__)
        return other


class InvalidField(SluiceError):
    """A field is missing or out of range."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field


class ContextExceeded(InvalidField):
    """Prompt, or prompt and completion, can never fit."""

    def __init__(self, field: str, problem: str, *, limit: int, **size: int) -> None:
        """`limit` is in the unit that `size` names: tokens=, or bytes= where nothing was tokenized."""
        super().__init__(field, problem)
        self._numbers = size | {"limit": limit}

    @property
    def metadata(self) -> dict[str, str]:
        return {name: str(number) for name, number in self._numbers.items()}


class UnsupportedField(SluiceError):
    """A field whose feature this worker does not have."""

    def __init__(self, field: str) -> None:
        super().__init__(f"{field}: not supported by this worker")
        self.field = field


class ModelNotFound(SluiceError):
    """Another model than the served one was asked for."""

    def __init__(self, asked: str, served: str) -> None:
        super().__init__(
            f"model {_shorten(asked)!r} is not served here; this worker serves {served!r}"
        )
        self.field = "model"


class RequestExists(SluiceError):
    """The request id is in use."""

    def __init__(self, request_id: str) -> None:
        super().__init__(f"request_id: {request_id} is the id of a request that is still running")
        self.field = "request_id"


class QueueFull(SluiceError):
    """As many requests wait as may."""

    def __init__(self, limit: int, retry_after: float, hold: float = 0.0) -> None:
        super().__init__(f"overloaded: {limit} requests are waiting already")
        self.retry_after = retry_after
        self.hold = hold


class QueueShareFull(SluiceError):
    """A key has so much waiting that others would find no room."""

    def __init__(self, key_id: str, retry_after: float, hold: float = 0.0) -> None:
        super().__init__(f"overloaded: the requests of {key_id} fill their share of the queue")
        self.retry_after = retry_after
        self.hold = hold


class TokenBudgetFull(SluiceError):
    """The waiting requests' prompts are as large as they may be, in tokens or in KV blocks."""

    def __init__(self, size: int, waiting: int, limit: int, unit: str, retry_after: float) -> None:
        super().__init__(
            f"overloaded: this prompt's {size} {unit} and the {waiting} waiting ones exceed {limit}"
        )
        self.retry_after = retry_after


class WouldMissDeadline(SluiceError):
    """The request's first token is not expected before its deadline."""

    def __init__(self, expected: float, left: float, retry_after: float) -> None:
        super().__init__(
            f"overloaded: the first token is expected in {expected:.1f} s, after the deadline in {left:.1f} s"
        )
        self.retry_after = retry_after


class KeyLimit(SluiceError):
    """The caller's key has as much inside, or has used as much, as it may."""

    def __init__(self, what: str, retry_after: float) -> None:
        super().__init__(f"limit of this key: {what}")
        self.retry_after = retry_after


class DeadlinePassed(SluiceError):
    """The request's deadline came before its first token."""

    def __init__(self) -> None:
        super().__init__("the deadline passed before the first token")


class Draining(SluiceError):
    """The worker is shutting down."""

    retry_after = 1.0

    def __init__(self) -> None:
        super().__init__("the worker is shutting down and takes no new requests")


class Interrupted(SluiceError):
    """The worker shuts down, and its caller goes on with the stream on another one."""

    retry_after = 1.0

    def __init__(self) -> None:
        super().__init__("the worker shut down before the end of the generation")


class EngineLost(SluiceError):
    """The engine crashed or hangs, and the worker is about to end: another one can go on."""

    retry_after = 1.0

    def __init__(self) -> None:
        super().__init__("the worker's engine has stopped")


class SlowReader(SluiceError):
    """The caller did not read for too long, and held a place that others wait for."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the stream was not read for {seconds:g} seconds")


class StreamNotFound(SluiceError):
    """A stream to resume that is unknown, expired or another key's: nobody learns which."""

    def __init__(self) -> None:
        super().__init__("there is no such stream, or its resume window has passed")
        self.field = "resume.resume_id"


class StreamGone(SluiceError):
    """Messages to resume from that are no longer kept, though the stream is."""

    def __init__(self, first: int) -> None:
        super().__init__(f"only the messages from number {first} on are still kept")
        self.field = "resume.after_sequence_number"


class TakenOver(SluiceError):
    """Another call resumed the stream that this one was reading."""

    def __init__(self) -> None:
        super().__init__("the stream was resumed elsewhere")


class InternalError(SluiceError):
    """A bug, or a sequence whose numbers exploded. What happened is in the log, under the request's id."""

    def __init__(self, request_id: str | None) -> None:
        suffix = "" if request_id is None else f"; request {request_id}"
        super().__init__(f"internal error{suffix}")
        self.request_id = request_id

    @property
    def metadata(self) -> dict[str, str]:
        return {} if self.request_id is None else {"request_id": self.request_id}


_TABLE: Final[dict[type[SluiceError], tuple[grpc.StatusCode, str]]] = {
    InvalidField: (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"),
    ContextExceeded: (grpc.StatusCode.INVALID_ARGUMENT, "CONTEXT_EXCEEDED"),
    UnsupportedField: (grpc.StatusCode.UNIMPLEMENTED, "UNSUPPORTED_FIELD"),
    ModelNotFound: (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"),
    RequestExists: (grpc.StatusCode.ALREADY_EXISTS, "REQUEST_EXISTS"),
    QueueFull: (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL"),
    QueueShareFull: (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL"),
    TokenBudgetFull: (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOKEN_BUDGET"),
    WouldMissDeadline: (grpc.StatusCode.RESOURCE_EXHAUSTED, "WOULD_MISS_DEADLINE"),
    KeyLimit: (grpc.StatusCode.RESOURCE_EXHAUSTED, "KEY_LIMIT"),
    DeadlinePassed: (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_PASSED"),
    Draining: (grpc.StatusCode.UNAVAILABLE, "DRAINING"),
    Interrupted: (grpc.StatusCode.UNAVAILABLE, "SHUTDOWN"),
    EngineLost: (grpc.StatusCode.UNAVAILABLE, "ENGINE_LOST"),
    SlowReader: (grpc.StatusCode.ABORTED, "SLOW_READER"),
    StreamNotFound: (grpc.StatusCode.NOT_FOUND, "STREAM_NOT_FOUND"),
    StreamGone: (grpc.StatusCode.OUT_OF_RANGE, "STREAM_GONE"),
    TakenOver: (grpc.StatusCode.ABORTED, "TAKEN_OVER"),
    InternalError: (grpc.StatusCode.INTERNAL, "INTERNAL"),
}


@dataclass(frozen=True, slots=True)
class Status:
    """A gRPC status with its google.rpc details."""

    code: grpc.StatusCode
    message: str
    reason: str
    details: tuple[Message, ...] = ()

    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
        """The details, as gRPC carries them."""
        number: int = self.code.value[0]
        status = status_pb2.Status(code=number, message=self.message)
        for detail in self.details:
            packed = any_pb2.Any()
            packed.Pack(detail)
            status.details.append(packed)
        return ((STATUS_DETAILS_KEY, status.SerializeToString()),)


def status_of(error: SluiceError) -> Status:
    """Look the error up in the table."""
    code, reason = _TABLE[type(error)]
    message = _shorten(str(error), _MAX_MESSAGE_CHARS)
    metadata = error.metadata
    if hold_ms := round(error.hold * 1000):
        metadata["hold_ms"] = str(hold_ms)
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=reason, domain=ERROR_DOMAIN, metadata=metadata)
    ]
    if error.field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=message
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(round(error.retry_after * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    return Status(code, message, reason, tuple(details))


def _shorten(text: str, limit: int = 100) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
