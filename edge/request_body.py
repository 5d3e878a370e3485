"""Reads a request body within its limits."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

from starlette.requests import Request

from edge.dialects.dialect import PromptLimits
from edge.errors import ClientGoneError, EdgeError
from edge.json_codec import decode_object

# How much of a body beyond the limit is read and dropped, so that a client which writes before it reads gets its 413.
_DISCARD_FACTOR = 8
# What larger bodies take is felt by others, so it is done beside the event loop; of those two at a time.
_LARGE_BYTES: Final = 64 * 1024
_large_bodies: Final = ThreadPoolExecutor(2, thread_name_prefix="large-body")

T = TypeVar("T")


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body.

    Raises a 415 when it is compressed, a 413 beyond `limit` bytes, ClientGoneError when the client leaves early.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise EdgeError(
            415,
            "invalid_request_error",
            "The request body must not be compressed: content-encoding is not supported.",
            headers={"connection": "close", "accept-encoding": "identity"},
        )
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit and "expect" in request.headers:
        raise _too_large(limit)
    chunks: list[bytes] = []
    size, more = 0, True
    while more and size <= limit * _DISCARD_FACTOR:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        chunk = message.get("body", b"")
        size += len(chunk)
        if size <= limit:
            chunks.append(chunk)
        else:
            chunks.clear()
        more = message.get("more_body", False)
    if size > limit:
        raise _too_large(limit)
    return b"".join(chunks)


def _too_large(limit: int) -> EdgeError:
    return EdgeError(
        413,
        "invalid_request_error",
        f"The request body is larger than {limit} bytes.",
        headers={"connection": "close"},
    )


async def read_parsed(
    request: Request, limits: PromptLimits, parse: Callable[[dict[str, Any]], T]
) -> T:
    """What `parse` makes of the JSON object that the body holds."""
    return await parsed(await read_body(request, limits.max_body_bytes), limits, parse)


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
