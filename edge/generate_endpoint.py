"""The raw ASGI endpoint of every route that generates, whatever its dialect."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from edge.dialects.dialect import Collector, ParsedRequest, PromptLimits
from edge.drain import Drain
from edge.error_response import Refuse
from edge.errors import ClientGoneError, EdgeError
from edge.event_stream import EventStream, StreamTiming
from edge.gate import caller_of
from edge.generation import Generation
from edge.presence import until_gone
from edge.request_log import RequestRecord, record_of
from edge.request_timeout import limit_by_header
from edge.settings import EdgeSettings
from edge.worker_pool import WorkerPool
from protos.sluice.v1 import generation_pb2 as pb

# Reads and checks a request; None means that nothing is left to send (204).
Parse = Callable[[Request, PromptLimits], Awaitable[ParsedRequest | None]]


class GenerateEndpoint:
    """Parses with a dialect, generates with a worker, answers with the dialect's encoder."""

    def __init__(
        self,
        parse: Parse,
        refuse: Refuse,
        workers: WorkerPool,
        drain: Drain,
        settings: EdgeSettings,
    ) -> None:
        self._parse = parse
        self._refuse = refuse
        self._workers = workers
        self._drain = drain
        self._limits = PromptLimits.of(settings)
        self._timing = StreamTiming(
            settings.heartbeat_seconds,
            settings.first_message_seconds,
            settings.send_timeout_seconds,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record = record_of(scope)
        try:
            request = Request(scope, receive)
            parsed = await self._parse(request, self._limits)
            if parsed is None:
                await Response(status_code=204)(scope, receive, send)
                return
            limit_by_header(request, parsed.requests)
            caller = caller_of(scope)
            if caller is not None:
                for message in parsed.requests:
                    message.caller.CopyFrom(caller)
            generation = Generation(parsed.requests, parsed.field_name)
            with self._drain.running(generation), _watched(receive, generation, record):
                await self._generate(parsed, generation, scope, receive, send)
        except EdgeError as error:
            record.error(error)
            await self._refuse(error, record.request_id)(scope, receive, send)

    async def _generate(
        self,
        parsed: ParsedRequest,
        generation: Generation,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        record = record_of(scope)
        record.fields |= {"generation_id": parsed.generation_id, "streamed": parsed.streamed}
        try:
            if parsed.streamed:
                stream = EventStream(
                    scope, receive, send, record, self._timing, parsed.encoder(), self._refuse
                )
                await stream.run(generation, self._workers)
            else:
                body = await self._collect_or_abort(parsed, generation, record)
                response = Response(body, media_type="application/json")
                await response(scope, receive, send)
        finally:
            generation.cancel()
            record.fields |= generation.summary()

    async def _collect_or_abort(
        self, parsed: ParsedRequest, generation: Generation, record: RequestRecord
    ) -> bytes:
        try:
            return await self._collect(generation, parsed.collector(), record)
        except (ClientGoneError, EdgeError) as error:
            if isinstance(error, ClientGoneError) or error.is_resumable:
                await self._abort(parsed)
            raise

    async def _abort(self, parsed: ParsedRequest) -> None:
        """Ends generations that would outlive their call, when nobody has heard the names to resume them by."""
        for request in parsed.requests:
            if request.HasField("resume_window"):
                caller = request.caller if request.HasField("caller") else None
                with contextlib.suppress(EdgeError):
                    await self._workers.abort(
                        pb.AbortRequest(request_id=request.request_id), caller
                    )

    async def _collect(
        self, generation: Generation, collector: Collector, record: RequestRecord
    ) -> bytes:
        started = await generation.open(self._workers)
        record.started()
        for prompt, message in enumerate(started):
            collector.add(prompt, message)
        while (item := await generation.read()) is not None:
            if item[1].HasField("delta"):
                record.first_token()
            collector.add(*item)
        return collector.body()


@contextlib.contextmanager
def _watched(receive: Receive, generation: Generation, record: RequestRecord) -> Iterator[None]:
    """Stops the generation when the client leaves."""

    async def watch() -> None:
        await until_gone(receive)
        generation.stop(ClientGoneError())
        record.client_left()

    watcher = asyncio.create_task(watch(), name="disconnect watcher")
    try:
        yield
    finally:
        watcher.cancel()
