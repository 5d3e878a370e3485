"""Bodies that are made to be expensive to refuse: what is collected about them stays small."""

import threading
from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any, ClassVar

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from starlette.requests import Request

from edge.dialects import (
    ai_sdk,
    ai_sdk_messages,
    anthropic,
    native,
    openai_chat,
    openai_completions,
    responses,
    responses_annotation,
    responses_input,
    schema,
    tgi,
    triton,
)
from edge.dialects.dialect import ParsedRequest, PromptLimits
from edge.errors import EdgeError, invalid_request
from edge.json_codec import decode_object
from edge.request_body import read_parsed
from protos.sluice.v1 import generation_pb2 as pb

MANY = 20_000
NUM_PARTS = 2000
MOST_ERRORS = 100
LIMITS = PromptLimits(
    max_body_bytes=4 << 20, max_json_depth=32, max_json_values=65536, max_prompts=32
)
HI = [{"role": "user", "content": "hi"}]
FIELDS = {f"field{number}": 1 for number in range(MANY)}
Parse = Callable[[Mapping[str, Any], PromptLimits], ParsedRequest]
CHAT, COMPLETIONS, NATIVE = openai_chat.parse, openai_completions.parse, native.parse

TGI, RESPONSES = tgi.parse, responses.parse


def infer(body: Mapping[str, Any], limits: PromptLimits) -> ParsedRequest:
    return triton.parse_infer(body, limits, {"model": "m"})


def generate(body: Mapping[str, Any], limits: PromptLimits) -> ParsedRequest:
    return triton.parse_generate(body, limits, {"model": "m"})


TEXT = {"name": "TEXT", "datatype": "BYTES", "shape": [MANY], "data": ["x"] * MANY}
ONE = TEXT | {"shape": [1], "data": ["x"]}

BODIES: list[tuple[Parse, dict[str, Any]]] = [
    (CHAT, {"messages": [{}] * MANY}),
    (ai_sdk.parse_chat, {"messages": [{}] * MANY}),
    (ai_sdk.parse_chat, {"messages": [{"role": "user", "parts": [{}] * MANY}]}),
    (ai_sdk.parse_chat, {"messages": [{"role": "user", "parts": [FIELDS]}]}),
    (ai_sdk.parse_text, {"prompt": "x", "tools": dict.fromkeys(FIELDS, 1)}),
    (CHAT, {"messages": [*HI, *[{"role": "user", "content": 1}] * MANY]}),
    (CHAT, {"messages": [{"role": "user", "content": [{}] * MANY}]}),
    (CHAT, {"messages": [{"role": "user", "content": "x"} | FIELDS]}),
    (CHAT, {"messages": HI, "modalities": ["x"] * MANY}),
    (CHAT, {"messages": HI, "tools": [{}] * MANY}),
    (CHAT, {"messages": HI} | FIELDS),
    (CHAT, {"messages": HI, "stream_options": FIELDS}),
    (CHAT, {"messages": HI, "response_format": FIELDS}),
    (COMPLETIONS, {"prompt": [-1] * MANY}),
    (COMPLETIONS, {"prompt": [1, *["x"] * MANY]}),
    (COMPLETIONS, {"prompt": [[-1] * MANY]}),
    (COMPLETIONS, {"prompt": [["x"] * MANY]}),
    (COMPLETIONS, {"prompt": [[]] * MANY}),
    (COMPLETIONS, {"prompt": [{}] * MANY}),
    (COMPLETIONS, {"prompt": [True] * MANY}),
    (COMPLETIONS, {"prompt": ["x"] * MANY}),
    (COMPLETIONS, {"prompt": [[1]] * MANY}),
    (COMPLETIONS, {"prompt": "x", "stop": [1] * MANY}),
    (COMPLETIONS, {"prompt": "x", "stop_sequences": [1] * MANY}),
    (COMPLETIONS, {"prompt": "x", "stop_token_ids": [-1] * MANY}),
    (COMPLETIONS, {"prompt": "x", "logit_bias": FIELDS}),
    (COMPLETIONS, {"prompt": "x", "logit_bias": dict(list(FIELDS.items())[:1000])}),
    (NATIVE, {"messages": [{}] * MANY}),
    (NATIVE, {"token_ids": [-1] * MANY}),
    (NATIVE, {"prompt": "x"} | FIELDS),
    (TGI, {"inputs": "x"} | FIELDS),
    (TGI, {"inputs": "x", "parameters": FIELDS}),
    (TGI, {"inputs": "x", "parameters": {"stop": [1] * MANY}}),
    (TGI, {"inputs": "x", "parameters": {"grammar": FIELDS}}),
    (RESPONSES, {"input": [{}] * MANY}),
    (RESPONSES, {"input": [{"type": "x" * MANY}]}),
    (RESPONSES, {"input": [*HI, *[{"role": "user", "content": [{}]}] * MANY]}),
    (RESPONSES, {"input": [{"type": "reasoning", "summary": [{}] * MANY}]}),
    (RESPONSES, {"input": "x", "tools": [{}] * MANY}),
    (RESPONSES, {"input": "x", "include": ["x"] * MANY}),
    (RESPONSES, {"input": "x", "metadata": FIELDS}),
    (RESPONSES, {"input": "x", "text": {"format": FIELDS}}),
    (RESPONSES, {"input": "x"} | FIELDS),
    (generate, {"text_input": "x", "parameters": FIELDS}),
    (infer, {"inputs": [{}] * MANY}),
    (infer, {"inputs": [ONE] * MANY}),
    (infer, {"inputs": [TEXT]}),
    (infer, {"inputs": [TEXT | {"data": [1] * MANY}]}),
    (infer, {"inputs": [TEXT | {"shape": [-1] * MANY}]}),
    (infer, {"inputs": [TEXT | {"shape": [2**31 - 1] * 8}]}),
    (infer, {"inputs": [TEXT | FIELDS]}),
    (infer, {"inputs": [TEXT | {"parameters": FIELDS}]}),
    (infer, {"inputs": [TEXT], "outputs": [{}] * MANY}),
    (infer, {"inputs": [TEXT], "outputs": [{"name": "text_output"}] * MANY}),
    (infer, {"inputs": [TEXT], "parameters": FIELDS}),
]


