"""The websockets package, unchanged, before real processes: its synchronous client and its asynchronous one."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import connect as connect_async
from websockets.exceptions import InvalidStatus
from websockets.sync.client import ClientConnection, connect

from tests.clients.contract import (
    COUNT,
    ENDLESS,
    Answer,
    Client,
    ClientContract,
    Errors,
    Question,
)
from tests.integration.stack import PATIENCE, Stack

Event = dict[str, Any]


class Failed(Exception):
    """A `failed` event: the package knows frames, and not what they tell."""

    def __init__(self, event: Event) -> None:
        super().__init__(event["error"]["message"])
        self.status_code = event["status"]


class WebSockets(Client):
    """Asks whole as the next message of a conversation, and streams what a list of messages asks for."""

    def ask(self, question: Question) -> Answer:
        with connect(**address(question)) as socket:
            socket.send(generate(question, message=user(question)))
            events: list[Event] = []
            while not events or events[-1]["type"] != "finished":
                events.append(read(socket))
        return answer_of(events)

    def stream(self, question: Question) -> Answer:
        async def talk() -> Answer:
            async with asyncio.timeout(PATIENCE), connect_async(**address(question)) as socket:
                await socket.send(generate(question, messages=[user(question)]))
                events: list[Event] = []
                async for frame in socket:
                    events.append(event_of(frame))
                    if events[-1]["type"] == "finished":
                        break
            return answer_of(events)

        return asyncio.run(talk())

    def leave(self, question: Question) -> str:
        with connect(**address(question)) as socket:
            socket.send(generate(question, message=user(question)))
            while not (text := read(socket).get("text")):
                pass
        return str(text)


def address(question: Question) -> Any:
    headers = {"authorization": f"Bearer {question.key}"}
    uri = question.url.replace("http", "ws", 1) + "/v1/ws"
    return {"uri": uri, "additional_headers": headers, "proxy": None}


def user(question: Question) -> Event:
    return {"role": "user", "content": question.content}


def generate(question: Question, **asked: Any) -> str:
    wanted = {"model": question.model, "max_tokens": question.max_tokens}
    drawn = {"temperature": question.temperature}
    return json.dumps({"type": "generate", **wanted, **drawn, **asked})


def read(socket: ClientConnection) -> Event:
    return event_of(socket.recv(timeout=PATIENCE))


def event_of(frame: str | bytes) -> Event:
    """The event of a frame. Raises: Failed."""
    event: Event = json.loads(frame)
    if event["type"] == "failed":
        raise Failed(event)
    return event


def answer_of(events: list[Event]) -> Answer:
    usage = events[-1]["usage"]
    return Answer(
        "".join(event.get("text", "") for event in events),
        events[-1]["finish_reason"],
        usage["prompt_tokens"],
        usage["completion_tokens"],
    )


@pytest.fixture(scope="module")
def client() -> WebSockets:
    return WebSockets()


class TestWebSockets(ClientContract):
    errors = Errors(
        bad_field="Failed",
        wrong_key="InvalidStatus",
        no_such_model="Failed",
        overloaded="Failed",
        midway="Failed",
    )

    @pytest.mark.parametrize("way", ["ask", "stream"])
    def test_a_wrong_key(self, client: Client, locked_url: str, way: str) -> None:
        with pytest.raises(InvalidStatus) as refused:  # the handshake is; its body tells why
            getattr(client, way)(Question(locked_url, key="sluice_another-key"))
        response = refused.value.response
        assert response.status_code == 401
        assert json.loads(response.body or b"")["error"]["code"] == "invalid_api_key"


def test_it_is_what_an_unstreamed_answer_says(client: WebSockets, stack: Stack) -> None:
    body = {"messages": [{"role": "user", "content": COUNT}], "temperature": 0, "max_tokens": 100}
    with httpx.Client(base_url=stack.url, trust_env=False, timeout=PATIENCE) as http:
        whole = http.post("/v1/chat/completions", json=body).json()
    (choice,), usage = whole["choices"], whole["usage"]
    assert client.stream(Question(stack.url)) == Answer(
        choice["message"]["content"],
        choice["finish_reason"],
        usage["prompt_tokens"],
        usage["completion_tokens"],
    )


def test_cancelling_frees_the_sequence_and_the_socket_goes_on(slow_stack: Stack) -> None:
    question = Question(slow_stack.url, max_tokens=ENDLESS)
    with connect(**address(question)) as socket:
        socket.send(generate(question, message=user(question)))
        while not read(socket).get("text"):
            pass
        socket.send(json.dumps({"type": "cancel"}))
        while (event := read(socket))["type"] != "finished":
            pass
        assert event["finish_reason"] == "cancelled"
        slow_stack.wait_idle()
        socket.send(generate(question, message=user(question), max_tokens=3))
        while (event := read(socket))["type"] != "finished":
            pass
        assert (event["finish_reason"], event["usage"]["completion_tokens"]) == ("length", 3)
