"""An error as an HTTP response."""

from collections.abc import Callable
from typing import TypeAlias

from starlette.responses import Response

from edge.errors import EdgeError
from edge.json_codec import encode

# How a dialect answers what failed before its 200, given the error and the request's id.
Refuse: TypeAlias = Callable[[EdgeError, str], Response]


def error_response(error: EdgeError, request_id: str = "") -> Response:  # noqa: ARG001
    """The response of a request that failed before its 200, where its dialect has no form of its own."""
    return Response(
        encode(error.body()),
        status_code=error.status,
        headers=error.http_headers(),
        media_type="application/json",
    )
