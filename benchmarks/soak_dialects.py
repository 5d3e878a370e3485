"""A soak's clients of the other dialects: Anthropic's messages, constrained JSON, the WebSocket, useChat."""

from __future__ import annotations

import asyncio
import json
import random
import time
import uuid
from typing import Any, Final

import jsonschema
from websockets.asyncio.client import ClientConnection, connect

from benchmarks.load_client import get, post
from benchmarks.soak_client import Call, Event
from benchmarks.soak_known import SCHEMA, Knowledge, KnownTalk
from benchmarks.soak_losses import Losses
from benchmarks.soak_tally import Wrong, compare, expect

_OK: Final = 200
_NO_CONTENT: Final = 204
_OVERLOADED: Final = 429
_OVERLOADED_TO_ANTHROPIC: Final = 529
_DONE: Final = "[DONE]"
_WINDOW_SECONDS: Final = 20  # in which a page comes back
_SHORT_WINDOW_SECONDS: Final = 2  # of one that does not
_PATIENCE_SECONDS: Final = 60.0


class Dialects:
    """One client's requests; each says how it ended.

    Raises: Wrong, CutOff, OSError, TimeoutError, WebSocketException, ValueError, LookupError.
    """

    def __init__(self, port: int, known: Knowledge, losses: Losses, chooser: random.Random) -> None:
        self._port = port
        self._known = known
        self._losses = losses
        self._random = chooser

    async def messages(self) -> str:
        """Ask for one answer as Anthropic's clients do, streamed or whole."""
        talk, turns = self._turn()
        body = {
            "model": "default",
            "max_tokens": talk.max_tokens,
            "temperature": 0,
            "messages": talk.messages(turns),
            "stream": self._random.random() < 0.5,
        }
        call = await Call.begin(self._port, post("/v1/messages", body))
        try:
            if call.status == _OVERLOADED_TO_ANTHROPIC:
                return "told 529"
            await expect(call, _OK)
            if body["stream"]:
                events = [event async for event in call.events()]
                if not events or events[-1].kind != "message_stop":
                    raise Wrong(f"the last event is {events[-1:]}")
                text = "".join(map(_anthropic_text, events))
            else:
                text = "".join(part["text"] for part in json.loads(await call.body())["content"])
        finally:
            call.close()
        compare(text, talk.answers[turns - 1])
        return "whole and right"

    async def constrain(self) -> str:
        """Ask for JSON of a schema, by one dialect or the other."""
        known = self._random.choice(self._known.objects)
        if self._random.random() < 0.5:
            body = known.fields() | {"constraint": {"json_schema": SCHEMA}}
            request, text_of = post("/v1/streams", body), constrained_text
        else:
            body = known.fields() | {"model": "default", "stream": True, "guided_json": SCHEMA}
            request, text_of = post("/v1/completions", body), openai_text
        call = await Call.begin(self._port, request)
        try:
            if call.status == _OVERLOADED:
                return "told 429"
            await expect(call, _OK)
            text = "".join([text_of(event) async for event in call.events()])
        finally:
            call.close()
        try:
            jsonschema.validate(json.loads(text), SCHEMA)
        except (json.JSONDecodeError, jsonschema.ValidationError) as error:
            raise Wrong(f"no JSON of its schema: {text!r}") from error
        compare(text, known.text)
        return "of its schema, and right"

    async def talk(self) -> str:
        """Hold a conversation over one socket, with a turn now and then that is cancelled and is no part of it."""
        talk = self._random.choice(self._known.talks)
        url = f"ws://127.0.0.1:{self._port}/v1/ws"
        async with connect(url, proxy=None, open_timeout=_PATIENCE_SECONDS) as socket:
            for said, answer in zip(talk.said, talk.answers, strict=True):
                if self._random.random() < 0.3:
                    reason = await self._cancelled_turn(socket)
                    if reason != "cancelled":
                        return (
                            "told 429" if reason == "overloaded" else "answered before its cancel"
                        )
                await _say(socket, said, talk.max_tokens)
                if self._random.random() < 0.1:
                    await _next_frame(socket)
                    socket.transport.abort()
                    return "left"
                text, reason = await _answer(socket)
                if reason == "overloaded":
                    return "told 429"
                compare(text, answer)
        return "every turn whole and right"

    async def _cancelled_turn(self, socket: ClientConnection) -> str:
        known = self._random.choice(self._known.texts)
        await _say(socket, known.prompt, 1000)
        await socket.send(json.dumps({"type": "cancel"}))
        return (await _answer(socket))[1]

    async def chat(self) -> str:
        """Ask as useChat does; lose the connection, which parks the answer, and come back for it, or do not."""
        talk, turns = self._turn()
        chat_id = uuid.uuid4().hex
        returns = self._random.random() < 0.8
        body = {
            "id": chat_id,
            "messages": [
                {"role": message["role"], "parts": [{"type": "text", "text": message["content"]}]}
                for message in talk.messages(turns)
            ],
            "temperature": 0,
            "maxOutputTokens": talk.max_tokens,
            "resumeWindow": _WINDOW_SECONDS if returns else _SHORT_WINDOW_SECONDS,
        }
        request = post("/api/chat", body)
        cuts = self._random.randrange(1, 4)
        opened = left = time.monotonic()
        while True:
            call = await Call.begin(self._port, request)
            try:
                is_first = request.startswith(b"POST")
                if call.status == _OVERLOADED and is_first:
                    return "told 429"
                if (
                    call.status == _NO_CONTENT
                    and not is_first
                    and self._losses.was_one_since(opened)
                ):
                    if self._losses.was_one_since(left):
                        return "its worker died while nobody read"
                    return "its worker died as its reader left"
                if call.status != _OVERLOADED:  # else it was parked, and has to come back once more
                    await expect(call, _OK)
                    opened = time.monotonic()
                    text = await self._read_chat(call, is_cut=cuts > 0)
                    cuts -= 1
                    if text is not None:
                        compare(text, talk.answers[turns - 1])
                        return "whole and right"
                    if not returns:
                        return "left parked"
                elif time.monotonic() - opened > _PATIENCE_SECONDS:
                    raise Wrong("not let in again for a minute")
            finally:
                call.vanish() if self._random.random() < 0.5 else call.close()
            left = time.monotonic()
            request = get(f"/api/chat/{chat_id}/stream")
            await asyncio.sleep(self._random.uniform(0, 0.5))

    async def _read_chat(self, call: Call, is_cut: bool) -> str | None:
        """The whole text; None if the reader left before its end."""
        left = self._random.randrange(1, 20)
        text, last = [], ""
        async for event in call.events():
            last = event.data
            if last == _DONE:
                continue
            fields = event.json()
            if fields["type"] == "error":
                raise Wrong(f"an error event: {fields}")
            if fields["type"] == "text-delta":
                text.append(fields["delta"])
            left -= 1
            if is_cut and left <= 0:
                return None
        if last != _DONE:
            raise Wrong(f"the last event is {last!r}")
        return "".join(text)

    def _turn(self) -> tuple[KnownTalk, int]:
        talk = self._random.choice(self._known.talks)
        return talk, self._random.randrange(1, len(talk.said) + 1)


