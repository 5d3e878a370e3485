"""An error as an HTTP response."""

from starlette.responses import Response

from edge.errors import EdgeError
from edge.json_codec import encode


def error_response(error: EdgeError) -> Response:
    """The response of a request that failed before its 200."""
    return Response(
        encode(error.body()),
        status_code=error.status,
        headers=error.http_headers(),
        media_type="application/json",
    )
