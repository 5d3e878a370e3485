"""Streams that went on at another worker while the one before may not know that it was lost."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from edge.errors import EdgeError
from edge.worker_client import WorkerClient
from protos.sluice.v1 import generation_pb2 as pb

# Of one edge; what is more ends by itself, where nobody reads it, when its resume window has passed.
_MAX_STREAMS = 1024
# How long a worker may be away; longer ago than the longest window, unless it stood still.
_PATIENCE_SECONDS = 300.0
_PAUSE_SECONDS = 1.0


class LeftBehind:
    """Has each worker end what it no longer has to, as soon as it is seen to serve again.

    Without that a worker that stood still, or that the network had cut off, would go on with its part of a stream that
    may be resumed until its window has passed. Used from the event loop only.
    """

    def __init__(self, changed: Callable[[], Awaitable[None]]) -> None:
        """`changed` waits until any worker may have begun to serve."""
        self._changed = changed
        self._streams: dict[WorkerClient, dict[str, pb.AbortRequest]] = {}  # by request id
        self._tasks: dict[WorkerClient, asyncio.Task[None]] = {}
        self._turn = asyncio.Lock()

    def note(self, worker: WorkerClient, request: pb.GenerateRequest) -> None:
        """The worker was lost with the stream that this is a continuation of."""
        if sum(map(len, self._streams.values())) >= _MAX_STREAMS:
            return
        self._streams.setdefault(worker, {})[request.request_id] = _abort(request)
        if worker not in self._tasks:
            task = asyncio.create_task(self._end_all(worker), name="streams left behind")
            self._tasks[worker] = task

    async def settle(self, worker: WorkerClient, request: pb.GenerateRequest) -> None:
        """Has the worker end its old part of the stream, if it has one, before it gets a new one."""
        if (streams := self._streams.get(worker)) is not None:
            async with self._turn:
                await self._end(worker, request.request_id)
                streams.pop(
                    request.request_id, None
                )  # the next one of this name is no longer left behind

    async def close(self) -> None:
        """Forgets all of them."""
        for task in list(self._tasks.values()):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _end_all(self, worker: WorkerClient) -> None:
        streams = self._streams[worker]
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS):
                while streams:
                    if not worker.is_serving:
                        await self._changed()
                        continue
                    async with self._turn:
                        is_ended = await self._end(worker, next(iter(streams), ""))
                    if not is_ended:
                        await asyncio.sleep(_PAUSE_SECONDS)
        except TimeoutError:
            pass
        finally:
            del self._streams[worker], self._tasks[worker]

    async def _end(self, worker: WorkerClient, request_id: str) -> bool:
        """Whether the worker has answered."""
        streams = self._streams.get(worker, {})
        if (message := streams.get(request_id)) is None:
            return True
        try:
            await worker.abort(message)
        except EdgeError:
            return False
        streams.pop(request_id, None)
        return True


def _abort(request: pb.GenerateRequest) -> pb.AbortRequest:
    key_id = request.caller.key_id if request.HasField("caller") else None
    if request.continuation.HasField("resume_id"):
        resume_id = request.continuation.resume_id
        return pb.AbortRequest(resume_id=resume_id, forget=True, key_id=key_id)
    return pb.AbortRequest(request_id=request.request_id, key_id=key_id)
