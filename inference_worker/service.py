"""The gRPC service: calls the worker, writes what it yields, and turns its errors into statuses."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc
import grpc.aio

from inference_worker.errors import InternalError, SlowReader, SluiceError, status_of
from inference_worker.request_log import get_logger
from inference_worker.worker import Worker
from protos.sluice.v1 import generation_pb2 as pb
from protos.sluice.v1 import generation_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


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
        async with _statuses(context), aclosing(self._worker.generate(request, deadline)) as stream:
            async for message in stream:
                await self._write(context, message)

    async def _write(self, context: Context, message: pb.GenerateResponse) -> None:
        try:
            async with asyncio.timeout(self._send_timeout_seconds):
                await context.write(message)
        except TimeoutError:
            raise SlowReader(self._send_timeout_seconds) from None

    async def Abort(  # noqa: N802
        self, request: pb.AbortRequest, context: Context
    ) -> pb.AbortResponse:
        """End a generation from another connection."""
        async with _statuses(context):
            return self._worker.abort(request)

    async def GetModel(  # noqa: N802
        self, request: pb.GetModelRequest, context: Context
    ) -> pb.GetModelResponse:
        """Describe the served model."""
        async with _statuses(context):
            return self._worker.get_model(request)

    async def GetLoad(  # noqa: N802
        self, request: pb.GetLoadRequest, context: Context
    ) -> pb.GetLoadResponse:
        """Tell how busy the worker is."""
        async with _statuses(context):
            return self._worker.get_load(request)

    async def Tokenize(  # noqa: N802
        self, request: pb.TokenizeRequest, context: Context
    ) -> pb.TokenizeResponse:
        """Turn a prompt into token ids."""
        async with _statuses(context):
            return await self._worker.tokenize(request)

    async def Detokenize(  # noqa: N802
        self, request: pb.DetokenizeRequest, context: Context
    ) -> pb.DetokenizeResponse:
        """Turn token ids into text."""
        async with _statuses(context):
            return await self._worker.detokenize(request)


@asynccontextmanager
async def _statuses(context: Context) -> AsyncGenerator[None, None]:
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
    await context.abort(status.code, status.message, status.trailing_metadata())
