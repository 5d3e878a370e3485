"""A stream that a worker keeps, read again or further. What is known of it is what that worker tells."""

import asyncio
from dataclasses import dataclass

from edge.delivered import Delivered
from edge.errors import STREAM_NOT_FOUND, EdgeError, is_lost
from edge.request_timeout import seconds_of
from edge.worker_client import GenerateCall, WorkerClient
from edge.worker_pool import WorkerPool
from edge.worker_stream import WorkerStream
from protos.sluice.v1 import generation_pb2 as pb

# How long the others may take to say that they have it too, once one has.
_OTHERS_SECONDS = 0.25


@dataclass(frozen=True, eq=False)
class _Asked:
    """One worker that may have it."""

    worker: WorkerClient
    call: GenerateCall
    first: asyncio.Task[pb.GenerateResponse | None]  # its first message

    @property
    def admitted_at(self) -> int:
        """When the worker that has it began it."""
        message = self.first.result()
        return 0 if message is None else message.resumed.created_at.ToNanoseconds()


class ResumedStream(WorkerStream):
    """Asks all workers at once, since any of them may have it, and reads from the one that does."""

    def __init__(self, workers: WorkerPool, request: pb.GenerateRequest) -> None:
        super().__init__(workers, request, seconds_of(request))
        self._resume = request.resume
        # of this call; the generation has a deadline of its own
        request.ClearField("timeout")
        if self._may_fail_over and not self._resume.snapshot:
            self._resume.is_continuable = True

    async def _begin(self) -> pb.GenerateResponse | None:
        try:
            asked = await self._unless_ended(self._find())
        except EdgeError as error:
            self._count((error.reason or error.type).lower())
            raise
        self._count("resumed")
        message = asked.first.result()
        if message is None or not message.HasField("resumed"):
            return message
        if message.resumed.HasField("request"):
            self._learn(message.resumed)
        return await self._go_on(asked.call)

    def _learn(self, resumed: pb.Resumed) -> None:
        """Takes over what is needed to go on elsewhere."""
        request = resumed.request
        self._deadline = min(self._deadline, self._clock() + seconds_of(request))
        if self._request.HasField("caller"):
            request.caller.CopyFrom(self._request.caller)
        request.request_id = resumed.started.request_id
        self._request = request
        self._delivered = Delivered.before(self._resume, resumed, self._settings.failover_tokens)
        self._be_known_as(resumed.started)

    async def _find(self) -> _Asked:
        """The worker that has the stream: of several the one that began it last, which went on for the others."""
        clients = await self._workers.reachable()
        seconds = self._deadline - self._clock()
        asked = []
        for client in clients:
            call = client.generate(self._request, seconds)
            asked.append(_Asked(client, call, asyncio.ensure_future(self._read(call))))
        found: _Asked | None = None
        try:
            found = await self._latest(asked)
            self._worker, self._call = found.worker, found.call
            return found
        finally:
            for one in asked:
                if one is not found:
                    one.first.cancel()
                    one.call.cancel()

    async def _latest(self, asked: list[_Asked]) -> _Asked:
        found: list[_Asked] = []
        errors: list[EdgeError] = []
        waiting = {one.first: one for one in asked}
        while waiting:
            done, _ = await asyncio.wait(
                waiting,
                timeout=_OTHERS_SECONDS if found else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if not done:
                break
            for one in map(waiting.pop, done):
                error = one.first.exception()
                if error is None:
                    found.append(one)
                elif isinstance(error, EdgeError):
                    errors.append(error)
                else:
                    raise error
        if found:
            return max(found, key=lambda one: one.admitted_at)
        # One that has the stream and refuses says more than one that has not. One that was lost has lost its streams
        # too, but of workers that are all lost nothing is known.
        raise min(errors, key=_rank)

    def _count(self, outcome: str) -> None:
        if not self._resume.snapshot:  # for which nobody has left
            self._workers.metrics.resumes.labels(outcome).inc()


def _rank(error: EdgeError) -> int:
    return 2 if is_lost(error) else int(error.reason == STREAM_NOT_FOUND)
