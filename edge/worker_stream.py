"""One prompt's stream of messages, from one worker and, where that is lost, from the next."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import grpc
import structlog

from edge.delivered import Delivered
from edge.errors import EdgeError, from_status
from edge.request_timeout import duration, seconds_of
from edge.worker_client import GenerateCall, WorkerClient, error_from_call
from edge.worker_pool import WorkerPool
from protos.sluice.v1 import generation_pb2 as pb

T = TypeVar("T")

# A refusal for want of room holds for one worker. One more is asked, and only if it has not lately refused itself:
# where all are overloaded a request costs one refusal, and never more than two, however many workers there are.
_REFUSALS = 2
# How long after a request's deadline its call ends: the worker ends it at the deadline, and says how that was.
GRACE_SECONDS = 2.0
_LEAST_SECONDS = 0.001
# This one holds for a key wherever it goes.
_KEY_LIMIT = "KEY_LIMIT"
# Of a worker that stops in order; no request can be the cause of that.
_STOPPING = frozenset({"DRAINING", "SHUTDOWN"})
# The connection broke; or the worker, which has no other cause to, cancelled the call while it ended.
_LOST = frozenset({grpc.StatusCode.UNAVAILABLE.name, grpc.StatusCode.CANCELLED.name})
# In what gRPC says of a worker that the request did not come to.
_UNREACHED = "failed to connect"
# Of a worker that still has the request of this id: it has not noticed yet that its caller is gone.
_STILL_THERE = grpc.StatusCode.ALREADY_EXISTS.name
# Between two looks at the workers when none could take a stream that was lost.
_PAUSE_SECONDS = 0.25
_log = structlog.get_logger("edge.worker")


class WorkerStream:
    """Begins on the least busy worker; begun, it is continued where that is lost.

    The reader gets one stream, of one header and of numbers without gaps.
    """

    def __init__(self, workers: WorkerPool, request: pb.GenerateRequest) -> None:
        self._workers = workers
        self._settings = workers.settings
        self._request = request
        self._clock = asyncio.get_running_loop().time
        limit = workers.settings.request_timeout_seconds
        self._deadline = self._clock() + min(limit, seconds_of(request))
        self._worker: WorkerClient | None = None
        self._call: GenerateCall | None = None
        self._delivered: Delivered | None = None  # once begun, if it can be continued
        self._waiting: asyncio.Future[Any] | None = None
        self._num_lost = 0
        self.num_failovers = 0
        self._is_cancelled = False
        if workers.has_others and self._settings.failover_attempts:
            request.is_continuable = True

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
        while True:
            try:
                message = await self._read(self._call)
            except EdgeError as error:
                if self._delivered is not None and self._delivered.is_whole and _is_lost(error):
                    return None  # all but the status has come
                await self._move(error)
                continue
            if message is not None and self._delivered is not None:
                self._delivered.take(message)
                if message.delta.token_ids and not self._request.output.token_ids:
                    message.delta.ClearField("token_ids")  # nobody but us asked for them
            return message

    async def _begin(self) -> pb.GenerateResponse | None:
        until = self._clock() + self._settings.connect_timeout_seconds
        worker = self._workers.pick()
        if worker is None:
            worker = await self._unless_cancelled(self._workers.serving())
        tried: list[WorkerClient] = []
        while True:
            try:
                message = await self._ask(worker)
            except EdgeError as error:
                tried.append(worker)
                other = await self._other(tried, error, until)
                if other is None:
                    raise
                self._workers.metrics.retries.inc()
                worker = other
                continue
            if message is not None and message.started.is_continuable:
                self._delivered = Delivered(message.started, self._settings.failover_tokens)
            return message

    async def _ask(self, worker: WorkerClient) -> pb.GenerateResponse | None:
        """The first message. Raises also what the worker said to a request like this one a moment ago."""
        key_id = self._request.caller.key_id
        refusal = worker.refusals.repeated(key_id)
        if refusal is not None:
            self._workers.metrics.repeated_refusals.inc()
            raise refusal
        call = self._generate(worker, self._request)
        try:
            message = await self._read(call)
        except EdgeError as error:
            if _is_want_of_room(error):
                worker.refusals.note(key_id, error)
            raise
        worker.began(call)
        return message

    async def _other(
        self, tried: list[WorkerClient], error: EdgeError, until: float
    ) -> WorkerClient | None:
        """Another worker for a request that the last one did not begin, unless it has been to enough of them."""
        if _is_lost(error):
            if not self._may_go_on_after(error):
                return None
            if error.reason in _STOPPING:
                # Of workers restarted one after the other the next may stop just before the last one is known to serve.
                return await self._next(list(tried), until)
            return self._workers.pick(tried)
        if _is_want_of_room(error):
            other = self._workers.pick(tried)
            if len(tried) < _REFUSALS and other is not None and not other.refusals.is_full:
                return other
        return None

    async def _move(self, error: EdgeError) -> None:
        """Goes on with the stream on another worker. Raises the error where that cannot be."""
        delivered = self._delivered
        if delivered is None or not _is_lost(error) or self._worker is None:
            raise error
        lost, number = self._worker, delivered.sequence_number
        is_moved = not delivered.is_too_long and await self._continue(delivered, lost, error)
        outcome = "continued" if is_moved else "failed"
        self._workers.metrics.failovers.labels(outcome).inc()
        _log.warning(
            "stream lost its worker",
            request_id=self._request.request_id,
            target=lost.target,
            outcome=outcome,
            sequence_number=number,
            grpc_details=error.grpc_details,
        )
        if not is_moved:
            raise error
        self.num_failovers += 1

    async def _continue(self, delivered: Delivered, lost: WorkerClient, error: EdgeError) -> bool:
        """Whether another worker has taken the stream within the time that there is."""
        until = min(self._clock() + self._settings.failover_seconds, self._deadline)
        unfit = [lost]
        while self._may_go_on_after(error):
            worker = await self._next(unfit, until)
            if worker is None:
                return False
            rest = delivered.rest_of(self._request)
            try:
                message = await self._read(self._generate(worker, rest))
            except EdgeError as refusal:
                if not (_is_lost(refusal) or _may_pass(refusal)):
                    _log.error(
                        "continuation refused", request_id=rest.request_id, error=str(refusal)
                    )
                    return False
                error = refusal
                unfit.append(worker)
                continue
            return message is not None and message.HasField("started")
        return False

    async def _next(self, unfit: list[WorkerClient], until: float) -> WorkerClient | None:
        """A worker that is not unfit; after a pause any that serves. None if there is none in time."""
        worker = self._workers.pick(unfit)
        while worker is None and self._workers.has_others:
            left = until - self._clock()
            if left <= 0:
                return None
            await self._unless_cancelled(asyncio.sleep(min(left, _PAUSE_SECONDS)))
            unfit.clear()
            worker = self._workers.pick()
        return worker

    def _may_go_on_after(self, error: EdgeError) -> bool:
        """Counts the workers that this very request may have killed, so that it does not kill them all."""
        was_reached = _UNREACHED not in (error.grpc_details or "").lower()
        if _is_lost(error) and error.reason not in _STOPPING and was_reached:
            self._num_lost += 1
        return self._num_lost <= self._settings.failover_attempts

    def _generate(self, worker: WorkerClient, request: pb.GenerateRequest) -> GenerateCall:
        if self._is_cancelled:
            raise asyncio.CancelledError
        left = max(self._deadline - self._clock(), _LEAST_SECONDS)
        request.timeout.CopyFrom(duration(left))
        self._worker = worker
        self._call = worker.generate(request, left + GRACE_SECONDS)
        return self._call

    async def _read(self, call: GenerateCall) -> pb.GenerateResponse | None:
        try:
            message = await call.read()
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._is_cancelled or task is None or task.cancelling():
                raise
            # grpc.aio raises this also when the worker itself ends the call with CANCELLED.
            raise from_status(grpc.StatusCode.CANCELLED, None, None) from None
        except grpc.aio.AioRpcError as error:
            raise error_from_call(error) from None
        return message if isinstance(message, pb.GenerateResponse) else None  # grpc.aio.EOF

    async def _unless_cancelled(self, waiting: Coroutine[Any, Any, T]) -> T:
        if self._is_cancelled:
            waiting.close()
            raise asyncio.CancelledError
        self._waiting = future = asyncio.ensure_future(waiting)
        try:
            return await future
        finally:
            self._waiting = None


def _is_lost(error: EdgeError) -> bool:
    return error.grpc_code in _LOST


def _is_want_of_room(error: EdgeError) -> bool:
    """Whether another worker may have the room. A 413 is of the request's size, which none would take."""
    return error.status == 429 and error.reason != _KEY_LIMIT


def _may_pass(error: EdgeError) -> bool:
    """Whether a worker that refuses a continuation now may take it a little later."""
    return error.status == 429 or error.grpc_code == _STILL_THERE
