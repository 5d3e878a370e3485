"""A lean client of one streamed answer: notes when each event came, and leaves reading them for later."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import SplitResult, urlsplit

import httptools

_EVENT_ENDS: Final = (b"\n\n", b"\r\n\r\n")
_DONE: Final = b"[DONE]"
_OK: Final = 200


class BadUrl(ValueError):
    """A URL that no request can be sent to."""


@dataclass(frozen=True)
class Endpoint:
    """Where a server's OpenAI-compatible interface is, such as http://localhost:8000/v1."""

    url: str

    @property
    def parts(self) -> SplitResult:
        """Raises: BadUrl."""
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BadUrl(f"{self.url!r} is no http or https URL")
        return parts

    def request(self, method: str, path: str, key: str | None, body: bytes = b"") -> bytes:
        """An HTTP request for a path below the URL's, whose connection ends with the answer."""
        parts = self.parts
        lines = [
            f"{method} {parts.path.rstrip('/')}{path} HTTP/1.1",
            f"host: {parts.netloc}",
            "connection: close",
            "accept: text/event-stream, application/json",
            "content-type: application/json",
            f"content-length: {len(body)}",
        ]
        if key is not None:
            lines.append(f"authorization: Bearer {key}")
        return "\r\n".join([*lines, "", ""]).encode() + body


@dataclass
class Answer:
    """What came for one request; moments are time.perf_counter()'s seconds."""

    began_at: float = 0.0
    ended_at: float = 0.0
    status: int = 0  # 0 if no answer began
    failure: str | None = None  # in a word or two
    events: list[tuple[float, bytes]] = field(default_factory=list)  # a moment, and data

    def chunks(self) -> list[tuple[float, dict[str, Any]]]:
        """The events' JSON objects, without the last word."""
        return [(moment, json.loads(data)) for moment, data in self.events if data != _DONE]


class _Connection(asyncio.Protocol):
    """Sends a request and takes its answer apart."""

    def __init__(self, request: bytes, answer: Answer) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = request
        self._answer = answer
        self._parser = httptools.HttpResponseParser(self)
        self._rest = b""
        self._now = 0.0
        self._is_whole = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.write(self._request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._answer.failure = "no HTTP"

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._answer.ended_at = time.perf_counter()
        self._answer.status = self._answer.status or 0
        if self._answer.failure is None and not self._is_whole:
            self._answer.failure = "cut off"
        if not self.ended.done():
            self.ended.set_result(None)

    # called by the parser

    def on_headers_complete(self) -> None:
        self._answer.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._rest += body
        if self._answer.status != _OK:
            return
        while True:
            found = [(at, end) for end in _EVENT_ENDS if (at := self._rest.find(end)) >= 0]
            if not found:
                return
            at, end = min(found)
            self._add(self._rest[:at])
            self._rest = self._rest[at + len(end) :]

    def on_message_complete(self) -> None:
        self._is_whole = True
        if self._answer.status != _OK:
            self._answer.failure = f"status {self._answer.status}"
        elif not self._answer.events and self._rest:  # no stream: one body
            self._answer.events.append((self._now, self._rest.strip()))

    def _add(self, event: bytes) -> None:
        for line in event.splitlines():
            if line.startswith(b"data:"):
                self._answer.events.append((self._now, line[5:].strip()))


async def exchange(endpoint: Endpoint, request: bytes, timeout_seconds: float) -> Answer:
    """Send a request on a connection of its own, and take all of its answer. Failures are part of the answer."""
    loop = asyncio.get_running_loop()
    parts = endpoint.parts
    answer = Answer(began_at=time.perf_counter())
    connection: _Connection | None = None
    transport: asyncio.BaseTransport | None = None
    try:
        async with asyncio.timeout(timeout_seconds):
            transport, connection = await loop.create_connection(
                lambda: _Connection(request, answer),
                parts.hostname or "",
                parts.port or (443 if parts.scheme == "https" else 80),
                ssl=ssl.create_default_context() if parts.scheme == "https" else None,
            )
            await connection.ended
    except TimeoutError:
        answer.failure = "too slow"
    except OSError:
        answer.failure = "no connection"
    finally:
        if transport is not None:
            transport.close()
    answer.ended_at = answer.ended_at or time.perf_counter()
    return answer
