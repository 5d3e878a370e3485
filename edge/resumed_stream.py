"""A stream that a worker keeps, read again or further. Nothing of it is known here but its name."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeAlias

import grpc

from edge.errors import STREAM_NOT_FOUND, EdgeError, from_status, is_lost
from edge.request_timeout import seconds_of
from edge.worker_client import GenerateCall, error_from_call
from edge.worker_pool import WorkerPool
from protos.sluice.v1 import generation_pb2 as pb

_First: TypeAlias = asyncio.Task[pb.GenerateResponse | None]


class ResumedStream:
    """Asks all workers at once, since any of them may have it, and reads from the one that does."""

    num_failovers = 0  # of what came before it, too little is known to go on elsewhere

    def __init__(self, workers: WorkerPool, request: pb.GenerateRequest) -> None:
        self._workers = workers
        self._request = request
        self._call: GenerateCall | None = None  # once it is found
        self._calls: dict[_First, GenerateCall] = {}  # until then
        self._finding: asyncio.Task[pb.GenerateResponse | None] | None = None
        self._is_cancelled = False

    def cancel(self) -> None:
        """Cancels what still runs; a reader gets CancelledError."""
        self._is_cancelled = True
        if self._call is not None:
            self._call.cancel()
        if self._finding is not None:
            self._finding.cancel()

    async def read(self) -> pb.GenerateResponse | None:
        """The next message, or None after the last one. Raises: EdgeError."""
        if self._call is not None:
            return await self._read(self._call)
        return await self._unless_cancelled(self._find())

    async def _find(self) -> pb.GenerateResponse | None:
        """The first message, from the one worker that has the stream."""
        clients = await self._workers.reachable()
        seconds = min(self._workers.settings.request_timeout_seconds, seconds_of(self._request))
        self._request.ClearField(
            "timeout"
        )  # of this call; the generation has a deadline of its own
        calls = [client.generate(self._request, seconds) for client in clients]
        self._calls = {asyncio.ensure_future(self._read(call)): call for call in calls}
        try:
            message = await self._first_of_all()
        except EdgeError as error:
            self._count((error.reason or error.type).lower())
            raise
        else:
            self._count("resumed")
            return message
        finally:
            for task, call in self._calls.items():
                task.cancel()
                call.cancel()

    def _count(self, outcome: str) -> None:
        if not self._request.resume.snapshot:  # for which nobody has left
            self._workers.metrics.resumes.labels(outcome).inc()

    async def _first_of_all(self) -> pb.GenerateResponse | None:
        errors: list[EdgeError] = []
        while self._calls:
            done, _ = await asyncio.wait(self._calls, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                call = self._calls.pop(task)
                error = task.exception()
                if error is None:
                    self._call = call
                    return task.result()
                if not isinstance(error, EdgeError):
                    raise error
                if error.reason != STREAM_NOT_FOUND and not is_lost(error):
                    raise error  # it has the stream, and refuses
                errors.append(error)
        # One that was lost has lost its streams too, but of workers that are all lost nothing is known.
        raise next((error for error in errors if not is_lost(error)), errors[0])

    async def _unless_cancelled(
        self, finding: Coroutine[Any, Any, pb.GenerateResponse | None]
    ) -> pb.GenerateResponse | None:
        self._finding = asyncio.create_task(finding, name="resume")
        if self._is_cancelled:
            self._finding.cancel()
        try:
            return await self._finding
        finally:
            self._finding = None

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
