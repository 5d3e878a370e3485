"""The one table from the worker's statuses to HTTP, and the error that carries a row of it."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import grpc
from google.rpc import error_details_pb2, status_pb2

from protos.sluice.v1 import generation_pb2 as pb

DETAILS_KEY = "grpc-status-details-bin"
ERROR_DOMAIN = "sluice"
# Fields of a GenerateRequest that stand in messages of it.
_CONTRACT_PATH = re.compile(r"(?<![\w.])(?:prompt|sampling|stopping|output)(?:\.\w+|\[\w+\])+")
RETRY_MIN_MS, RETRY_MAX_MS = 1000, 5000


# What the body's `code` says of a refusal, by the worker's reason.
OVERLOAD_CODES = {
    "QUEUE_FULL": "queue_full",
    "TOKEN_BUDGET": "token_budget",
    "WOULD_MISS_DEADLINE": "would_miss_deadline",
    "KEY_LIMIT": "key_limit",
}


@dataclass(eq=False)
class EdgeError(Exception):
    """A failure as a client sees it: an HTTP status before the 200, an error event after it."""

    status: int
    type: str
    message: str
    code: str | None = None
    param: str | None = None
    retry_after_ms: int | None = None
    is_retryable: bool | None = None
    headers: dict[str, str] = field(default_factory=dict)
    # What the worker or the transport said, for the log alone.
    grpc_code: str | None = None
    grpc_details: str | None = None
    # Of the worker's ErrorInfo.
    reason: str | None = None
    # For how long the worker's refusal holds for all requests of the same key.
    hold_ms: int | None = None
    # Whether only this connection fails: the stream goes on, for whoever comes back for the rest of it.
    is_resumable: bool = False

    def __str__(self) -> str:
        return f"{self.status} {self.type}: {self.message}"

    def rename_param(self, name: Callable[[str], str]) -> None:
        """Calls the field that was refused, and all that the message names, what the client calls them."""
        if self.param is not None:
            path, self.param = self.param, name(self.param)
            if self.message.startswith(f"{path}:"):
                self.message = self.param + self.message.removeprefix(path)
        self.message = _CONTRACT_PATH.sub(lambda match: name(match[0]), self.message)

    def body(self) -> dict[str, dict[str, str | None]]:
        """The error object of the OpenAI routes, which the native dialect shares."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }

    def http_headers(self) -> dict[str, str]:
        """Headers that tell clients whether and when to try again."""
        headers = dict(self.headers)
        if self.retry_after_ms is not None:
            headers["retry-after"] = str(math.ceil(self.retry_after_ms / 1000))
            headers["retry-after-ms"] = str(self.retry_after_ms)
        if self.is_retryable is not None:
            headers["x-should-retry"] = "true" if self.is_retryable else "false"
        return headers


class ClientGoneError(Exception):
    """The client closed its connection or stopped reading; nobody is there to hear of it."""


@dataclass(frozen=True)
class Row:
    """What one status becomes."""

    status: int
    type: str
    code: str | None = None
    # What a client reads when the worker's own words must not or need not be shown; None shows the worker's.
    message: str | None = None
    # Whether Retry-After goes along.
    retry: bool = False
    # Overrides what SDKs make of the HTTP status; None leaves it to them.
    is_retryable: bool | None = None


_BUG = Row(500, "server_error", message="The server failed to process the request.")

