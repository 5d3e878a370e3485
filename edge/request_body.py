"""Reads a request body within its limit."""

from typing import Any

from starlette.requests import Request

from edge.dialects.dialect import PromptLimits
from edge.errors import ClientGoneError, EdgeError
from edge.json_codec import decode_object

# How much of a body beyond the limit is read and dropped, so that a client which writes before it reads gets its 413.
_DISCARD_FACTOR = 8


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


async def read_object(request: Request, limits: PromptLimits) -> dict[str, Any]:
    """The JSON object that the body holds."""
    body = await read_body(request, limits.max_body_bytes)
    return decode_object(body, limits.max_json_depth)
