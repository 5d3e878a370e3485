"""The WebSocket."""

from starlette.requests import Request
from starlette.responses import Response

from edge.dialects import socket as dialect
from edge.errors import EdgeError
from edge.operation import Operation, SocketShape
from edge.socket_endpoint import SocketEndpoint


async def upgrade_required(request: Request) -> Response:  # noqa: ARG001
    """Answers a plain GET. Raises a 426."""
    raise EdgeError(
        426,
        "invalid_request_error",
        "This is a WebSocket's address: connect with ws:// or wss://.",
        headers={"upgrade": "websocket"},
    )


def operations(endpoint: SocketEndpoint) -> list[Operation]:
    """Its row."""
    return [
        Operation(
            "GET",
            "/v1/ws",
            upgrade_required,
            "A conversation over one WebSocket: each text frame of the client is a SocketGenerate or a SocketCancel,"
            " each of the server's an event with the request's id. One generation runs at a time (409 for a second);"
            " when the socket closes, it ends.",
            None,
            (400, 401, 403, 426, 431, 503),
            socket=SocketShape(
                endpoint,
                (dialect.SocketGenerate, dialect.SocketCancel),
                (
                    dialect.SocketStarted,
                    dialect.SocketDelta,
                    dialect.SocketFinished,
                    dialect.SocketFailed,
                ),
            ),
        )
    ]