# One row for every gRPC status but OK.
STATUS_TABLE: dict[grpc.StatusCode, Row] = {
    grpc.StatusCode.INVALID_ARGUMENT: Row(400, "invalid_request_error"),
    grpc.StatusCode.OUT_OF_RANGE: Row(400, "invalid_request_error"),
    grpc.StatusCode.FAILED_PRECONDITION: Row(400, "invalid_request_error"),
    # A 5xx would make SDKs try again what this worker cannot do.
    grpc.StatusCode.UNIMPLEMENTED: Row(400, "invalid_request_error", "unsupported"),
    grpc.StatusCode.UNAUTHENTICATED: Row(401, "authentication_error"),
    grpc.StatusCode.PERMISSION_DENIED: Row(403, "permission_error"),
    grpc.StatusCode.NOT_FOUND: Row(404, "not_found_error", "model_not_found"),
    grpc.StatusCode.ALREADY_EXISTS: Row(409, "invalid_request_error", "already_exists"),
    grpc.StatusCode.RESOURCE_EXHAUSTED: Row(
        429, "overloaded", "overloaded", retry=True, is_retryable=True
    ),
    grpc.StatusCode.CANCELLED: Row(
        499, "cancelled", "cancelled", message="The generation was aborted.", is_retryable=False
    ),
    grpc.StatusCode.UNAVAILABLE: Row(503, "unavailable", "unavailable", retry=True),
    grpc.StatusCode.ABORTED: Row(503, "unavailable", "unavailable", retry=True),
    grpc.StatusCode.DEADLINE_EXCEEDED: Row(
        504, "timeout", "timeout", message="The request took longer than its deadline."
    ),
    grpc.StatusCode.INTERNAL: _BUG,
    grpc.StatusCode.UNKNOWN: _BUG,
    grpc.StatusCode.DATA_LOSS: _BUG,
}

STREAM_NOT_FOUND = "STREAM_NOT_FOUND"
# Reasons of the worker that say more than their status: these rows come before the status's.
REASON_TABLE: dict[str, Row] = {
    STREAM_NOT_FOUND: Row(410, "invalid_request_error", "stream_gone", is_retryable=False),
    "STREAM_GONE": Row(410, "invalid_request_error", "stream_gone", is_retryable=False),
    "TAKEN_OVER": Row(409, "invalid_request_error", "taken_over", is_retryable=False),
}

# Finish reasons that are no success, for dialects that cannot say them in a finish reason of their own.
FINISH_TABLE: dict[pb.FinishReason.ValueType, Row] = {
    pb.FINISH_REASON_CANCELLED: STATUS_TABLE[grpc.StatusCode.CANCELLED],
    pb.FINISH_REASON_DEADLINE: STATUS_TABLE[grpc.StatusCode.DEADLINE_EXCEEDED],
    pb.FINISH_REASON_SHUTDOWN: replace(
        STATUS_TABLE[grpc.StatusCode.UNAVAILABLE],
        message="The worker shut down before the end of the generation.",
    ),
    pb.FINISH_REASON_PREEMPTED: replace(
        STATUS_TABLE[grpc.StatusCode.RESOURCE_EXHAUSTED],
        code="preempted",
        message="The generation lost its memory to others and could not go on.",
    ),
    pb.FINISH_REASON_SLOW_READER: Row(
        408, "timeout", "slow_reader", message="The generation was not read fast enough."
    ),
}

_FALLBACK_MESSAGES = {
    grpc.StatusCode.UNAVAILABLE: "The worker could not be reached, or was lost.",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "The server is overloaded; try again soon.",
}


def invalid_request(message: str, param: str | None = None, code: str | None = None) -> EdgeError:
    """A 400 that the edge itself finds."""
    return EdgeError(400, "invalid_request_error", message, code, param)


def unauthenticated(message: str, is_given: bool = False) -> EdgeError:
    """A 401: no API key, or with `is_given` one that is not known.

    SDKs raise their authentication error for it; a 403 would say that somebody is known and may not.
    """
    error = _from_row(STATUS_TABLE[grpc.StatusCode.UNAUTHENTICATED], message, None, None)
    error.code = "invalid_api_key" if is_given else None
    # RFC 6750, section 3
    challenge = 'Bearer realm="sluice"' + (', error="invalid_token"' if is_given else "")
    error.headers["www-authenticate"] = challenge
    return error


def permission_denied(message: str, code: str) -> EdgeError:
    """A 403 for somebody who is known."""
    error = _from_row(STATUS_TABLE[grpc.StatusCode.PERMISSION_DENIED], message, None, None)
    error.code = code
    return error


def unavailable(message: str) -> EdgeError:
    """A 503 that the edge itself finds."""
    return _from_row(STATUS_TABLE[grpc.StatusCode.UNAVAILABLE], message, None, RETRY_MIN_MS)


def overloaded(message: str) -> EdgeError:
    """A 429 that the edge itself finds."""
    return _from_row(STATUS_TABLE[grpc.StatusCode.RESOURCE_EXHAUSTED], message, None, RETRY_MIN_MS)


def server_error() -> EdgeError:
    """A 500, which says nothing of its cause."""
    return _from_row(_BUG, "", None, RETRY_MIN_MS)


