"""Reads a request body within its limits."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, Final, TypeVar

from starlette.requests import Request

from edge.dialects.dialect import PromptLimits
from edge.errors import ClientGoneError, EdgeError, overloaded
from edge.json_codec import decode_object

# How much of a body beyond the limit is read and dropped, so that a client which writes before it reads gets its 413.
_DISCARD_FACTOR = 8
# What larger bodies take is felt by others: they are parsed beside the event loop, two at a time, and share a limit.
_LARGE_BYTES: Final = 64 * 1024
_large_bodies: Final = ThreadPoolExecutor(2, thread_name_prefix="large-body")

T = TypeVar("T")


class _Body:
    """A body as it is read. What has come of it counts, together with all others, until it is released."""

    all_held: ClassVar[int] = 0

    def __init__(self, request: Request, limits: PromptLimits) -> None:
        self._request = request
        self._limits = limits
        self._chunks: list[bytes] = []
        self._held = 0

    async def read(self) -> bytes:
        """The whole of it.

        Raises a 415 when it is compressed, a 413 when it is too large, a 429 when it is large and others have the room,
        ClientGoneError when the client leaves early.
        """
        headers, limit = self._request.headers, self._limits.max_body_bytes
        if headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
            raise _compressed()
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > limit and "expect" in headers:
            raise _too_large(limit)
        refusal: EdgeError | None = None
        size, more = 0, True
        while more and size <= limit * _DISCARD_FACTOR:
            message = await self._request.receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            chunk = message.get("body", b"")
            more = message.get("more_body", False)
            size += len(chunk)
            if size > limit:
                refusal = _too_large(limit)
            elif refusal is None and not self._take(chunk):
                refusal = _too_many()
            if refusal is not None:
                self.release()
        if refusal is not None:
            raise refusal
        data = b"".join(self._chunks)
        self._chunks.clear()
        return data

    def release(self) -> None:
        """Counts it no more."""
        _Body.all_held -= self._held
        self._held = 0
        self._chunks.clear()

    def _take(self, chunk: bytes) -> bool:
        """Whether there is room for more of it. For a small body there always is: connections are limited."""
        held = self._held + len(chunk)
        if held > _LARGE_BYTES and _Body.all_held + len(chunk) > self._limits.max_bodies_bytes:
            return False
        _Body.all_held += len(chunk)
        self._held = held
        self._chunks.append(chunk)
        return True


def _compressed() -> EdgeError:
    return EdgeError(
        415,
        "invalid_request_error",
        "The request body must not be compressed: content-encoding is not supported.",
        headers={"connection": "close", "accept-encoding": "identity"},
    )


def _too_large(limit: int) -> EdgeError:
    return EdgeError(
        413,
        "invalid_request_error",
        f"The request body is larger than {limit} bytes.",
        headers={"connection": "close"},
    )


def _too_many() -> EdgeError:
    refusal = overloaded("Too many large request bodies are being read; try again soon.")
    refusal.headers["connection"] = "close"
    return refusal


async def read_parsed(
    request: Request, limits: PromptLimits, parse: Callable[[dict[str, Any]], T]
) -> T:
    """What `parse` makes of the JSON object that the body holds. Raises what that does, and what reading it does."""
    body = _Body(request, limits)
    try:
        return await parsed(await body.read(), limits, parse)
    finally:
        body.release()


async def parsed(data: bytes, limits: PromptLimits, parse: Callable[[dict[str, Any]], T]) -> T:
    """What `parse` makes of a JSON object; of a large one on another thread.

    Raises what `parse` does, and a 400.
    """

    def parse_all() -> T:
        return parse(decode_object(data, limits.max_json_depth, limits.max_json_values))

    return await beside_the_loop(parse_all, len(data))


async def beside_the_loop(work: Callable[[], T], size: int) -> T:
    """The result of `work` on `size` bytes, on another thread if they are many."""
    if size <= _LARGE_BYTES:
        return work()
    return await asyncio.get_running_loop().run_in_executor(_large_bodies, work)
