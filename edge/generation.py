"""The streams behind one HTTP request, read as one stream of messages."""

import asyncio
import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from edge.errors import ClientGoneError, EdgeError, aborted, server_error
from edge.finish_reason import finish_reason_name
from edge.new_stream import NewStream
from edge.resumed_stream import ResumedStream
from edge.worker_pool import WorkerPool
from protos.sluice.v1 import generation_pb2 as pb

# Which of the request's prompts a message belongs to, and the message.
Item = tuple[int, pb.GenerateResponse]


class Stream(Protocol):
    """One prompt's messages."""

    num_failovers: int  # how often it changed its worker

    def cancel(self) -> None:
        """Cancels what still runs; a reader gets CancelledError."""

    async def read(self) -> pb.GenerateResponse | None:
        """The next message, or None after the last one. Raises: EdgeError."""


class Generation:
    """One stream for each prompt of an HTTP request; most requests have one.

    `stop` may come from anywhere at any time (the client went away, the edge shuts down): they are cancelled and
    whoever reads gets the reason as an exception.
    """

    def __init__(
        self, requests: Sequence[pb.GenerateRequest], field_name: Callable[[str], str]
    ) -> None:
        self._requests = requests
        self._field_name = field_name
        self._is_resumed = requests[0].HasField("resume")
        self._prompt_tokens = 0
        self._usage = pb.Usage()
        self._finish_reasons: set[str] = set()
        self._streams: list[Stream] = []
        self._unfinished: list[int] = []
        self._whole: set[int] = set()  # streams whose last message has come
        self._reads: dict[asyncio.Task[pb.GenerateResponse | None], int] = {}
        self._arrived: deque[tuple[int, asyncio.Task[pb.GenerateResponse | None]]] = deque()
        self._stopped_by: EdgeError | ClientGoneError | None = None

    def stop(self, reason: EdgeError | ClientGoneError) -> None:
        """Ends the generation for a reason that readers will get. The first reason stays."""
        if self._stopped_by is None:
            self._stopped_by = reason
        self.cancel()

    def cancel(self) -> None:
        """Cancels what still runs."""
        for stream in self._streams:
            stream.cancel()
        for task in self._reads:
            task.cancel()

    def summary(self) -> dict[str, Any]:
        """Token counts and finish reasons, as far as known, for the log line."""
        summary: dict[str, Any] = {"prompt_tokens": self._prompt_tokens}
        if moved := sum(stream.num_failovers for stream in self._streams):
            summary["failovers"] = moved
        if self._finish_reasons:
            summary["completion_tokens"] = self._usage.completion_tokens
            summary["cached_tokens"] = self._usage.cached_tokens
            summary["finish_reasons"] = sorted(self._finish_reasons)
        return summary

    async def open(self, workers: WorkerPool) -> list[pb.GenerateResponse]:
        """Begins the streams and returns the `started` message of each; of a resumed one, the first that is left.

        All of them must be admitted before any is answered: a request that is refused in part is refused.
        """
        self._raise_if_stopped()
        if self._is_resumed:
            return await self._resume(workers, self._requests[0])
        self._streams = [NewStream(workers, request) for request in self._requests]
        if len(self._streams) == 1:
            first = [await self._read_stream(0)]
        else:
            first = await asyncio.gather(*map(self._read_stream, range(len(self._streams))))
        started = [message for message in first if message is not None]
        if len(started) < len(first) or any(not m.HasField("started") for m in started):
            raise server_error()
        self._unfinished = [message.started.n for message in started]
        self._prompt_tokens = sum(message.started.prompt_tokens for message in started)
        return started

    async def _resume(
        self, workers: WorkerPool, request: pb.GenerateRequest
    ) -> list[pb.GenerateResponse]:
        self._streams = [ResumedStream(workers, request)]
        message = await self._read_stream(0)
        if message is None:
            return []
        # How many choices are still to end is not known, but the last one has the usage.
        is_whole = message.finished.HasField("usage") or request.resume.snapshot
        self._unfinished = [0 if is_whole else sys.maxsize]
        self._prompt_tokens = message.started.prompt_tokens
        return [message]

    async def read(self) -> Item | None:
        """The next message, or None after the last one."""
        if len(self._streams) == 1:
            message = await self._read_stream(0)
            return None if message is None else (0, message)
        return await self._read_any()

    async def _read_any(self) -> Item | None:
        if not self._reads and not self._arrived:
            self._begin_reads(range(len(self._streams)))
        while self._arrived or self._reads:
            if not self._arrived:
                await asyncio.wait(self._reads, return_when=asyncio.FIRST_COMPLETED)
                done = [(index, task) for task, index in self._reads.items() if task.done()]
                for index, task in done:
                    del self._reads[task]
                    self._arrived.append((index, task))
            index, task = self._arrived.popleft()
            message = self._result(task)
            if message is not None:
                self._begin_reads([index])
                return index, message
        return None

    def _begin_reads(self, indexes: Sequence[int]) -> None:
        for index in indexes:
            task = asyncio.ensure_future(self._read_stream(index))
            task.add_done_callback(_retrieve)
            self._reads[task] = index

    def _result(self, task: asyncio.Task[pb.GenerateResponse | None]) -> pb.GenerateResponse | None:
        if task.cancelled():
            self._raise_if_stopped()
        return task.result()

    async def _read_stream(self, index: int) -> pb.GenerateResponse | None:
        try:
            message = await self._streams[index].read()
        except asyncio.CancelledError:
            self._raise_if_stopped()
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # grpc.aio raises this also when the worker itself ends the call with CANCELLED.
            raise aborted() from None
        except EdgeError as error:
            self._raise_if_stopped()
            if index in self._whole:
                return None  # how its call ends is nothing to a client who has everything
            error.rename_param(self._field_name)
            raise
        self._raise_if_stopped()
        if message is None:
            if self._unfinished and self._unfinished[index] > 0:
                raise server_error()
            return None
        if self._unfinished and message.HasField("finished"):
            self._unfinished[index] -= 1
            if message.finished.HasField("usage"):
                self._whole.add(index)
                if self._is_resumed:
                    self._unfinished[index] = 0
            self._note(message.finished)
        return message

    def _note(self, finished: pb.Finished) -> None:
        self._finish_reasons.add(finish_reason_name(finished.finish_reason))
        if finished.HasField("usage"):
            self._usage.completion_tokens += finished.usage.completion_tokens
            self._usage.cached_tokens += finished.usage.cached_tokens

    def _raise_if_stopped(self) -> None:
        if self._stopped_by is not None:
            raise self._stopped_by


def _retrieve(task: asyncio.Task[pb.GenerateResponse | None]) -> None:
    """Marks a task's exception as seen: another one of the same request was first."""
    if not task.cancelled():
        task.exception()
