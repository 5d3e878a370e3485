"""TGI's routes before the embedded model, asked by huggingface_hub's InferenceClient, unchanged."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import ValidationError

from protos.sluice.v1 import generation_pb2 as pb
from tests.integration.stack import Stack

PROMPT = "Once upon a time"


@pytest.fixture
def client(stack: Stack) -> InferenceClient:
    return InferenceClient(model=stack.url)


def test_streamed_equals_unstreamed_and_the_worker(client: InferenceClient, stack: Stack) -> None:
    for max_new_tokens in (1, 5, 12):
        request = pb.GenerateRequest(
            prompt=pb.Prompt(text=PROMPT), stopping=pb.Stopping(max_tokens=max_new_tokens)
        )
        text = "".join(message.delta.text for message in stack.stub.Generate(request))
        assert text
        assert client.text_generation(PROMPT, max_new_tokens=max_new_tokens) == text
        parts = list(client.text_generation(PROMPT, max_new_tokens=max_new_tokens, stream=True))
        assert "".join(parts) == text
        assert len(parts) == max_new_tokens


def test_details_of_a_length_and_of_an_end(client: InferenceClient) -> None:
    cut = client.text_generation(PROMPT, max_new_tokens=5, details=True)
    assert cut.details is not None
    assert (cut.details.finish_reason, cut.details.generated_tokens) == ("length", 5)
    assert "".join(token.text for token in cut.details.tokens) == cut.generated_text
    assert all(token.logprob <= 0 for token in cut.details.tokens)
    assert cut.details.seed is None
    ended = client.text_generation(PROMPT, max_new_tokens=400, details=True)
    assert ended.details is not None
    assert ended.details.finish_reason == "eos_token"
    assert ended.details.tokens[-1].special
    assert len(ended.details.tokens) == ended.details.generated_tokens
    assert "".join(token.text for token in ended.details.tokens) == ended.generated_text


def shown(token: Any) -> tuple[Any, ...]:
    fields = token if isinstance(token, dict) else vars(token)  # it leaves nested lists as they are
    logprob = pytest.approx(fields["logprob"], abs=1e-4)
    return fields["id"], fields["text"], fields["special"], logprob


def test_details_of_a_stream_are_those_of_the_whole(client: InferenceClient) -> None:
    options: dict[str, Any] = {"max_new_tokens": 400, "details": True, "top_n_tokens": 2}
    whole = client.text_generation(PROMPT, **options)
    events = list(client.text_generation(PROMPT, stream=True, **options))
    assert whole.details is not None
    assert [event.index for event in events] == list(range(1, len(events) + 1))
    assert [shown(event.token) for event in events] == list(map(shown, whole.details.tokens))
    assert [list(map(shown, event.top_tokens or [])) for event in events] == [
        list(map(shown, top)) for top in whole.details.top_tokens or []
    ]
    assert {len(event.top_tokens or []) for event in events[:-1]} == {2}
    last = events[-1]
    assert last.generated_text == whole.generated_text
    assert last.details is not None
    assert last.details.generated_tokens == whole.details.generated_tokens == len(events)
    assert last.details.input_length > 1
    assert all(event.details is None for event in events[:-1])


def test_seeds_full_text_stops_and_the_prompts_tokens(client: InferenceClient) -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "temperature": 3.0, "seed": 5}
    drawn = client.text_generation(PROMPT, details=True, **options)
    assert client.text_generation(PROMPT, **options) == drawn.generated_text
    assert drawn.details is not None
    assert drawn.details.seed == 5
    full = client.text_generation(PROMPT, return_full_text=True, **options)
    assert full == PROMPT + drawn.generated_text
    shown = client.text_generation(
        PROMPT, max_new_tokens=3, details=True, decoder_input_details=True
    )
    assert shown.details is not None
    assert "".join(token.text for token in shown.details.prefill).endswith(PROMPT)
    first: Any = shown.details.prefill[0].logprob  # which the client's own types do not know
    assert first is None
    assert shown.generated_text == client.text_generation(PROMPT, max_new_tokens=3)
    greedy = client.text_generation(PROMPT, max_new_tokens=20)
    stopped = client.text_generation(PROMPT, max_new_tokens=20, stop=[greedy[5:8]], details=True)
    assert stopped.generated_text == greedy[:5]
    assert stopped.details is not None
    assert stopped.details.finish_reason == "stop_sequence"


def test_best_of_is_the_likeliest(client: InferenceClient) -> None:
    best = client.text_generation(
        PROMPT, max_new_tokens=8, temperature=3.0, seed=1, best_of=3, details=True
    )
    assert best.details is not None
    others = best.details.best_of_sequences or []
    assert len(others) == 2

    def mean(tokens: Any) -> float:
        logprobs: list[float] = [token.logprob for token in tokens]
        return sum(logprobs) / len(logprobs)

    assert all(mean(other.tokens) < mean(best.details.tokens) for other in others)
    assert len({best.generated_text, *(other.generated_text for other in others)}) == 3


def test_the_root_answers_with_a_list_and_a_stream_has_no_terminator(stack: Stack) -> None:
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 2}}
    (listed,) = httpx.post(stack.url, json=body).json()
    assert listed == httpx.post(f"{stack.url}/generate", json=body).json()
    for path, asked in (("/", {**body, "stream": True}), ("/generate_stream", body)):
        streamed = httpx.post(stack.url + path, json=asked)
        assert streamed.headers["content-type"].startswith("text/event-stream")
        assert "[DONE]" not in streamed.text
        assert streamed.text.count("data: ") == 2


def test_info_and_tokenize(stack: Stack) -> None:
    model = stack.stub.GetModel(pb.GetModelRequest())
    info = httpx.get(f"{stack.url}/info").json()
    assert (info["model_id"], info["max_total_tokens"]) == (model.model, model.context_length)
    text = "Once, Grüße 👋🏽!"
    tokens = httpx.post(f"{stack.url}/tokenize", json={"inputs": text}).json()
    prompt = pb.TokenizeRequest(prompt=pb.Prompt(text=text))
    assert [token["id"] for token in tokens] == list(stack.stub.Tokenize(prompt).token_ids)
    at = 0
    for token in tokens:
        assert at - 1 <= token["start"] <= at <= token["stop"]
        if token["text"] in text:
            assert text[token["start"] : token["stop"]] == token["text"]
        at = token["stop"]
    assert at == len(text)
    refused = httpx.post(f"{stack.url}/tokenize", json={"inputs": ""})
    assert (refused.status_code, refused.json()["error_type"]) == (400, "validation")
    assert refused.json()["error"].startswith("inputs")


def test_leaving_a_stream_ends_the_generation(slow_stack: Stack) -> None:
    before = slow_stack.load().generated_tokens
    client = InferenceClient(model=slow_stack.url)
    stream = client.text_generation("zig zag", max_new_tokens=3000, stream=True)
    next(iter(stream))
    stream.close()  # type: ignore[attr-defined]
    slow_stack.wait_idle()
    assert slow_stack.load().generated_tokens - before < 3000, "it ended by itself"


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        ({"type": "regex", "value": "[0-9]{3}-[a-c]{2}"}, r"[0-9]{3}-[a-c]{2}"),
        ({"type": "json", "value": {"type": "object", "properties": {"n": {"enum": [1, 22]}},
                                    "required": ["n"], "additionalProperties": False}},
         r'\s*\{\s*"n"\s*:\s*-?[0-9]+\s*\}\s*'),
    ],
)  # fmt: skip
def test_a_grammar_is_obeyed(client: InferenceClient, grammar: Any, pattern: str) -> None:
    options: dict[str, Any] = {"max_new_tokens": 60, "temperature": 1.5, "seed": 3}
    text = client.text_generation(PROMPT, grammar=grammar, **options)
    assert re.fullmatch(pattern, text)
    parts = client.text_generation(PROMPT, grammar=grammar, stream=True, **options)
    assert "".join(parts) == text


def test_a_bad_grammar_is_refused_by_its_name(client: InferenceClient) -> None:
    grammar: Any = {"type": "regex", "value": "("}
    with pytest.raises(ValidationError, match=r"parameters\.grammar"):
        client.text_generation(PROMPT, grammar=grammar)
