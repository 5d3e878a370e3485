"""One id and one log line for each request."""

import asyncio
import re
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge.connection import EXTENSION, Connection
from edge.error_response import error_response
from edge.errors import ClientGoneError, EdgeError, overloaded, server_error
from edge.metrics import PHASES, EdgeMetrics

SWITCHING_PROTOCOLS = 101
CLIENT_CLOSED_REQUEST = 499
_CLIENT_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# A field that a client made up may be called anything, a text of a prompt's too: such a one is not logged.
_FIELD_NAME = re.compile(r"[A-Za-z0-9_.\[\]-]{1,128}")
# Asked every few seconds by orchestrators and scrapers, who must get their answer however many others are connected.
_PROBES = frozenset({"/health", "/ready", "/metrics", "/v2/health/live", "/v2/health/ready"})
# What begins an answer: a response, the refusal of a WebSocket, or its acceptance, which has no status of its own.
_HEADS = frozenset({"http.response.start", "websocket.http.response.start", "websocket.accept"})
_MAX_DETAILS = 500
_STATE_KEY = "sluice_record"
_log = structlog.get_logger("edge.request")


@dataclass
class RequestRecord:
    """What is known of a request; becomes its log line. Never holds text of a prompt or a completion."""

    request_id: str
    client_request_id: str | None
    # Sends past the middleware, which has nothing to do with what follows the head of a response.
    send_body: Send
    metrics: EdgeMetrics
    connection: Connection | None = None
    begun: float = field(default_factory=time.monotonic)
    status: int | None = None
    is_client_gone: bool = False
    # Whether somebody should look into it.
    is_failure: bool = False
    # How far its generation came; one of the metrics' phases.
    phase: str = PHASES[0]
    sent_bytes: int = 0
    fields: dict[str, Any] = field(default_factory=dict)

    def seconds(self) -> float:
        """Since the request came."""
        return round(time.monotonic() - self.begun, 6)

    def started(self) -> None:
        """Notes that the worker admitted the request."""
        self.phase = PHASES[1]

    def client_left(self) -> None:
        """Notes that the calls are cancelled since the client closed its connection."""
        closed_at = self.connection.closed_at if self.connection else None
        if closed_at is not None:
            seconds = asyncio.get_running_loop().time() - closed_at
            self.metrics.cancelled(self.phase, seconds)

    def first_token(self) -> None:
        """Notes the time to the first token, once."""
        if "ttft" not in self.fields:
            self.fields["ttft"] = seconds = self.seconds()
            self.phase = PHASES[2]
            self.metrics.first_token(seconds)

    def error(self, error: EdgeError) -> None:
        """Notes how the request failed."""
        self.fields["error"] = error.type
        self.metrics.failed(error.type)
        if error.param is not None and _FIELD_NAME.fullmatch(error.param):
            self.fields["param"] = error.param
        if error.grpc_code is not None:
            self.fields["grpc_code"] = error.grpc_code
        if error.status >= 500 or self.status is not None:  # the latter: after the 200
            self.is_failure = True
            # Not of refusals: what a worker says of a field may quote it.
            if error.grpc_details:
                self.fields["grpc_details"] = error.grpc_details[:_MAX_DETAILS]


def record_of(scope: Scope) -> RequestRecord:
    """The record of a request."""
    record: RequestRecord = scope["state"][_STATE_KEY]
    return record


class RequestLog:
    """ASGI middleware: ids in and out, the log line, and the answer to what nobody caught; none to a client that left.

    A client's `x-request-id` of up to 128 characters of [A-Za-z0-9._:-] comes back in `x-request-id` and `request-id`
    and stands in the log. Any other value is ignored, and the edge's own id takes its place. The worker only ever sees
    ids that the edge made, since a client may send the same one twice.
    """

    def __init__(self, app: ASGIApp, metrics: EdgeMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        is_socket = scope["type"] == "websocket"
        given = Headers(scope=scope).get("x-request-id", "")
        connection: Connection | None = scope.get("extensions", {}).get(EXTENSION)
        record = RequestRecord(
            request_id=connection.request_id if connection else f"req-{uuid.uuid4().hex}",
            client_request_id=given if _CLIENT_ID.fullmatch(given) else None,
            send_body=connection.sender() if connection and not is_socket else send,
            metrics=self._metrics,
            connection=connection,
        )
        scope.setdefault("state", {})[_STATE_KEY] = record
        shown = record.client_request_id or record.request_id
        if connection is not None:
            connection.shown_id = shown

        async def send_with_ids(message: Message) -> None:
            if message["type"] in _HEADS:
                record.status = message.get("status", SWITCHING_PROTOCOLS)
                message.setdefault("headers", [])
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = shown
                headers["request-id"] = shown
            else:
                record.sent_bytes += len(message.get("body", b""))
            await send(message)

        try:
            await self._answer(scope, receive, send_with_ids, record, connection)
        finally:
            self._write(scope, record, connection)

    async def _answer(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        record: RequestRecord,
        connection: Connection | None,
    ) -> None:
        if connection is not None and scope["path"] not in _PROBES and connection.is_surplus:
            refusal = overloaded("Too many connections; try again soon.")
            record.error(refusal)
            refusal.headers["connection"] = "close"
            await error_response(refusal)(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        except ClientGoneError:
            record.is_client_gone = True
        except Exception:
            _log.exception("unexpected error", request_id=record.request_id)
            if record.status is None:
                failure = server_error()
                record.error(failure)
                await error_response(failure)(scope, receive, send)
            elif connection is not None:
                record.is_failure = True
                connection.cut()

    @staticmethod
    def _write(scope: Scope, record: RequestRecord, connection: Connection | None) -> None:
        route = scope.get("route")
        status = record.status or CLIENT_CLOSED_REQUEST
        if record.is_client_gone:
            status = CLIENT_CLOSED_REQUEST
        if connection is not None:
            status = connection.refused_status or status
            if connection.finish is not None:
                record.fields["finish"] = connection.finish
        seconds = record.seconds()
        path = getattr(route, "path", None)
        method = scope.get("method", "GET")  # a handshake's
        record.metrics.answered(path, method, status, seconds, record.sent_bytes)
        write = _log.debug if scope["path"] in _PROBES else _log.info
        if record.is_failure:
            write = _log.warning
        write(
            "request",
            request_id=record.request_id,
            client_request_id=record.client_request_id,
            method=method,
            route=path,
            status=status,
            duration=seconds,
            **record.fields,
        )
