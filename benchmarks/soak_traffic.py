"""What the clients of a soak do, and how each of their requests ended."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final
from urllib.parse import urlencode

from websockets.exceptions import WebSocketException

from benchmarks.load_client import get, post
from benchmarks.soak_client import Call, CutOff, delete
from benchmarks.soak_dialects import Dialects, native_text, openai_text
from benchmarks.soak_known import Knowledge
from benchmarks.soak_losses import Losses
from benchmarks.soak_tally import Tally, Wrong, compare, expect

_OK: Final = 200
_NO_CONTENT: Final = 204
_OVERLOADED: Final = 429
# What is said of a stream that is no longer kept.
_GONE: Final = frozenset({410, 503})
# What is said of a stream that is to be aborted, once it has ended and its worker was lost.
_UNKNOWN: Final = frozenset({404, 503})
_MAX_CUTS: Final = 6  # of one stream that is resumed
_PATIENCE_SECONDS: Final = 60.0


class Client:
    """One of the soak's clients: does the same again and again until it is told to stop."""

    def __init__(
        self, port: int, known: Knowledge, tally: Tally, losses: Losses, seed: int
    ) -> None:
        self._port = port
        self._known = known
        self._tally = tally
        self._losses = losses
        self._random = random.Random(seed)
        self.dialects = Dialects(port, known, losses, self._random)

    async def run(self, action: str, until: asyncio.Event) -> None:
        """`action` is one of ACTIONS."""
        while not until.is_set():
            await self.act(action)
            await asyncio.sleep(self._random.uniform(0, 0.2))

    async def act(self, action: str) -> None:
        """One request, and what became of it."""
        begin = time.monotonic()
        try:
            ending = await _ACTIONS[action](self)
        except Wrong as wrong:
            self._fail(action, str(wrong), begin)
        except CutOff:
            self._fail(action, "cut off", begin)
        except TimeoutError:
            self._fail(action, "silent for a minute", begin)
        except OSError as error:
            self._fail(action, type(error).__name__, begin, str(error))
        except WebSocketException as error:
            self._fail(action, f"socket: {error}", begin)
        except (ValueError, LookupError) as error:
            self._fail(action, f"not understood: {error!r}", begin)
        else:
            self._tally.ended[action, ending] += 1

    def _fail(self, action: str, failure: str, begin: float, more: str = "") -> None:
        self._tally.failures[action, failure] += 1
        seconds = time.monotonic() - begin
        self._tally.details.append(
            f"{action}: {failure} after {seconds:.1f} s, {self._losses.age()} {more}".rstrip()
        )

    async def read(self, pause: float = 0.0) -> str:
        """Read a whole stream, of one dialect or the other."""
        known = self._random.choice(self._known.texts)
        if self._random.random() < 0.5:
            request, text_of = post("/v1/streams", known.fields()), native_text
        else:
            body = known.fields() | {"model": "default", "stream": True}
            request, text_of = post("/v1/completions", body), openai_text
        call = await Call.begin(self._port, request)
        try:
            if call.status == _OVERLOADED:
                return "told 429"
            await expect(call, _OK)
            text = []
            async for event in call.events():
                text.append(text_of(event))
                if pause:
                    await asyncio.sleep(self._random.uniform(0, pause))
            compare("".join(text), known.text)
        finally:
            call.close()
        return "whole and right"

    async def read_slowly(self) -> str:
        """Read a whole stream with a pause after each event."""
        return await self.read(pause=0.1)

    async def leave(self) -> str:
        """Go away in the middle of a stream."""
        known = self._random.choice(self._known.texts)
        call = await Call.begin(self._port, post("/v1/streams", known.fields()))
        try:
            if call.status == _OVERLOADED:
                return "told 429"
            await expect(call, _OK)
            left = self._random.randrange(12)
            async for _ in call.events():
                left -= 1
                if left <= 0:
                    break
        finally:
            call.vanish() if self._random.random() < 0.5 else call.close()
        return "left"

    async def abort(self) -> str:
        """Have a stream ended by its name, over another connection, and read on."""
        known = self._random.choice(self._known.texts)
        opened = time.monotonic()
        call = await Call.begin(self._port, post("/v1/streams", known.fields()))
        try:
            if call.status == _OVERLOADED:
                return "told 429"
            await expect(call, _OK)
            text, reason, outcome = [], "", ""
            left = self._random.randrange(1, 12)
            async for event in call.events():
                if event.kind == "finished":
                    reason = event.json()["finish_reason"]
                else:
                    text.append(native_text(event))
                left -= 1
                if left == 0:
                    name = event.id.rsplit("-", maxsplit=1)[0]
                    outcome = await self._delete(name, opened)
        finally:
            call.close()
        # A worker that shuts down has ended it for its part, though the edge would have gone on with it elsewhere.
        is_shut_down = outcome == "already_finished" and self._losses.was_one_since(opened)
        if reason == "cancelled" and (outcome == "aborted" or is_shut_down):
            if not known.text.startswith("".join(text)):
                raise Wrong("another text")
            return "aborted, and right so far"
        # its end was there, or under way, if only in the step that the abort came in
        if reason != "length":
            raise Wrong(f"finish reason {reason}, though the abort was answered {outcome!r}")
        compare("".join(text), known.text)
        return (
            "ended by itself in the step of its abort"
            if outcome == "aborted"
            else "whole and right"
        )

    async def _delete(self, name: str, opened: float) -> str:
        call = await Call.begin(self._port, delete(f"/v1/streams/{name}"))
        try:
            if call.status in _UNKNOWN and self._losses.was_one_since(opened):
                return "unknown"
            await expect(call, _OK)
            outcome: str = json.loads(await call.body())["outcome"]
            return outcome
        finally:
            call.close()

    async def resume(self) -> str:
        """Read a stream through several connections that each break off somewhere."""
        known = self._random.choice(self._known.texts)
        query = {
            name: str(value).lower() if isinstance(value, bool) else value
            for name, value in known.fields().items()
        }
        path = f"/v1/streams?{urlencode(query)}"
        text: list[str] = []
        last_id = ""
        opened = left = time.monotonic()  # the connection before
        cuts = 0
        while cuts <= _MAX_CUTS:
            call = await Call.begin(self._port, _get_after(path, last_id))
            try:
                if call.status == _OVERLOADED and not last_id:
                    return "told 429"
                if call.status == _NO_CONTENT:
                    break
                if last_id and call.status in _GONE and self._losses.was_one_since(opened):
                    if self._losses.was_one_since(left):
                        return "its worker died while nobody read"
                    return "its worker died with events on their way"
                if call.status != _OVERLOADED:  # else it was parked, and has to come back once more
                    await expect(call, _OK)
                    opened = time.monotonic()
                    last_id = await self._read_some(call, text, last_id, cuts == _MAX_CUTS)
                    cuts += 1
                elif time.monotonic() - opened > _PATIENCE_SECONDS:
                    raise Wrong("not let in again for a minute")
            finally:
                call.vanish()
            left = time.monotonic()
            await asyncio.sleep(self._random.uniform(0, 0.3))
        compare("".join(text), known.text)
        return "whole and right"

    async def _read_some(self, call: Call, text: list[str], last_id: str, to_the_end: bool) -> str:
        left = self._random.randrange(1, 40)
        async for event in call.events():
            text.append(native_text(event))
            last_id = event.id or last_id
            left -= 1
            if left == 0 and not to_the_end:
                break
        return last_id

    async def burst(self) -> str:
        """Many requests at once, of which most must be refused."""
        await asyncio.sleep(self._random.uniform(1, 5))
        await asyncio.gather(*(self.act("burst's request") for _ in range(40)))
        return "over"

    async def err(self) -> str:
        """Ask for something that cannot be."""
        path, body = self._random.choice(_BAD)
        call = await Call.begin(self._port, post(path, body))
        try:
            if not 400 <= call.status < 500:
                raise Wrong(f"status {call.status} for bad input")
            await call.body()
        finally:
            call.close()
        return "told 4xx"