def deadline_passed() -> EdgeError:
    """A 504 that the edge itself finds."""
    return from_status(grpc.StatusCode.DEADLINE_EXCEEDED, None, None)


def aborted() -> EdgeError:
    """A 499: somebody ended the generation by its name."""
    return from_status(grpc.StatusCode.CANCELLED, None, None)


def is_lost(error: BaseException) -> bool:
    """Whether it says that a worker could not be reached, or was lost."""
    is_unavailable = grpc.StatusCode.UNAVAILABLE.name
    return isinstance(error, EdgeError) and error.grpc_code == is_unavailable


def from_finish(reason: pb.FinishReason.ValueType) -> EdgeError | None:
    """The failure behind a finish reason, or None for those that mean success."""
    row = FINISH_TABLE.get(reason)
    return None if row is None else _from_row(row, "", None, RETRY_MIN_MS)


def from_status(code: grpc.StatusCode, details: str | None, rich: bytes | None) -> EdgeError:
    """The failure behind the status of a call; `rich` is a serialized google.rpc.Status."""
    error = _from_call_status(code, details, rich)
    error.grpc_code, error.grpc_details = code.name, details
    return error


def _from_call_status(code: grpc.StatusCode, details: str | None, rich: bytes | None) -> EdgeError:
    info = _Details.parse(rich)
    row = REASON_TABLE.get(info.reason or "") or STATUS_TABLE.get(code, _BUG)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and not info.is_ours and _is_size(details):
        return EdgeError(
            413, "invalid_request_error", "The request is larger than the worker takes."
        )
    # Words of the transport tell of addresses and internals; only the worker's own are shown.
    shown = details if info.is_ours or code not in _FALLBACK_MESSAGES else None
    message = shown or _FALLBACK_MESSAGES.get(code) or "The request was refused."
    error = _from_row(row, message, info.param, info.retry_ms)
    error.reason = info.reason
    error.hold_ms = info.hold_ms
    if code is grpc.StatusCode.NOT_FOUND and info.reason and "REQUEST" in info.reason:
        error.code = "request_not_found"
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and info.reason in OVERLOAD_CODES:
        error.code = OVERLOAD_CODES[info.reason]
        if info.reason == "KEY_LIMIT":  # the client's own doing, and as long as it takes
            error.type = "rate_limit_error"
            error.retry_after_ms = max(info.retry_ms or 0, RETRY_MIN_MS)
    return error


def _from_row(row: Row, message: str, param: str | None, retry_ms: int | None) -> EdgeError:
    retry_after_ms = None
    if row.retry:
        wanted = RETRY_MIN_MS if retry_ms is None else retry_ms
        retry_after_ms = min(max(wanted, RETRY_MIN_MS), RETRY_MAX_MS)
    return EdgeError(
        row.status,
        row.type,
        row.message or message,
        row.code,
        param,
        retry_after_ms,
        row.is_retryable,
    )


def _is_size(details: str | None) -> bool:
    return details is not None and "larger than max" in details


@dataclass(frozen=True)
class _Details:
    """What google.rpc details say."""

    param: str | None = None
    reason: str | None = None
    retry_ms: int | None = None
    hold_ms: int | None = None
    is_ours: bool = False

    @classmethod
    def parse(cls, rich: bytes | None) -> "_Details":
        if not rich:
            return cls()
        status = status_pb2.Status()
        try:
            status.ParseFromString(rich)
        except ValueError:  # protobuf's DecodeError is one
            return cls()
        param = reason = retry_ms = hold_ms = None
        is_ours = False
        bad, info = error_details_pb2.BadRequest(), error_details_pb2.ErrorInfo()
        retry = error_details_pb2.RetryInfo()
        for detail in status.details:
            if detail.Unpack(bad) and bad.field_violations:
                param, is_ours = bad.field_violations[0].field, True
            elif detail.Unpack(info):
                reason, is_ours = info.reason, is_ours or info.domain == ERROR_DOMAIN
                hold_ms = _number(info.metadata.get("hold_ms", ""))
            elif detail.Unpack(retry):
                retry_ms, is_ours = retry.retry_delay.ToMilliseconds(), True
        return cls(param, reason, retry_ms, hold_ms, is_ours)


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else None
