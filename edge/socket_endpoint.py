"""The WebSocket at /v1/ws: one conversation, one generation at a time."""

import asyncio
import contextlib
import time
from dataclasses import dataclass, field, replace
from typing import Any, Final
from urllib.parse import urlsplit

import structlog
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from edge.connection import EXTENSION, Connection
from edge.conversation import Answer, Conversation
from edge.dialects import socket as dialect
from edge.dialects.dialect import PromptLimits
from edge.drain import Drain
from edge.error_response import error_response
from edge.errors import ClientGoneError, EdgeError, permission_denied, server_error
from edge.gate import Gate, caller_of
from edge.generation import Generation
from edge.request_body import parsed
from edge.request_log import RequestRecord, record_of
from edge.settings import EdgeSettings
from edge.worker_pool import WorkerPool
from protos.sluice.v1 import generation_pb2 as pb

# Why a socket is closed, by RFC 6455, section 7.4.1.
NORMAL: Final = 1000
GOING_AWAY: Final = 1001
UNSUPPORTED_DATA: Final = 1003
POLICY_VIOLATION: Final = 1008

# Ends of a choice whose text is an answer, with which a conversation can go on.
_ANSWERS: Final = frozenset(
    {
        pb.FINISH_REASON_STOP,
        pb.FINISH_REASON_STOP_SEQUENCE,
        pb.FINISH_REASON_LENGTH,
        pb.FINISH_REASON_TOOL_CALLS,
    }
)
_log = structlog.get_logger("edge.request")


class SocketEndpoint:
    """Opens sockets, or refuses them as an HTTP request."""

    def __init__(
        self, workers: WorkerPool, drain: Drain, settings: EdgeSettings, gate: Gate
    ) -> None:
        self.workers = workers
        self.drain = drain
        self.settings = settings
        self.gate = gate
        self._origins = settings.allowed_origins()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record = record_of(scope)
        try:
            self._require_known_page(scope)
            self.drain.require_open()
        except EdgeError as error:
            record.error(error)
            await error_response(error, record.request_id)(scope, receive, send)
            return
        await receive()  # websocket.connect
        await send({"type": "websocket.accept"})
        await Socket(self, scope, receive, send).run()

    def _require_known_page(self, scope: Scope) -> None:
        """Raises a 403 for a page from elsewhere: browsers let any page open a socket to anywhere (RFC 6455, 10.2).

        The page's own server is known by its host alone, since a proxy may have ended its TLS.
        """
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        if origin is None or origin in self._origins or "*" in self._origins:
            return
        with contextlib.suppress(ValueError):
            if urlsplit(origin).netloc.lower() == headers.get("host", "").lower() != "":
                return
        raise permission_denied(
            "Pages of this origin may not open a socket here: cors_origins does not have it.",
            "origin_not_allowed",
        )


@dataclass
class _Turn:
    """One generation on a socket."""

    asked: dialect.Generate
    generation: Generation
    encoder: dialect.SocketEncoder
    record: RequestRecord
    # What the model is told, and what it says; None and unused where the request is no conversation.
    messages: list[pb.ChatMessage] | None
    answer: Answer = field(default_factory=Answer)
    is_cancelled: bool = False


