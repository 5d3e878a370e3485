"""One stream of messages, from one worker and, where that is lost, from the next."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

import grpc
import structlog

from edge.delivered import Delivered
from edge.errors import EdgeError, aborted, deadline_passed, from_status
from edge.request_timeout import duration
from edge.running_streams import FOUND
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
        self._footers: Iterator[pb.GenerateResponse] | None = None  # of ours, where it ends early
        self._waiting: asyncio.Future[Any] | None = None
        self._num_lost = 0
        self.num_failovers = 0
        self._is_cancelled = False
        self._is_aborted = False
        self._is_moving = False  # no worker has it, or is known to
        # Once begun.
        self.request_id = self.resume_id = ""

    @abstractmethod
    async def _begin(self) -> pb.GenerateResponse | None:
        """The first message; sets what is known only now. Raises: EdgeError."""

    @property
    def key_id(self) -> str:
        """Whose it is; empty where no keys are needed."""
        return self._request.caller.key_id

    def cancel(self) -> None:
        """Cancels what still runs; a reader gets CancelledError. A call is never abandoned: nothing else ends it."""
        self._is_cancelled = True
        self._workers.running.remove(self)
        self._interrupt()

    async def abort(self, request: pb.AbortRequest) -> pb.AbortOutcome.ValueType:
        """Ends it by the worker that has it. Where none says that it has, the reader is told the end from here.

        That is so while it moves, until another worker has let it in; where its worker is lost and the reader has not
        come to notice; and where its worker does not answer in time.
        """
        self._is_aborted = True  # from now on no other worker goes on with it
        if self._worker is not None and not self._is_moving:
            answer = (await self._workers.ask_to_abort(request)).get(self._worker)
            if not isinstance(answer, BaseException) and answer in FOUND:
                return answer
        self._interrupt()
        return pb.ABORT_OUTCOME_ABORTED

    def _interrupt(self) -> None:
        """Ends what the reader waits for."""
        if self._call is not None:
            self._call.cancel()
        if self._waiting is not None:
            self._waiting.cancel()

    def _be_known_as(self, started: pb.Started) -> None:
        """The stream has begun; from now on somebody may know its names."""
        self.request_id, self.resume_id = started.request_id, started.resume_id
        self._workers.running.add(self)

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
                if delivered is not None and delivered.is_whole:
                    return None  # all but the status has come
                try:
                    call = await self._move(error, delivered)
                except EdgeError as failure:
                    return self._end_early(failure, delivered)
                if delivered is not None and not delivered.is_begun:
                    return delivered.header(self._request.annotation)
                continue
            if message is not None and delivered is not None:
                delivered.take(message)
                if message.delta.token_ids and not self._request.output.token_ids:
                    message.delta.ClearField("token_ids")  # nobody but us asked for them
            return message

    def _end_early(self, error: EdgeError, delivered: Delivered | None) -> pb.GenerateResponse:
        """The first footer for a reader who has something when the stream was aborted, or its deadline has passed.

        Raises that where the reader has nothing, or it is too much to be remembered, and any other error.
        """
        if self._is_aborted and is_call_lost(error):
            self._leave_aborted(delivered)
            reason, error = pb.FINISH_REASON_CANCELLED, aborted()
            has_footers = delivered is not None and delivered.is_begun and not delivered.is_too_long
        else:
            reason = pb.FINISH_REASON_DEADLINE
            is_late = error.grpc_code == grpc.StatusCode.DEADLINE_EXCEEDED.name
            has_footers = is_late and delivered is not None and delivered.has_tokens
        if delivered is None or not has_footers:
            raise error
        self._footers = delivered.footers(reason)
        return next(self._footers)

    def _leave_aborted(self, delivered: Delivered | None) -> None:
        """The last worker that was given it may have it, though it does not say so."""
        if self._worker is not None:
            request = self._request if delivered is None else delivered.rest_of(self._request)
            self._workers.left_behind.note(self._worker, request)

    async def _move(self, error: EdgeError, delivered: Delivered | None) -> GenerateCall:
        """The call by which another worker goes on with the stream.

        Raises the error where that cannot be, or that there is no more time for it.
        """
        if delivered is None or not is_call_lost(error) or self._worker is None or self._is_aborted:
            raise error
        lost, number = self._worker, delivered.sequence_number
        call = None
        self._is_moving = True
        try:
            if not delivered.is_too_long:
                call = await self._continue(delivered, lost, error)
            outcome = "failed" if call is None else "continued"
        except EdgeError:
            outcome = "aborted"
        finally:
            self._is_moving = False
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
        """The call to another worker that has taken the stream within the time that there is.

        Raises: EdgeError, if the stream is aborted meanwhile.
        """
        until = min(self._clock() + self._settings.failover_seconds, self._deadline)
        unfit = [lost]
        self._leave(lost, delivered.rest_of(self._request), error)
        while self._may_go_on_after(error):
            worker = await self._next(unfit, until)
            if worker is None:
                return None
            rest = delivered.rest_of(self._request)
            await self._unless_ended(self._workers.left_behind.settle(worker, rest))
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
        """One that stops has ended the stream itself; any other that got it may come back and know nothing."""
        if _may_have_it(error):
            self._workers.left_behind.note(lost, rest)

    async def _next(self, unfit: list[WorkerClient], until: float) -> WorkerClient | None:
        """A worker that is not unfit; after a pause any that serves. None if there is none in time."""
        worker = self._workers.pick(unfit)
        while worker is None and self._workers.has_others:
            left = until - self._clock()
            if left <= 0:
                return None
            await self._unless_ended(asyncio.sleep(min(left, _PAUSE_SECONDS)))
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
        if _may_have_it(error):
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
            if self._is_for_reader():
                raise
            # A worker that stops in the middle of a call ends it with CANCELLED, which is no wish of ours; or the
            # stream is aborted, so that none goes on with it.
            raise from_status(grpc.StatusCode.UNAVAILABLE, None, None) from None
        except grpc.aio.AioRpcError as error:
            raise error_from_call(error) from None
        return message if isinstance(message, pb.GenerateResponse) else None  # grpc.aio.EOF

    async def _unless_ended(self, waiting: Coroutine[Any, Any, T]) -> T:
        """What it waits for. Raises CancelledError, if the stream is cancelled first, and EdgeError, if aborted."""
        if self._is_cancelled or self._is_aborted:
            waiting.close()
            raise asyncio.CancelledError if self._is_cancelled else aborted()
        self._waiting = future = asyncio.ensure_future(waiting)
        try:
            result = await future
        except asyncio.CancelledError:
            if self._is_for_reader() or not self._is_aborted:
                raise
            raise aborted() from None
        finally:
            self._waiting = None
        if self._is_aborted:  # when it was too late to interrupt
            raise aborted()
        return result

    def _is_for_reader(self) -> bool:
        """Whether a CancelledError is one that the reader is to get, or the reader's own."""
        task = asyncio.current_task()
        return self._is_cancelled or task is None or task.cancelling() > 0


def is_call_lost(error: EdgeError) -> bool:
    """Whether a call ended with its worker."""
    return error.grpc_code in _LOST


def _may_have_it(error: EdgeError) -> bool:
    """Whether the worker that a call ended with was reached by it, and did not end it in order."""
    was_reached = _UNREACHED not in (error.grpc_details or "").lower()
    return is_call_lost(error) and error.reason not in STOPPING and was_reached


def _may_pass(error: EdgeError) -> bool:
    """Whether a worker that refuses a continuation now may take it a little later."""
    return error.status == 429 or error.grpc_code == _STILL_THERE
