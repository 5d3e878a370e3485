"""The gRPC service: calls the worker, writes what it yields, and turns its errors into statuses."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any, Final

import grpc
import grpc.aio
from google.protobuf.message import Message

from inference_worker.errors import InternalError, SlowReader, SluiceError, status_of
from inference_worker.request_log import get_logger
from inference_worker.watchdog import Watchdog
from inference_worker.worker import Worker
from protos.sluice.v1 import generation_pb2 as pb
from protos.sluice.v1 import generation_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]

_ABORT_SECONDS: Final = 1.0


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """sluice.v1.GenerationService on grpc.aio."""

    def __init__(self, worker: Worker, send_timeout_seconds: float) -> None:
        self._worker = worker
        self._send_timeout_seconds = send_timeout_seconds

    # A coroutine that writes, not an async generator: grpc.aio may clean up a generator in another task.
    async def Generate(  # type: ignore[override]  # noqa: N802
        self, request: pb.GenerateRequest, context: Context
    ) -> None:
        """Stream one generation."""
        remaining = context.time_remaining()
        deadline = None if remaining is None else time.monotonic() + remaining
        async with statuses(context), aclosing(self._worker.generate(request, deadline)) as stream:
            with Writer(context, self._send_timeout_seconds) as writer:
                async for message in stream:
                    try:
                        await writer.write(message)
                    except SlowReader as error:
                        await stream.athrow(error)  # raises it again, once the log has it

    async def Abort(  # noqa: N802
        self, request: pb.AbortRequest, context: Context
    ) -> pb.AbortResponse:
        """End a generation from another connection."""
        async with statuses(context):
            return self._worker.abort(request)

    async def GetModel(  # noqa: N802
        self, request: pb.GetModelRequest, context: Context
    ) -> pb.GetModelResponse:
        """Describe the served model."""
        async with statuses(context):
            return self._worker.get_model(request)

    async def GetLoad(  # noqa: N802
        self, request: pb.GetLoadRequest, context: Context
    ) -> pb.GetLoadResponse:
        """Tell how busy the worker is."""
        async with statuses(context):
            return self._worker.get_load(request)

    async def Tokenize(  # noqa: N802
        self, request: pb.TokenizeRequest, context: Context
    ) -> pb.TokenizeResponse:
        """Turn a prompt into token ids."""
        async with statuses(context):
            return await self._worker.tokenize(request)

    async def Detokenize(  # noqa: N802
        self, request: pb.DetokenizeRequest, context: Context
    ) -> pb.DetokenizeResponse:
        """Turn token ids into text."""
        async with statuses(context):
            return await self._worker.detokenize(request)


class Writer:
    """Writes the messages of one stream, as long as its caller reads them. A context manager."""

    def __init__(self, context: Context, timeout_seconds: float) -> None:
        self._context = context
        self._timeout_seconds = timeout_seconds
        self._task = asyncio.current_task()
        self._is_overdue = False
        self._pending = Watchdog(timeout_seconds, self._give_up)

    def __enter__(self) -> Writer:
        self._pending.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._pending.__exit__()

    async def write(self, message: Message) -> None:
        """Write a message. Raises: SlowReader."""
        self._pending.begin()
        try:
            await self._context.write(message)
        except asyncio.CancelledError:
            # A caller that goes away at this very moment has cancelled the task as well; that remains.
            if self._is_overdue and self._task is not None and self._task.uncancel() == 0:
                raise SlowReader(self._timeout_seconds) from None
            raise
        finally:
            self._pending.end()

    def _give_up(self) -> None:
        if not self._is_overdue and self._task is not None:
            self._is_overdue = True
            self._task.cancel()


@asynccontextmanager
async def statuses(context: Context) -> AsyncGenerator[None, None]:
    """End the call with the status of whatever error leaves the block; no internal text reaches the caller."""
    try:
        yield
    except SluiceError as error:
        await _abort(context, error)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():  # the caller went away, or its deadline passed
            raise
        # A cancellation of our own making: grpc.aio would send no status and the caller would wait for ever.
        get_logger().error("bug: a call cancelled itself", exc_info=True)
        await _abort(context, InternalError(None))
    except Exception:
        get_logger().error("bug", exc_info=True)
        await _abort(context, InternalError(None))


async def _abort(context: Context, error: SluiceError) -> None:
    status = status_of(error)
    # A status waits behind the messages before it, for ever if nobody reads them. Once handed to gRPC it goes out
    # whenever that is possible; no task has to wait for it.
    with suppress(TimeoutError):
        async with asyncio.timeout(_ABORT_SECONDS):
            await context.abort(status.code, status.message, status.trailing_metadata())
