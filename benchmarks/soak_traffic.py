"""What the clients of a soak do, and how each of their requests ended."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlencode

from benchmarks.load_client import get, post
from benchmarks.soak_client import Call, CutOff, Event
from benchmarks.soak_losses import Losses
from benchmarks.table import Table
from protos.sluice.v1 import generation_pb2 as pb

_OK: Final = 200
_NO_CONTENT: Final = 204
_OVERLOADED: Final = 429
# What is said of a stream that is no longer kept.
_GONE: Final = frozenset({410, 503})
_DONE: Final = "[DONE]"
_MAX_CUTS: Final = 6  # of one stream that is resumed
_PATIENCE_SECONDS: Final = 60.0


@dataclass(frozen=True)
class Known:
    """A generation whose text was asked for beforehand, from one worker that nothing disturbed."""

    prompt: str
    max_tokens: int
    temperature: float
    seed: int
    text: str = ""

    def request(self) -> pb.GenerateRequest:
        """It, in the worker's words."""
        return pb.GenerateRequest(
            prompt=pb.Prompt(text=self.prompt),
            sampling=pb.Sampling(temperature=self.temperature, seed=self.seed),
            stopping=pb.Stopping(max_tokens=self.max_tokens, ignore_eos=True),
        )

    def fields(self) -> dict[str, Any]:
        """It, in the words that the native dialect and OpenAI's completions share."""
        return {
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "ignore_eos": True,
        }


@dataclass
class Tally:
    """How requests ended, by what their clients did. Only what is in `failures` is wrong."""

    ended: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: Counter[tuple[str, str]] = field(default_factory=Counter)
    details: list[str] = field(default_factory=list)  # of each failure

    @property
    def requests(self) -> int:
        """How many there were in all."""
        return self.ended.total() + self.failures.total()

    def clear(self) -> None:
        """Count from here."""
        self.ended.clear()
        self.failures.clear()
        self.details.clear()

    def table(self) -> Table:
        """Every kind of ending, the failures last."""
        table = Table(["client", "its request", "times"], labels=2)
        for (action, ending), times in sorted(self.ended.items()):
            table.rows.append([action, ending, f"{times:,}"])
        for (action, failure), times in sorted(self.failures.items()):
            table.rows.append([action, f"**failed: {failure}**", f"{times:,}"])
        return table


class Wrong(Exception):
    """A request ended as none may; the message says how, in a few words."""


class Client:
    """One of the soak's clients: does the same again and again until it is told to stop."""

    def __init__(
        self, port: int, known: Sequence[Known], tally: Tally, losses: Losses, seed: int
    ) -> None:
        self._port = port
        self._known = known
        self._tally = tally
        self._losses = losses
        self._random = random.Random(seed)

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
        known = self._random.choice(self._known)
        if self._random.random() < 0.5:
            request, text_of = post("/v1/streams", known.fields()), _native_text
        else:
            body = known.fields() | {"model": "default", "stream": True}
            request, text_of = post("/v1/completions", body), _openai_text
        call = await Call.begin(self._port, request)
        try:
            if call.status == _OVERLOADED:
                return "told 429"
            await _expect(call, _OK)
            text = []
            async for event in call.events():
                text.append(text_of(event))
                if pause:
                    await asyncio.sleep(self._random.uniform(0, pause))
            _compare("".join(text), known)
        finally:
            call.close()
        return "whole and right"

    async def read_slowly(self) -> str:
        """Read a whole stream with a pause after each event."""
        return await self.read(pause=0.1)

    async def leave(self) -> str:
        """Go away in the middle of a stream."""
        known = self._random.choice(self._known)
        call = await Call.begin(self._port, post("/v1/streams", known.fields()))
        try:
            if call.status == _OVERLOADED:
                return "told 429"
            await _expect(call, _OK)
            left = self._random.randrange(12)
            async for _ in call.events():
                left -= 1
                if left <= 0:
                    break
        finally:
            call.vanish() if self._random.random() < 0.5 else call.close()
        return "left"

    async def resume(self) -> str:
        """Read a stream through several connections that each break off somewhere."""
        known = self._random.choice(self._known)
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
                    await _expect(call, _OK)
                    opened = time.monotonic()
                    last_id = await self._read_some(call, text, last_id, cuts == _MAX_CUTS)
                    cuts += 1
                elif time.monotonic() - opened > _PATIENCE_SECONDS:
                    raise Wrong("not let in again for a minute")
            finally:
                call.vanish()
            left = time.monotonic()
            await asyncio.sleep(self._random.uniform(0, 0.3))
        _compare("".join(text), known)
        return "whole and right"

    async def _read_some(self, call: Call, text: list[str], last_id: str, to_the_end: bool) -> str:
        left = self._random.randrange(1, 40)
        async for event in call.events():
            text.append(_native_text(event))
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


def _native_text(event: Event) -> str:
    fields = event.json()
    if event.kind == "failed":
        raise Wrong(f"a failed event: {fields}")
    if event.kind == "finished" and fields["finish_reason"] != "length":
        raise Wrong(f"finish reason {fields['finish_reason']}")
    text: str = fields.get("text", "")
    return text


def _openai_text(event: Event) -> str:
    if event.data == _DONE:
        return ""
    fields = event.json()
    if "error" in fields:
        raise Wrong(f"an error event: {fields['error']}")
    text: str = fields["choices"][0]["text"] if fields["choices"] else ""
    return text


async def _expect(call: Call, wanted: int) -> None:
    if call.status != wanted:
        raise Wrong(f"status {call.status}: {(await call.body()).decode(errors='replace')}")


def _compare(text: str, known: Known) -> None:
    if text != known.text:
        raise Wrong("another text")