@pytest.mark.parametrize(
    ("parse", "body"),
    BODIES,
    ids=[f"{parse.__module__}-{number}" for number, (parse, _) in enumerate(BODIES)],
)
def test_few_errors_are_collected(
    monkeypatch: pytest.MonkeyPatch, parse: Parse, body: dict[str, Any]
) -> None:
    collected: list[int] = []
    explain = schema._explain

    def counting(model: Any, body: Any, error: ValidationError) -> EdgeError:
        collected.append(error.error_count())
        return explain(model, body, error)

    monkeypatch.setattr(schema, "_explain", counting)
    with pytest.raises(EdgeError) as refused:
        parse(body, LIMITS)
    assert refused.value.status == 400
    assert len(refused.value.message) < 300
    assert sum(collected) <= MOST_ERRORS


class CountingMessage:
    """A message of the contract that counts the characters written into it, each of which is copied there."""

    made: ClassVar[list["CountingMessage"]] = []

    def __init__(self, **fields: Any) -> None:
        self.__dict__["message"] = pb.ChatMessage(**fields)
        self.__dict__["written"] = sum(len(str(value)) for value in fields.values())
        self.made.append(self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.message, name)

    def __setattr__(self, name: str, value: str) -> None:
        self.__dict__["written"] += len(value)
        setattr(self.message, name, value)


def parts(kind: str, field: str) -> list[dict[str, str]]:
    return [{"type": kind, field: "x"}] * NUM_PARTS


CLAUDE = {"model": "m", "max_tokens": 1}
ASSISTANT_PARTS = [*parts("text", "text"), *parts("reasoning", "text")]
IN_PARTS: list[tuple[Any, Any, dict[str, Any]]] = [
    (
        anthropic,
        anthropic.parse,
        CLAUDE | {"messages": [{"role": "user", "content": parts("text", "text")}]},
    ),
    (
        anthropic,
        anthropic.parse,
        CLAUDE | {"messages": [{"role": "assistant", "content": parts("thinking", "thinking")}]},
    ),
    (anthropic, anthropic.parse, CLAUDE | {"messages": HI, "system": parts("text", "text")}),
    (
        ai_sdk_messages,
        ai_sdk.parse_chat,
        {"id": "c", "messages": [{"id": "m", "role": "user", "parts": parts("text", "text")}]},
    ),
    (
        ai_sdk_messages,
        ai_sdk.parse_chat,
        {
            "id": "c",
            "messages": [
                {"id": "m", "role": "assistant", "parts": ASSISTANT_PARTS},
                {"id": "n", "role": "user", "parts": parts("text", "text")},
            ],
        },
    ),
    (openai_chat, CHAT, {"messages": [{"role": "user", "content": parts("text", "text")}]}),
    (
        responses_input,
        RESPONSES,
        {"input": [{"role": "user", "content": parts("input_text", "text")}]},
    ),
    (
        responses_input,
        RESPONSES,
        {
            "input": [
                {"type": "reasoning", "content": parts("reasoning_text", "text"), "summary": []}
            ]
        },
    ),
]


@pytest.mark.parametrize(
    ("module", "parse", "body"),
    IN_PARTS,
    ids=[f"{module.__name__}-{number}" for number, (module, _, _) in enumerate(IN_PARTS)],
)
def test_a_text_of_many_parts_is_copied_once(
    monkeypatch: pytest.MonkeyPatch, module: Any, parse: Parse, body: dict[str, Any]
) -> None:
    expected = [message.SerializeToString() for message in chat_of(parse, body)]
    said = sum(len(m.content) + len(m.reasoning) for m in chat_of(parse, body))
    assert said >= NUM_PARTS
    monkeypatch.setattr(CountingMessage, "made", [])
    counting = SimpleNamespace(**vars(pb) | {"ChatMessage": CountingMessage, "Chat": unwrapped})
    for place in (module, responses, responses_annotation):
        monkeypatch.setattr(place, "pb", counting)
    chat_messages = ai_sdk_messages.chat_messages
    monkeypatch.setattr(ai_sdk, "chat_messages", lambda *args: own(chat_messages(*args)))
    assert [message.SerializeToString() for message in chat_of(parse, body)] == expected
    assert said <= sum(message.written for message in CountingMessage.made) <= 2 * said


