"""A stream that begins with a prompt, on the least busy worker."""

import asyncio

from edge.delivered import Delivered
from edge.errors import EdgeError, deadline_passed
from edge.request_timeout import seconds_of
from edge.worker_client import WorkerClient
from edge.worker_pool import WorkerPool
from edge.worker_stream import STOPPING, WorkerStream, is_call_lost
from protos.sluice.v1 import generation_pb2 as pb

# A refusal for want of room holds for one worker. One more is asked, and only if it has not lately refused itself:
# where all are overloaded a request costs one refusal, and never more than two, however many workers there are.
_REFUSALS = 2
# This one holds for a key wherever it goes.
_KEY_LIMIT = "KEY_LIMIT"


class NewStream(WorkerStream):
    """Tried on other workers as long as none has begun it."""

    def __init__(self, workers: WorkerPool, request: pb.GenerateRequest) -> None:
        super().__init__(workers, request, seconds_of(request))
        if self._may_fail_over:
            request.is_continuable = True

    async def _begin(self) -> pb.GenerateResponse | None:
        until = min(self._clock() + self._settings.connect_timeout_seconds, self._deadline)
        worker = self._workers.pick() or await self._serving()
        tried: list[WorkerClient] = []
        # By a worker that is there, which says more than that others were lost.
        refusal: EdgeError | None = None
        while True:
            try:
                message = await self._ask(worker)
            except EdgeError as error:
                tried.append(worker)
                if not is_call_lost(error):
                    refusal = error
                self._leave(worker, self._request, error)
                other = await self._other(tried, error, until)
                if other is None:
                    raise self._told(error if refusal is None else refusal) from None
                await self._unless_ended(self._workers.left_behind.settle(other, self._request))
                self._workers.metrics.retries.inc()
                worker = other
                continue
            if message is not None:
                self._be_known_as(message.started)
                if message.started.is_continuable:
                    self._delivered = Delivered(message.started, self._settings.failover_tokens)
            return message

    async def _serving(self) -> WorkerClient:
        """Raises: EdgeError, if none serves in time."""
        try:
            async with asyncio.timeout_at(self._deadline):
                return await self._unless_ended(self._workers.serving())
        except TimeoutError:
            raise deadline_passed() from None

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
        if is_call_lost(error):
            if not self._may_go_on_after(error):
                return None
            if error.reason in STOPPING:
                # Of workers restarted one after the other the next may stop just before the last one is known to serve.
                return await self._next(list(tried), until)
            return self._workers.pick(tried)
        if _is_want_of_room(error):
            other = self._workers.pick(tried)
            if len(tried) < _REFUSALS and other is not None and not other.refusals.is_full:
                return other
        return None


def _is_want_of_room(error: EdgeError) -> bool:
    """Whether another worker may have the room. A 413 is of the request's size, which none would take."""
    return error.status == 429 and error.reason != _KEY_LIMIT
