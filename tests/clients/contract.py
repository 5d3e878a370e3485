"""What every client of a conversation must find here, as installed and with nothing but a base URL changed.

A test module subclasses `ClientContract` and says how its client is used and what its exceptions are called.
"""

from __future__ import annotations

import asyncio
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import ClassVar

import grpc
import pytest

from protos.sluice.v1 import generation_pb2 as pb
from tests.clients.foreign_process import ForeignError, ForeignProcess
from tests.edge.edge_process import EdgeProcess
from tests.edge.scripted_worker import ScriptedCall, ScriptedWorker
from tests.integration.stack import PATIENCE, Stack

COUNT = "Count to 10"
COUNTED = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10"
ENDLESS = 3000  # tokens; the slow stack takes a minute for them


@dataclass(frozen=True)
class Question:
    """One user's turn, and where to ask it."""

    url: str
    content: str = COUNT
    model: str = "default"
    key: str = "none"
    max_tokens: int = 100
    temperature: float = 0.0


@dataclass(frozen=True)
class Answer:
    """What came back. The finish reason is in the client's own words."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Errors:
    """The client's own class for each failure; `midway` is one after the first text."""

    bad_field: str
    wrong_key: str
    no_such_model: str
    overloaded: str
    midway: str


class Client(ABC):
    """How the tests use a client."""

    @abstractmethod
    def ask(self, question: Question) -> Answer:
        """The answer whole."""

    @abstractmethod
    def stream(self, question: Question) -> Answer:
        """The answer streamed and joined."""

    @abstractmethod
    def leave(self, question: Question) -> str:
        """The first text of a streamed answer, which is then left, as this client leaves."""


class ForeignClient(Client):
    """A client in a process of its own, which serves the same three functions."""

    def __init__(self, process: ForeignProcess) -> None:
        self._process = process

    def ask(self, question: Question) -> Answer:
        return Answer(**self._process.call("ask", **asdict(question)))

    def stream(self, question: Question) -> Answer:
        return Answer(**self._process.call("stream", **asdict(question)))

    def leave(self, question: Question) -> str:
        text: str = self._process.call("leave", **asdict(question))
        return text


class ClientContract:
    """The tests. The subclass has a fixture `client`."""

    finish_reasons: ClassVar[tuple[str, str]] = ("stop", "length")
    errors: ClassVar[Errors]
    overloaded_status: ClassVar[int] = 429

    def test_streamed_it_is_the_same(self, client: Client, stack: Stack) -> None:
        whole = client.ask(Question(stack.url))
        assert whole.text == COUNTED
        assert whole.finish_reason == self.finish_reasons[0]
        assert whole == client.stream(Question(stack.url))

    def test_usage_is_the_workers_own(self, client: Client, stack: Stack) -> None:
        chat = pb.Chat(messages=[pb.ChatMessage(role="user", content=COUNT)])
        request = pb.GenerateRequest(
            prompt=pb.Prompt(chat=chat), sampling=pb.Sampling(temperature=0)
        )
        usage = list(stack.stub.Generate(request, timeout=PATIENCE))[-1].finished.usage
        answer = client.stream(Question(stack.url))
        assert (answer.prompt_tokens, answer.completion_tokens) == (
            usage.prompt_tokens,
            usage.completion_tokens,
        )

    def test_a_cut_answer_says_so(self, client: Client, stack: Stack) -> None:
        whole = client.ask(Question(stack.url, max_tokens=3))
        assert (whole.finish_reason, whole.completion_tokens) == (self.finish_reasons[1], 3)
        assert COUNTED.startswith(whole.text)
        assert whole == client.stream(Question(stack.url, max_tokens=3))

    @pytest.mark.parametrize("way", ["ask", "stream"])
    def test_a_bad_field(self, client: Client, stack: Stack, way: str) -> None:
        with self.raising(self.errors.bad_field, 400, "temperature"):
            getattr(client, way)(Question(stack.url, temperature=200.0))

    @pytest.mark.parametrize("way", ["ask", "stream"])
    def test_a_wrong_key(self, client: Client, locked_url: str, way: str) -> None:
        with self.raising(self.errors.wrong_key, 401, "key"):
            getattr(client, way)(Question(locked_url, key="sluice_another-key"))

    @pytest.mark.parametrize("way", ["ask", "stream"])
    def test_a_model_that_is_not_served(self, client: Client, stack: Stack, way: str) -> None:
        with self.raising(self.errors.no_such_model, 404, "gpt-99"):
            getattr(client, way)(Question(stack.url, model="gpt-99"))

    @pytest.mark.parametrize("way", ["ask", "stream"])
    def test_overload(self, client: Client, slow_stack: Stack, way: str) -> None:
        refusal = self.raising(self.errors.overloaded, self.overloaded_status)
        with occupied(slow_stack), refusal:
            getattr(client, way)(Question(slow_stack.url))

    def test_leaving_frees_the_sequence(self, client: Client, slow_stack: Stack) -> None:
        before = slow_stack.load().generated_tokens
        assert client.leave(Question(slow_stack.url, max_tokens=ENDLESS))
        slow_stack.wait_idle()
        assert slow_stack.load().generated_tokens - before < ENDLESS, "it ended by itself"

    async def test_a_failure_midway(
        self, client: Client, edge: EdgeProcess, worker: ScriptedWorker
    ) -> None:
        worker.script = partly
        with self.raising(self.errors.midway):
            await asyncio.to_thread(client.stream, Question(edge.url))

    @contextmanager
    def raising(self, name: str, status: int | None = None, told: str = "") -> Iterator[None]:
        """The block must raise the client's own class of this name, with this status, telling so."""
        with pytest.raises(Exception) as caught:  # noqa: PT011  # the class is compared by name
            yield
        error = caught.value
        raised = error.name if isinstance(error, ForeignError) else type(error).__name__
        assert raised == name, error
        assert told in message_of(error)
        if status is not None:
            assert status_of(error) == status


def message_of(error: Exception) -> str:
    """All that the error tells in words."""
    return json.dumps(error.fields) if isinstance(error, ForeignError) else str(error)


def status_of(error: Exception) -> int | None:
    """The HTTP status that the error tells."""
    if isinstance(error, ForeignError):
        return error.status
    status: int | None = getattr(error, "status_code", None)
    return status or getattr(getattr(error, "response", None), "status_code", None)


@contextmanager
def occupied(stack: Stack) -> Iterator[None]:
    """The stack's only place is taken."""
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content=COUNT)])
    request = pb.GenerateRequest(
        prompt=pb.Prompt(chat=chat), stopping=pb.Stopping(max_tokens=ENDLESS)
    )
    call = stack.stub.Generate(request, timeout=2 * PATIENCE)
    try:
        assert next(iter(call)).HasField("started")
        yield
    finally:
        call.cancel()
        stack.wait_idle()


async def partly(call: ScriptedCall) -> None:
    """Some text, and then a failure."""
    await call.started()
    await call.delta("partly")
    await call.fail(grpc.StatusCode.INTERNAL)
