"""The anthropic SDK, unchanged, before real processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.clients.contract import (
    Answer,
    Client,
    ClientContract,
    Errors,
    Question,
    occupied,
)
from tests.integration.stack import Stack

anthropic = pytest.importorskip("anthropic")

COUNT = {"role": "user", "content": "Count to 10"}
ANSWER = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10"


class Anthropic(Client):
    """The synchronous client."""

    def ask(self, question: Question) -> Answer:
        with self._connect(question) as client:
            return self._answer(client.messages.create(**self._body(question)))

    def stream(self, question: Question) -> Answer:
        with (
            self._connect(question) as client,
            client.messages.stream(**self._body(question)) as stream,
        ):
            joined = "".join(stream.text_stream)
            answer = self._answer(stream.get_final_message())
        assert joined == answer.text
        return answer

    def leave(self, question: Question) -> str:
        with (
            self._connect(question) as client,
            client.messages.stream(**self._body(question)) as stream,
        ):
            return str(next(iter(stream.text_stream)))

    def _connect(self, question: Question) -> Any:
        return anthropic.Anthropic(base_url=question.url, api_key=question.key, max_retries=0)

    def _body(self, question: Question) -> Any:
        return {
            "model": question.model,
            "messages": [{"role": "user", "content": question.content}],
            "max_tokens": question.max_tokens,
            "extra_body": {"temperature": question.temperature},  # newer SDKs name it no more
        }

    def _answer(self, message: Any) -> Answer:
        usage = message.usage
        return Answer(
            "".join(block.text for block in message.content),
            message.stop_reason,
            usage.input_tokens + usage.cache_read_input_tokens,
            usage.output_tokens,
        )


class TestAnthropic(ClientContract):
    finish_reasons = ("end_turn", "max_tokens")
    overloaded_status = 529
    errors = Errors(
        bad_field="BadRequestError",
        wrong_key="AuthenticationError",
        no_such_model="NotFoundError",
        overloaded="OverloadedError",
        midway="APIStatusError",
    )

    @pytest.fixture
    def client(self) -> Anthropic:
        return Anthropic()


@pytest.fixture
def client(stack: Stack) -> Iterator[Any]:
    with anthropic.Anthropic(base_url=stack.url, api_key="none", max_retries=0) as client:
        yield client


def test_an_answer_whole(client: Any) -> None:
    message = client.messages.create(model="default", max_tokens=100, messages=[COUNT])
    assert [(block.type, block.text) for block in message.content] == [("text", ANSWER)]
    assert message.stop_reason == "end_turn"
    assert message.model == "sluice-tiny"
    assert message.id.startswith("msg-")
    usage = message.usage
    assert usage.input_tokens + usage.cache_read_input_tokens > 5
    assert usage.output_tokens > 10


def test_the_events_and_their_order(client: Any) -> None:
    events = list(
        client.messages.create(model="default", max_tokens=3, messages=[COUNT], stream=True)
    )
    kinds = [event.type for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert events[-2].delta.stop_reason == "max_tokens"
    assert events[-2].usage.output_tokens == 3


def test_a_stop_sequence_a_system_prompt_and_blocks(client: Any) -> None:
    text = {"type": "text", "text": "Count to 10", "cache_control": {"type": "ephemeral"}}
    message = client.messages.create(
        model="default",
        max_tokens=100,
        system=[{"type": "text", "text": "You are a helpful assistant."}],
        messages=[{"role": "user", "content": [text]}],
        stop_sequences=[", 4"],
        extra_body={"temperature": 0.0},  # which newer SDKs name no more
        metadata={"user_id": "x"},
    )
    assert message.content[0].text == "1, 2, 3"
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", ", 4")


def test_a_begun_answer_is_continued(client: Any) -> None:
    """What the caller wrote of the answer comes before it, and is no part of it."""
    begun = {"role": "assistant", "content": [{"type": "text", "text": "1, 2, 3,"}]}
    asked = {"model": "default", "max_tokens": 100, "extra_body": {"temperature": 0.0}}
    message = client.messages.create(messages=[COUNT, begun], **asked)
    assert "1, 2, 3," + message.content[0].text == ANSWER
    counted = client.messages.count_tokens(model="default", messages=[COUNT, begun])
    usage = message.usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens
    with client.messages.stream(messages=[COUNT, begun], **asked) as stream:
        assert stream.get_final_text() == message.content[0].text
    empty = {"role": "assistant", "content": ""}
    assert client.messages.create(messages=[COUNT, empty], **asked).content[0].text == ANSWER
    for content, told in (
        ("1, 2, ", r"cannot end with whitespace"),
        ([{"type": "tool_use", "id": "1", "name": "f", "input": {}}], "messages: .*functions"),
    ):
        begun = {"role": "assistant", "content": content}
        with pytest.raises(anthropic.BadRequestError, match=told):
            client.messages.create(messages=[COUNT, begun], **asked)


def test_counting_tokens(client: Any) -> None:
    counted = client.messages.count_tokens(model="default", messages=[COUNT])
    message = client.messages.create(model="default", max_tokens=1, messages=[COUNT])
    usage = message.usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


def test_each_refusal_is_its_own_exception(client: Any) -> None:
    def ask(**fields: Any) -> Any:
        given = {"model": "default", "max_tokens": 5, "messages": [COUNT], **fields}
        return client.messages.create(**given)

    with pytest.raises(anthropic.BadRequestError, match="temperature") as bad:
        ask(extra_body={"temperature": 200.0})
    assert bad.value.body["error"]["type"] == "invalid_request_error"
    with pytest.raises(anthropic.NotFoundError) as absent:
        ask(model="claude")
    assert absent.value.body["error"]["type"] == "not_found_error"
    assert absent.value.body["request_id"] == absent.value.response.headers["request-id"]
    with pytest.raises(anthropic.BadRequestError, match=r"messages\[0\].content\[0\]"):
        ask(messages=[{"role": "user", "content": [{"type": "image", "source": {}}]}])
    block = {"type": "tool_use", "id": "1", "name": "f", "input": {}}
    with pytest.raises(anthropic.BadRequestError, match="tool_use"):
        ask(messages=[{"role": "user", "content": [block]}])


def test_overload_says_when_to_come_again(slow_stack: Stack) -> None:
    with (
        occupied(slow_stack),
        anthropic.Anthropic(base_url=slow_stack.url, api_key="none", max_retries=0) as client,
        pytest.raises(anthropic.APIStatusError) as refused,
    ):
        client.messages.create(model="default", max_tokens=5, messages=[COUNT])
    assert refused.value.body["error"]["type"] == "overloaded_error"
    assert 1 <= int(refused.value.response.headers["retry-after"]) <= 5


async def test_the_asynchronous_client(stack: Stack) -> None:
    async with (
        anthropic.AsyncAnthropic(base_url=stack.url, auth_token="none") as client,
        client.messages.stream(model="default", max_tokens=100, messages=[COUNT]) as stream,
    ):
        assert "".join([text async for text in stream.text_stream]) == ANSWER