class Socket:
    """One open socket."""

    def __init__(
        self, endpoint: SocketEndpoint, scope: Scope, receive: Receive, send: Send
    ) -> None:
        self._endpoint = endpoint
        self._scope, self._receive, self._asgi_send = scope, receive, send
        self._record = record_of(scope)
        self._connection: Connection | None = scope.get("extensions", {}).get(EXTENSION)
        settings = endpoint.settings
        self._limits = PromptLimits.of(settings)
        self._idle_seconds = settings.socket_idle_seconds
        self._send_seconds = settings.send_timeout_seconds
        self._conversation = Conversation(settings.max_body_bytes)
        self._turn: _Turn | None = None
        self._running: asyncio.Task[None] | None = None
        self._turns = self._refused = 0

    async def run(self) -> None:
        """Serves until one of the two closes."""
        self._receiving = asyncio.ensure_future(self._receive())
        refusing = asyncio.ensure_future(self._endpoint.drain.refusing())
        try:
            await self._serve(refusing)
        except ClientGoneError:
            self._record.is_client_gone = True
        finally:
            refusing.cancel()
            self._receiving.cancel()
            self._record.fields |= {"generations": self._turns, "refused_frames": self._refused}
            if self._turn is not None and self._running is not None:
                self._turn.generation.stop(ClientGoneError())
                self._turn.record.client_left()
                await self._running

    async def _serve(self, refusing: asyncio.Future[None]) -> None:
        while True:
            waits: set[asyncio.Future[Any]] = {self._receiving}
            waits |= set() if refusing.done() else {refusing}
            waits |= set() if self._running is None else {self._running}
            limit = self._idle_seconds if self._running is None else None
            done, _ = await asyncio.wait(waits, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if self._running in done:
                self._running = self._turn = None
            if self._receiving in done:
                message = self._receiving.result()
                if message["type"] == "websocket.disconnect" or not await self._take(message):
                    return
                self._receiving = asyncio.ensure_future(self._receive())
            elif refusing.done() and self._running is None:
                await self._close(GOING_AWAY, "the server is shutting down")
                return
            elif not done:
                await self._close(NORMAL, "idle")
                return

    async def _take(self, message: Message) -> bool:
        """Does what a frame asks for; False where that closed the socket."""
        text = message.get("text")
        if text is None:
            await self._close(UNSUPPORTED_DATA, "frames are text")
            return False
        if not self._endpoint.gate.holds(self._scope):
            await self._close(POLICY_VIOLATION, "the API key is no longer valid")
            return False
        frame_id = None

        def parse(body: dict[str, Any]) -> dialect.Generate | dialect.Cancel:
            nonlocal frame_id
            frame_id = dialect.id_of(body)
            return dialect.parse(body, self._limits)

        try:
            wish = await parsed(text.encode(), self._limits, parse)
            if isinstance(wish, dialect.Cancel):
                self._cancel(wish)
            else:
                await self._begin(wish)
        except EdgeError as error:
            self._refused += 1
            self._record.metrics.failed(error.type)
            await self._send(dialect.failed(frame_id, error))
        return True

    def _cancel(self, wish: dialect.Cancel) -> None:
        turn = self._turn
        if turn is None or turn.encoder.is_over or wish.id not in (None, turn.asked.id):
            return
        turn.is_cancelled = True
        turn.generation.stop(ClientGoneError())

    async def _begin(self, asked: dialect.Generate) -> None:
        if self._turn is not None and self._running is not None:
            if not self._turn.encoder.is_over:
                raise EdgeError(
                    409,
                    "invalid_request_error",
                    "A generation is running on this socket: wait for its end, cancel it, or open another.",
                    "generation_running",
                )
            await self._running  # its client has heard of its end before it ended here
        messages = None
        if asked.chat is not None:
            messages = list(asked.chat.messages)
            if asked.continues:
                messages = self._conversation.continued(messages[0])
                del asked.chat.messages[:]
                asked.chat.messages.extend(messages)
        caller = caller_of(self._scope)
        if caller is not None:
            asked.parsed.requests[0].caller.CopyFrom(caller)
        self._turns += 1
        self._turn = _Turn(
            asked,
            Generation(asked.parsed.requests, asked.parsed.field_name),
            dialect.SocketEncoder(asked.id),
            replace(self._record, begun=time.monotonic(), status=None, fields={}),
            messages,
        )
        self._running = asyncio.create_task(self._generate(self._turn), name="socket generation")

    async def _generate(self, turn: _Turn) -> None:
        """Sends one generation to its end. Raises nothing: a client that is gone is seen where frames are received."""
        try:
            with self._endpoint.drain.running(turn.generation):
                await self._answer(turn)
        except ClientGoneError:
            with contextlib.suppress(ClientGoneError):
                for frame in turn.encoder.cancelled() if turn.is_cancelled else ():
                    await self._send(frame)
        except EdgeError as error:
            await self._fail(turn, error)
        except Exception:
            _log.exception("unexpected error", request_id=self._record.request_id)
            await self._fail(turn, server_error())
        finally:
            turn.generation.cancel()
            self._log(turn)

    async def _answer(self, turn: _Turn) -> None:
        generation, encoder = turn.generation, turn.encoder
        for started in await generation.open(self._endpoint.workers):
            turn.record.started()
            turn.record.status = self._record.status
            await self._send(encoder.encode(0, started))
        has_answered = False
        while (item := await generation.read()) is not None:
            message = item[1]
            if message.HasField("delta"):
                turn.record.first_token()
                turn.answer.add(message.delta)
            elif message.HasField("finished") and message.finished.choice_index == 0:
                has_answered = message.finished.finish_reason in _ANSWERS
            frame = encoder.encode(*item)
            if encoder.is_over and has_answered and turn.messages is not None:
                # Before the client hears of it, who may go on at once.
                self._conversation.keep(turn.messages, turn.answer.message())
            if frame:
                await self._send(frame)

    async def _fail(self, turn: _Turn, error: EdgeError) -> None:
        turn.record.error(error)
        with contextlib.suppress(ClientGoneError):
            await self._send(turn.encoder.error(error))

    def _log(self, turn: _Turn) -> None:
        record = turn.record
        write = _log.warning if record.is_failure else _log.info
        write(
            "generation",
            request_id=record.request_id,
            client_request_id=record.client_request_id,
            generation_id=turn.asked.parsed.generation_id,
            duration=record.seconds(),
            **record.fields | turn.generation.summary(),
        )

    async def _close(self, code: int, reason: str) -> None:
        await self._deliver({"type": "websocket.close", "code": code, "reason": reason})
        self._record.fields["close_code"] = code

    async def _send(self, frame: bytes) -> None:
        await self._deliver({"type": "websocket.send", "text": frame.decode()})

    async def _deliver(self, message: Message) -> None:
        try:
            async with asyncio.timeout(self._send_seconds):
                await self._asgi_send(message)
        except TimeoutError:
            self._record.fields["finish"] = "send_timeout"
            self._record.metrics.slow_readers.inc()
            if self._connection is not None:
                self._connection.abort()
            raise ClientGoneError from None
        except OSError:  # as ASGI has it where nobody is left to send to
            raise ClientGoneError from None
