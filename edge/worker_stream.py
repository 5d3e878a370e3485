"""One prompt's stream of messages, from whichever worker has it."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import grpc

from edge.errors import EdgeError
from edge.request_timeout import duration, seconds_of
from edge.worker_client import GenerateCall, WorkerClient, error_from_call
from edge.worker_pool import WorkerPool
from protos.sluice.v1 import generation_pb2 as pb

# A refusal for want of room holds for one worker. One more is asked, and only if it has not lately refused itself:
# where all are overloaded a request costs one refusal, and never more than two, however many workers there are.
_REFUSALS = 2
# How long after a request's deadline its call ends: the worker ends it at the deadline, and says how that was.
GRACE_SECONDS = 2.0
_LEAST_SECONDS = 0.001
# This one holds for a key wherever it goes.
_KEY_LIMIT = "KEY_LIMIT"


class WorkerStream:
    """Begins on the least busy worker, and on another where that one is lost or full before its first message."""

    def __init__(self, workers: WorkerPool, request: pb.GenerateRequest) -> None:
        self._workers = workers
        self._request = request
        self._clock = asyncio.get_running_loop().time
        limit = workers.settings.request_timeout_seconds
        self._deadline = self._clock() + min(limit, seconds_of(request))
        self._call: GenerateCall | None = None
        self._waiting: asyncio.Future[WorkerClient] | None = None
        self._tried: list[WorkerClient] = []
        self._num_lost = 0
        self._num_refused = 0
        self._is_cancelled = False

    def cancel(self) -> None:
        """Cancels what still runs; a reader gets CancelledError. A call is never abandoned: nothing else ends it."""
        self._is_cancelled = True
        if self._call is not None:
            self._call.cancel()
        if self._waiting is not None:
            self._waiting.cancel()

    async def read(self) -> pb.GenerateResponse | None:
        """The next message, or None after the last one. Raises: EdgeError."""
        if self._call is None:
            return await self._begin()
        return await self._read(self._call)

    async def _begin(self) -> pb.GenerateResponse | None:
        worker = self._workers.pick() or await self._unless_cancelled(self._workers.serving())
        while True:
            try:
                return await self._read(self._generate(worker))
            except EdgeError as error:
                other = self._other(worker, error)
                if other is None:
                    raise
                self._workers.metrics.retries.inc()
                worker = other

    def _generate(self, worker: WorkerClient) -> GenerateCall:
        if self._is_cancelled:
            raise asyncio.CancelledError
        left = max(self._deadline - self._clock(), _LEAST_SECONDS)
        if self._request.HasField("resume"):  # whose generation has a deadline of its own
            self._request.ClearField("timeout")
        else:
            self._request.timeout.CopyFrom(duration(left))
        self._call = worker.generate(self._request, left + GRACE_SECONDS)
        return self._call

    async def _read(self, call: GenerateCall) -> pb.GenerateResponse | None:
        try:
            message = await call.read()
        except grpc.aio.AioRpcError as error:
            raise error_from_call(error) from None
        return message if isinstance(message, pb.GenerateResponse) else None  # grpc.aio.EOF

    def _other(self, worker: WorkerClient, error: EdgeError) -> WorkerClient | None:
        """Another worker for a request that this one did not begin, unless it has been to enough of them."""
        self._tried.append(worker)
        if error.grpc_code == grpc.StatusCode.UNAVAILABLE.name:
            self._num_lost += 1
            if self._num_lost <= self._workers.settings.failover_attempts:
                return self._workers.pick(self._tried)
        # a 413 is of the request's size, which no worker would take
        elif error.status == 429 and error.reason != _KEY_LIMIT:
            worker.refused()
            self._num_refused += 1
            other = self._workers.pick(self._tried)
            if self._num_refused < _REFUSALS and other is not None and not other.is_full:
                return other
        return None

    async def _unless_cancelled(self, waiting: Coroutine[Any, Any, WorkerClient]) -> WorkerClient:
        if self._is_cancelled:
            raise asyncio.CancelledError
        self._waiting = asyncio.ensure_future(waiting)
        try:
            return await self._waiting
        finally:
            self._waiting = None
