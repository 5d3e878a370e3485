"""From a real client to a real model and back."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest
from huggingface_hub import InferenceClient

from protos.sluice.v1 import generation_pb2 as pb
from tests.integration.stack import Stack

GREETING: Any = [{"role": "user", "content": "Say hello with emoji"}]


@pytest.fixture
def client(stack: Stack) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0)


def generate_text(stack: Stack, messages: list[dict[str, str]], **stopping: Any) -> str:
    chat = pb.Chat(
        messages=[pb.ChatMessage(role=m["role"], content=m["content"]) for m in messages]
    )
    request = pb.GenerateRequest(prompt=pb.Prompt(chat=chat), stopping=pb.Stopping(**stopping))
    return "".join(message.delta.text for message in stack.stub.Generate(request))


def stream_text(client: openai.OpenAI, messages: Any, **options: Any) -> tuple[str, str | None]:
    """Joined text and finish reason of a streamed answer; every chunk must be a whole text of its own."""
    text, reason = "", None
    stream = client.chat.completions.create(
        model="default", messages=messages, stream=True, **options
    )
    for chunk in stream:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
    return text, reason


def test_pinned_answers_come_through_grpc(stack: Stack, pinned: list[dict[str, Any]]) -> None:
    for conversation in pinned:
        assert generate_text(stack, conversation["messages"]) == conversation["answer"]


def test_pinned_answers_come_through_the_openai_client(
    client: openai.OpenAI, pinned: list[dict[str, Any]]
) -> None:
    for conversation in pinned:
        text, reason = stream_text(client, conversation["messages"])
        assert (text, reason) == (conversation["answer"], "stop")


def test_streamed_equals_unstreamed_wherever_max_tokens_cuts(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="default", messages=GREETING)
    assert whole.usage is not None
    assert not (whole.choices[0].message.content or "").isascii()
    cut_characters = 0
    for max_tokens in range(1, whole.usage.completion_tokens + 1):
        options: dict[str, Any] = {"model": "default", "max_tokens": max_tokens}
        unstreamed = client.chat.completions.create(messages=GREETING, **options)
        del options["model"]
        text, reason = stream_text(client, GREETING, **options)
        assert text == unstreamed.choices[0].message.content
        assert reason == unstreamed.choices[0].finish_reason
        cut_characters += text.endswith("\ufffd")
        assert "\ufffd" not in text.rstrip("\ufffd")
    assert cut_characters > 0


def test_huggingface_hub_chats(stack: Stack) -> None:
    client = InferenceClient(base_url=stack.url)
    answer = client.chat_completion([{"role": "user", "content": "Say this is a test"}])
    assert answer.choices[0].message.content == "This is a test."
    chunks = client.chat_completion(
        [{"role": "user", "content": "Say this is a test"}], stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "This is a test."


def test_choices_seeds_stops_and_logprobs(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {
        "model": "default",
        "messages": [{"role": "user", "content": "zig zag zog"}],  # nothing it knows an answer to
        "n": 3,
        "seed": 7,
        "temperature": 2,
        "max_tokens": 20,
        "logprobs": True,
        "top_logprobs": 2,
    }
    first = client.chat.completions.create(**options)
    again = client.chat.completions.create(**options)
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) > 1
    for choice in first.choices:
        assert choice.logprobs is not None
        content = choice.logprobs.content or []
        joined = b"".join(bytes(token.bytes or []) for token in content)
        assert joined.decode("utf-8", "replace") == choice.message.content
        assert all(len(token.top_logprobs) == 2 for token in content)
    counted, reason = stream_text(
        client, [{"role": "user", "content": "Count to 10"}], stop=[", 6", "seven"]
    )
    assert (counted, reason) == ("1, 2, 3, 4, 5", "stop")


def test_completions_continue_a_text_and_echo_it(client: openai.OpenAI) -> None:
    plain = client.completions.create(model="default", prompt="Once upon a time", max_tokens=8)
    echoed = client.completions.create(
        model="default", prompt="Once upon a time", max_tokens=8, echo=True, logprobs=1
    )
    assert plain.choices[0].text
    assert echoed.choices[0].text == "Once upon a time" + plain.choices[0].text
    logprobs: Any = echoed.choices[0].logprobs
    assert logprobs.token_logprobs[0] is None  # which the client's own types do not know
    assert all(logprob <= 0 for logprob in logprobs.token_logprobs[1:])
    assert "".join(logprobs.tokens) == echoed.choices[0].text


def test_a_second_turn_finds_the_first_in_the_prefix_cache(
    client: openai.OpenAI, stack: Stack
) -> None:
    story = {"role": "user", "content": "Tell me a story"}
    answer = client.chat.completions.create(model="default", messages=[story])  # type: ignore[list-item]
    follow_up = [
        story,
        {"role": "assistant", "content": answer.choices[0].message.content or ""},
        {"role": "user", "content": "Thank you"},
    ]
    second = client.chat.completions.create(model="default", messages=follow_up)  # type: ignore[arg-type]
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    assert (second.usage.prompt_tokens_details.cached_tokens or 0) > answer.usage.prompt_tokens  # type: ignore[union-attr]


def test_names_of_the_model(client: openai.OpenAI, stack: Stack) -> None:
    (model,) = client.models.list().data
    for name in (model.id, "default", "dummy", "tgi"):
        assert client.models.retrieve(name).object == "model"
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-5", messages=GREETING)
    assert caught.value.code == "model_not_found"


def test_a_prompt_that_can_never_fit_is_refused_with_both_numbers(stack: Stack) -> None:
    limit = stack.stub.GetModel(pb.GetModelRequest()).context_length
    body = {"model": "default", "prompt": [[5] * (limit + 1)]}
    response = httpx.post(f"{stack.url}/v1/completions", json=body)
    error = response.json()["error"]
    assert response.status_code == 400
    assert str(limit + 1) in error["message"]
    assert str(limit - 1) in error["message"]  # a completion has at least one token
    assert error["param"] == "prompt"


def test_native_events(stack: Stack) -> None:
    with httpx.stream(
        "GET", f"{stack.url}/v1/streams", params={"prompt": "Once upon", "max_tokens": 3}
    ) as response:
        body = response.read().decode()
    names = [
        line.removeprefix("event: ") for line in body.splitlines() if line.startswith("event:")
    ]
    assert (names[0], names[-1]) == ("started", "finished")
    assert set(names[1:-1]) == {"delta"}
    last_id = [line for line in body.splitlines() if line.startswith("id:")][-1]
    headers = {"last-event-id": last_id.removeprefix("id: ")}
    again = httpx.get(f"{stack.url}/v1/streams", params={"prompt": "Once upon"}, headers=headers)
    assert again.status_code == 204
