"""A cheap open-loop load: requests go out at their times whatever becomes of the earlier ones, each on a connection of
its own, and of an answer only its status, its reason and four moments are kept."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from benchmarks.load_client import post

_OK: Final = 200
_REFUSED: Final = 429
_STATUS: Final = re.compile(rb"HTTP/1\.1 (\d{3}) ")
_CODE: Final = re.compile(rb'"code":"(\w+)"')
_FIRST_TOKEN: Final = b"event: delta"
_FAILURE: Final = b"event: failed"
_HEAD_BYTES: Final = 4096  # of an answer, in which its status, code and first token stand


@dataclass(slots=True, eq=False)
class Reply:
    """What came of one request; moments are time.perf_counter()'s seconds, 0 where there was none."""

    due_at: float  # when it was to be sent: a client that is late is not the server's merit
    first_token_at: float = 0.0
    ended_at: float = 0.0
    status: int = 0  # 0: no answer
    code: str = ""  # of a refusal or failure
    has_failed: bool = False  # after its 200, and before its first token

    @property
    def is_refused(self) -> bool:
        return self.status == _REFUSED

    @property
    def is_accepted(self) -> bool:
        return self.status == _OK

    @property
    def first_token_seconds(self) -> float:
        """From when it was due to its first token."""
        return self.first_token_at - self.due_at

    @property
    def seconds(self) -> float:
        """From when it was due to the end of its answer."""
        return self.ended_at - self.due_at


class _Exchange(asyncio.Protocol):
    """One request and its answer."""

    def __init__(self, request: bytes, reply: Reply) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = request
        self._reply = reply
        self._head = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.write(self._request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        reply = self._reply
        if reply.first_token_at or len(self._head) > _HEAD_BYTES:
            return
        self._head += data
        if not reply.status and (status := _STATUS.match(self._head)):
            reply.status = int(status[1])
        if reply.is_accepted and _FIRST_TOKEN in self._head:
            reply.first_token_at = time.perf_counter()
            return
        reply.has_failed = reply.is_accepted and _FAILURE in self._head
        if (reply.is_refused or reply.has_failed) and (code := _CODE.search(self._head)):
            reply.code = code[1].decode()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._reply.ended_at = time.perf_counter()
        if not self.ended.done():  # not given up
            self.ended.set_result(None)


@dataclass(eq=False)
class Load:
    """Requests to one server."""

    port: int
    max_tokens: int
    replies: list[Reply] = field(default_factory=list)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def ask(self) -> Reply:
        """One request now, to its end."""
        reply = Reply(time.perf_counter())
        await self._exchange(reply)
        return reply

    async def saturate(self, readers: int, seconds: float) -> None:
        """So many readers, each of whom asks again as soon as it is answered; then wait for their last answers."""
        end = time.perf_counter() + seconds

        async def read() -> None:
            while time.perf_counter() < end:
                self.replies.append(await self.ask())

        await asyncio.gather(*(read() for _ in range(readers)))

    async def offer(self, rate: float, seconds: float) -> None:
        """So many requests a second, evenly; returns when the last is sent, whatever is still under way."""
        for due_at in _moments(rate, seconds):
            if (left := due_at - time.perf_counter()) > 0:
                await asyncio.sleep(left)
            reply = Reply(due_at)
            self.replies.append(reply)
            task = asyncio.create_task(self._exchange(reply))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def settle(self, seconds: float) -> None:
        """Wait for what is under way, but not longer than this; then close its connections."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _exchange(self, reply: Reply) -> None:
        body: dict[str, object] = {"prompt": "Once", "ignore_eos": True}
        request = post("/v1/streams", body | {"max_tokens": self.max_tokens})
        transport: asyncio.BaseTransport | None = None
        try:
            transport, exchange = await asyncio.get_running_loop().create_connection(
                lambda: _Exchange(request, reply), "127.0.0.1", self.port
            )
            await exchange.ended
        except OSError:
            reply.ended_at = time.perf_counter()
        finally:
            if transport is not None:
                transport.close()


def _moments(rate: float, seconds: float) -> Iterator[float]:
    began = time.perf_counter()
    return (began + number / rate for number in range(int(rate * seconds)))