_ACTIONS: Final[dict[str, Callable[[Client], Awaitable[str]]]] = {
    "read": Client.read,
    "read slowly": Client.read_slowly,
    "leave": Client.leave,
    "resume": Client.resume,
    "burst": Client.burst,
    "burst's request": Client.read,
    "err": Client.err,
    "abort": Client.abort,
    "messages": lambda client: client.dialects.messages(),
    "constrain": lambda client: client.dialects.constrain(),
    "talk by socket": lambda client: client.dialects.talk(),
    "chat": lambda client: client.dialects.chat(),
}

_BAD: Final[Sequence[tuple[str, bytes]]] = (
    ("/v1/streams", b"{"),
    ("/v1/streams", b'{"prompt": 7}'),
    ("/v1/streams", b'{"prompt": "a", "temperature": -1}'),
    ("/v1/streams", b'{"prompt": "a", "max_tokens": 100000000}'),
    ("/v1/streams", b'{"prompt": "a", "constraint": {"regex": "("}}'),
    ("/v1/completions", b'{"model": "nobody", "prompt": "a"}'),
    ("/v1/chat/completions", b'{"model": "default", "messages": []}'),
    ("/v1/chat/completions", b"[" * 100),
    ("/v1/messages", b"null"),
    ("/v1/nowhere", b"{}"),
)


def _get_after(path: str, last_id: str) -> bytes:
    request = get(path)
    if not last_id:
        return request
    return request[:-2] + f"last-event-id: {last_id}\r\n\r\n".encode()
