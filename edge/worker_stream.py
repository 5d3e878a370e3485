"""One stream of messages, from one worker and, where that is lost, from the next."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

import grpc
import structlog

from edge.delivered import Delivered
from edge.errors import EdgeError, deadline_passed, from_status
from edge.request_timeout import duration
from edge.worker_client import GenerateCall, WorkerClient, error_from_call
from edge.worker_pool import WorkerPool
from protos.sluice.v1 import generation_pb2 as pb

T = TypeVar("T")

# Of a worker that stops in order; no request can be the cause of that.
STOPPING = frozenset({"DRAINING", "SHUTDOWN"})
# How long after a request's deadline its call ends: the worker ends it at the deadline, and says how that was.
GRACE_SECONDS = 2.0
_LEAST_SECONDS = 0.001
# The connection broke; or the worker, which has no other cause to, cancelled the call while it ended.
_LOST = frozenset({grpc.StatusCode.UNAVAILABLE.name, grpc.StatusCode.CANCELLED.name})
# In what gRPC says of a worker that the request did not come to.
_UNREACHED = "failed to connect"
# Of a worker that still has the request of this id: it has not noticed yet that its caller is gone.
_STILL_THERE = grpc.StatusCode.ALREADY_EXISTS.name
# Between two looks at the workers when none could take a stream that was lost.
_PAUSE_SECONDS = 0.25
_log = structlog.get_logger("edge.worker")


class WorkerStream(ABC):
    """However it begins; begun, it is continued where its worker is lost.

    The reader gets one stream, of one header and of numbers without gaps.
    """

    def __init__(self, workers: WorkerPool, request: pb.GenerateRequest, seconds: float) -> None:
        """`seconds` are left for the request."""
        self._workers = workers
        self._settings = workers.settings
        self._request = request
        self._clock = asyncio.get_running_loop().time
        limit = workers.settings.request_timeout_seconds
        self._deadline = self._clock() + min(limit, seconds)
        self._worker: WorkerClient | None = None
        self._call: GenerateCall | None = None  # once begun
        self._delivered: Delivered | None = None  # once begun, if it can be continued
        self._footers: Iterator[pb.GenerateResponse] | None = None  # of ours, once it is too late
        self._waiting: asyncio.Future[Any] | None = None
        self._num_lost = 0
        self.num_failovers = 0
        self._is_cancelled = False

    @abstractmethod
    async def _begin(self) -> pb.GenerateResponse | None:
        """The first message; sets what is known only now. Raises: EdgeError."""

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
        if self._footers is not None:
            return next(self._footers, None)
        return await self._go_on(self._call)

    async def _go_on(self, call: GenerateCall) -> pb.GenerateResponse | None:
        """The next message of a call that has begun, or of another worker's where its worker is lost."""
        delivered = self._delivered
        while True:
            try:
                message = await self._read(call)
            except EdgeError as error:
                if delivered is not None and delivered.is_whole and is_call_lost(error):
                    return None  # all but the status has come
                try:
                    call = await self._move(error, delivered)
                except EdgeError as failure:
                    return self._end_late(failure, delivered)
                if delivered is not None and not delivered.is_begun:
                    return delivered.header(self._request.annotation)
                continue
            if message is not None and delivered is not None:
                delivered.take(message)
                if message.delta.token_ids and not self._request.output.token_ids:
                    message.delta.ClearField("token_ids")  # nobody but us asked for them
            return message

    def _end_late(self, error: EdgeError, delivered: Delivered | None) -> pb.GenerateResponse:
        """The first footer for a reader who has something when the deadline has passed. Raises any other error."""
        is_late = error.grpc_code == grpc.StatusCode.DEADLINE_EXCEEDED.name
        if not is_late or delivered is None or not delivered.has_tokens:
            raise error
        self._footers = delivered.footers(pb.FINISH_REASON_DEADLINE)
        return next(self._footers)

    async def _move(self, error: EdgeError, delivered: Delivered | None) -> GenerateCall:
        """The call by which another worker goes on with the stream.

        Raises the error where that cannot be, or that there is no more time for it.
        """
        if delivered is None or not is_call_lost(error) or self._worker is None:
            raise error
        lost, number = self._worker, delivered.sequence_number
        call = None
        if not delivered.is_too_long:
            call = await self._continue(delivered, lost, error)
        outcome = "failed" if call is None else "continued"
        self._workers.metrics.failovers.labels(outcome).inc()
        _log.warning(
            "stream lost its worker",
            request_id=self._request.request_id,
            target=lost.target,
            outcome=outcome,
            sequence_number=number,
            grpc_details=error.grpc_details,
        )
        if call is None:
            raise self._told(error)
        self.num_failovers += 1
        return call

    async def _continue(
        self, delivered: Delivered, lost: WorkerClient, error: EdgeError
    ) -> GenerateCall | None:
        """The call to another worker that has taken the stream within the time that there is."""
        until = min(self._clock() + self._settings.failover_seconds, self._deadline)
        unfit = [lost]
        self._leave(lost, delivered.rest_of(self._request), error)
        while self._may_go_on_after(error):
            worker = await self._next(unfit, until)
            if worker is None:
                return None
            rest = delivered.rest_of(self._request)
            await self._unless_cancelled(self._workers.left_behind.settle(worker, rest))
            try:
                call = self._generate(worker, rest)
                message = await self._read(call)
            except EdgeError as refusal:
                if not (is_call_lost(refusal) or _may_pass(refusal)):
                    _log.error(
                        "continuation refused", request_id=rest.request_id, error=str(refusal)
                    )
                    return None
                self._leave(worker, rest, refusal)
                error = refusal
                unfit.append(worker)
                continue
            return call if message is not None and message.HasField("started") else None
        return None

    def _leave(self, lost: WorkerClient, rest: pb.GenerateRequest, error: EdgeError) -> None:
        """One that stops has ended the stream itself; any other may come back and know nothing."""
        if is_call_lost(error) and error.reason not in STOPPING:
            self._workers.left_behind.note(lost, rest)

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

    @property
    def _may_fail_over(self) -> bool:
        """Whether there is another worker, and it may be asked."""
        return self._workers.has_others and self._settings.failover_attempts > 0

    def _told(self, error: EdgeError) -> EdgeError:
        """What the reader is told for a worker that was lost."""
        is_late = is_call_lost(error) and self._clock() >= self._deadline
        return deadline_passed() if is_late else error

    def _may_go_on_after(self, error: EdgeError) -> bool:
        """Counts the workers that this very request may have killed, so that it does not kill them all."""
        was_reached = _UNREACHED not in (error.grpc_details or "").lower()
        if is_call_lost(error) and error.reason not in STOPPING and was_reached:
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
            # A worker that stops in the middle of a call ends it with CANCELLED, which is no wish of ours.
            raise from_status(grpc.StatusCode.UNAVAILABLE, None, None) from None
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


def is_call_lost(error: EdgeError) -> bool:
    """Whether a call ended with its worker."""
    return error.grpc_code in _LOST


def _may_pass(error: EdgeError) -> bool:
    """Whether a worker that refuses a continuation now may take it a little later."""
    return error.status == 429 or error.grpc_code == _STILL_THERE
