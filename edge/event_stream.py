"""The streamed answer: its status waits for the worker, then one event for each message, and pings in between."""

import asyncio
from dataclasses import dataclass

import structlog
from starlette.types import Message, Receive, Scope, Send

from edge.connection import EXTENSION, Connection
from edge.dialects.dialect import StreamEncoder
from edge.error_response import Refuse
from edge.errors import ClientGoneError, EdgeError, server_error
from edge.generation import Generation
from edge.request_log import RequestRecord
from edge.worker_pool import WorkerPool

_log = structlog.get_logger("edge.request")


@dataclass(frozen=True)
class StreamTiming:
    """How long a stream is silent at most, and how long its reader may be."""

    heartbeat_seconds: float
    first_message_seconds: float
    send_timeout_seconds: float


class EventStream:
    """One streamed response."""

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        record: RequestRecord,
        timing: StreamTiming,
        encoder: StreamEncoder,
        refuse: Refuse,
    ) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._connection: Connection | None = scope.get("extensions", {}).get(EXTENSION)
        self._record = record
        self._timing = timing
        self._encoder = encoder
        self._refuse = refuse
        self._clock = asyncio.get_running_loop().time
        self._last_write = self._clock()
        self._is_begun = False
        # Events and pings come from two tasks.
        self._writing = asyncio.Lock()

    async def run(self, generation: Generation, workers: WorkerPool) -> None:
        """Sends the generation to its end. Failures become a status before the 200 and an event after it."""
        try:
            await self._run(generation, workers)
        except EdgeError as error:
            await self._fail(error)
        except ClientGoneError:
            raise
        except Exception:
            _log.exception("unexpected error", request_id=self._record.request_id)
            await self._fail(server_error())

    async def _run(self, generation: Generation, workers: WorkerPool) -> None:
        encoder = self._encoder
        pinging = asyncio.create_task(self._ping_forever(generation), name="heartbeat")
        try:
            started = await generation.open(workers)
            self._record.started()
            await self._write(b"".join(map(encoder.encode, range(len(started)), started)))
            has_token = False
            while (item := await generation.read()) is not None:
                await self._write(encoder.encode(*item) or encoder.ping)
                if not has_token and item[1].HasField("delta"):
                    has_token = True
                    self._record.first_token()
            await self._write(encoder.end(), is_last=True)
        finally:
            pinging.cancel()

    async def _fail(self, error: EdgeError) -> None:
        async with self._writing:
            self._record.error(error)
            if not self._is_begun:
                self._is_begun = True
                refusal = self._refuse(error, self._record.request_id)
                await refusal(self._scope, self._receive, self._send)
                return
        connection = self._connection if self._encoder.is_cut_on_error else None
        await self._write(self._encoder.error(error), is_last=connection is None)
        if connection is not None:
            connection.cut()

    async def _ping_forever(self, generation: Generation) -> None:
        try:
            while True:
                limit = self._timing.first_message_seconds
                if self._is_begun:
                    limit = self._timing.heartbeat_seconds
                left = limit - (self._clock() - self._last_write)
                if left > 0:
                    await asyncio.sleep(min(left, self._timing.heartbeat_seconds))
                elif self._writing.locked():  # an event waits for its reader
                    await asyncio.sleep(self._timing.heartbeat_seconds)
                else:
                    self._record.metrics.heartbeats.inc()
                    await self._write(self._encoder.ping)
        except ClientGoneError as reason:
            generation.stop(reason)

    async def _write(self, data: bytes, is_last: bool = False) -> None:
        connection = self._connection
        self._record.sent_bytes += len(data)
        if self._is_begun and not data and not is_last:  # the ping of a format that has none
            self._last_write = self._clock()
            return
        if (
            self._is_begun
            and connection is not None
            and connection.is_writable
            and not self._writing.locked()
        ):
            # Nearly always: such a send returns at once, so that nobody can come between and there is no time to limit.
            await self._record.send_body(
                {"type": "http.response.body", "body": data, "more_body": not is_last}
            )
            self._last_write = self._clock()
            return
        async with self._writing:
            if not self._is_begun:
                self._is_begun = True
                await self._send_in_time(
                    self._send,
                    {
                        "type": "http.response.start",
                        "status": 200,
                        "headers": self._encoder.headers,
                    },
                )
            await self._send_in_time(
                self._record.send_body,
                {"type": "http.response.body", "body": data, "more_body": not is_last},
            )
            self._last_write = self._clock()

    async def _send_in_time(self, send: Send, message: Message) -> None:
        connection = self._connection
        if connection is not None and connection.is_writable:
            await send(message)
            return
        try:
            async with asyncio.timeout(self._timing.send_timeout_seconds):
                await send(message)
        except TimeoutError:
            self._record.fields["finish"] = "send_timeout"
            self._record.metrics.slow_readers.inc()
            if connection is not None:
                connection.abort()
            raise ClientGoneError from None