def own(messages: Iterable[Any]) -> list[pb.ChatMessage]:
    return [message.message for message in messages]


def unwrapped(messages: Iterable[Any]) -> pb.Chat:
    return pb.Chat(messages=own(messages))


def chat_of(parse: Parse, body: dict[str, Any]) -> list[pb.ChatMessage]:
    return list(parse(body, LIMITS).requests[0].prompt.chat.messages)


@pytest.mark.parametrize("prompt", [["x"] * 33, [[1]] * 33, [[]] * 33])
def test_prompts_are_counted_before_they_are_validated(
    monkeypatch: pytest.MonkeyPatch, prompt: list[Any]
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("validated")

    monkeypatch.setattr(openai_completions, "validate", never)
    with pytest.raises(EdgeError, match="prompt: at most 32 at once"):
        openai_completions.parse({"prompt": prompt}, LIMITS)


def test_a_long_list_of_numbers_is_one_prompt() -> None:
    parsed = openai_completions.parse({"prompt": [1] * MANY}, LIMITS)
    assert len(parsed.requests) == 1


def test_as_many_logit_biases_as_are_allowed() -> None:
    biases = {str(number): 1.0 for number in range(schema.MAX_LOGIT_BIASES)}
    parsed = openai_chat.parse({"messages": HI, "logit_bias": biases}, LIMITS)
    assert len(parsed.requests[0].sampling.logit_bias) == schema.MAX_LOGIT_BIASES
    with pytest.raises(EdgeError, match="logit_bias: more than 1024 entries"):
        openai_chat.parse({"messages": HI, "logit_bias": biases | {"5000": 1.0}}, LIMITS)


def test_a_huge_field_name_is_not_shown_whole() -> None:
    with pytest.raises(EdgeError) as refused:
        openai_chat.parse({"messages": HI, "x" * 100_000: 1}, LIMITS)
    assert len(refused.value.message) < 300
    assert len(refused.value.param or "") < 300


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt: must not be empty."),
        ([[]], "prompt[0]: must not be empty."),
        ([-1], "prompt[0]: Input should be greater than or equal to 0."),
    ],
)
def test_a_bad_prompt_is_explained(prompt: list[Any], message: str) -> None:
    with pytest.raises(EdgeError) as refused:
        openai_completions.parse({"prompt": prompt}, LIMITS)
    assert refused.value.message == message


@given(
    st.recursive(
        st.sampled_from([1, "[[{", '"\\[', "]}"]),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("[{\\"), inner),
        max_leaves=12,
    )
)
def test_depth_is_counted_exactly(value: Any) -> None:
    def depth(value: Any) -> int:
        if isinstance(value, dict):
            value = list(value.values())
        return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0

    body = {"a": value}
    data = orjson.dumps(body)
    assert decode_object(data, depth(body)) == body
    with pytest.raises(EdgeError, match="deeper"):
        decode_object(data, depth(body) - 1)


@given(
    st.recursive(
        st.sampled_from([1, None, "x", '"', '\\"', "\\", '[{"', "]}"]),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('["\\'), inner),
        max_leaves=12,
    )
)
def test_values_are_counted_exactly(value: Any) -> None:
    def count(value: Any) -> int:
        if isinstance(value, dict):
            return 1 + len(value) + sum(map(count, value.values()))
        return 1 + sum(map(count, value)) if isinstance(value, list) else isinstance(value, str)

    body = {"a": value}
    data = orjson.dumps(body)
    assert decode_object(data, 100, count(body)) == body
    with pytest.raises(EdgeError, match="objects, arrays and strings") as refused:
        decode_object(data, 100, count(body) - 1)
    assert refused.value.status == 400


@pytest.mark.parametrize(("size", "is_beside"), [(100, False), (100_000, True)])
async def test_a_large_body_is_parsed_beside_the_event_loop(size: int, is_beside: bool) -> None:
    data = orjson.dumps({"a": "x" * size})

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": data}

    def parse(body: dict[str, Any]) -> threading.Thread:
        assert len(body["a"]) == size
        return threading.current_thread()

    request = Request({"type": "http", "headers": []}, receive)
    thread = await read_parsed(request, LIMITS, parse)
    assert (thread is not threading.current_thread()) == is_beside

    def refuse(body: dict[str, Any]) -> None:
        raise invalid_request("no", "a")

    with pytest.raises(EdgeError, match="no"):
        await read_parsed(request, LIMITS, refuse)


@pytest.mark.parametrize("data", [b"[" * 40, b"]" * 40, b"][" * 40, b"{", b"(" * 40 + b"[]"])
def test_brackets_that_do_not_match_are_a_400(data: bytes) -> None:
    with pytest.raises(EdgeError) as refused:
        decode_object(data, 32)
    assert refused.value.status == 400