async def _say(socket: ClientConnection, said: str, max_tokens: int) -> None:
    frame = {
        "type": "generate",
        "message": {"role": "user", "content": said},
        "temperature": 0,
        "max_tokens": max_tokens,
    }
    await socket.send(json.dumps(frame))


async def _next_frame(socket: ClientConnection) -> dict[str, Any]:
    async with asyncio.timeout(_PATIENCE_SECONDS):
        frame: dict[str, Any] = json.loads(await socket.recv())
    return frame


async def _answer(socket: ClientConnection) -> tuple[str, str]:
    """The text of a turn and its finish reason; "overloaded" if it was refused."""
    text = []
    while True:
        frame = await _next_frame(socket)
        match frame["type"]:
            case "delta":
                text.append(frame["text"])
            case "finished":
                return "".join(text), frame["finish_reason"]
            case "failed" if frame["status"] == _OVERLOADED and not text:
                return "", "overloaded"
            case "failed":
                raise Wrong(f"a failed frame: {frame['error']}")


def native_text(event: Event) -> str:
    """What an event adds to the text. Raises: Wrong, for a failure or another end than by its length."""
    return _text_until(event, "length")


def constrained_text(event: Event) -> str:
    """As native_text, of a text that ends where its grammar does."""
    return _text_until(event, "stop")


def _text_until(event: Event, reason: str) -> str:
    fields = event.json()
    if event.kind == "failed":
        raise Wrong(f"a failed event: {fields}")
    if event.kind == "finished" and fields["finish_reason"] != reason:
        raise Wrong(f"finish reason {fields['finish_reason']}")
    text: str = fields.get("text", "")
    return text


def openai_text(event: Event) -> str:
    """As native_text, of a chunk of OpenAI's completions, however it ends. Raises: Wrong, for a failure."""
    if event.data == _DONE:
        return ""
    fields = event.json()
    if "error" in fields:
        raise Wrong(f"an error event: {fields['error']}")
    text: str = fields["choices"][0]["text"] if fields["choices"] else ""
    return text


def _anthropic_text(event: Event) -> str:
    fields = event.json()
    if event.kind == "error":
        raise Wrong(f"an error event: {fields}")
    text: str = fields["delta"]["text"] if event.kind == "content_block_delta" else ""
    return text
