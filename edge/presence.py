"""Whether a client is still there. Only `receive` tells: sending to nobody succeeds."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from edge.errors import ClientGoneError

T = TypeVar("T")


async def until_gone(receive: Receive) -> None:
    """Returns once the client has closed the connection. The request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_there(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives; it is cancelled if the client leaves before that. Raises: ClientGoneError."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.create_task(until_gone(receive), name="disconnect watcher")
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        leaving.cancel()
        working.cancel()
