"""Any text survives JSON and SSE, whoever cuts the stream into lines."""

import json
from typing import Any

import pytest
from annotated_types import Le
from hypothesis import given
from hypothesis import strategies as st

from edge.dialects.anthropic import AnthropicCollector, AnthropicEncoder
from edge.dialects.common import shown_bytes
from edge.dialects.dialect import StreamEncoder
from edge.dialects.native import NativeEncoder
from edge.dialects.openai_chat import ChatCollector, ChatEncoder
from edge.dialects.openai_completions import CompletionEncoder
from edge.errors import EdgeError
from edge.json_codec import decode_object, encode
from edge.settings import EdgeSettings
from protos.sluice.v1 import generation_pb2 as pb
from tests.edge.sse import parse

TEXT = st.text(
    st.characters(codec="utf-8")
    | st.sampled_from('\u2028\u2029\x85\r\n\x0b\x0c\x1c\x1d\x1e"\\:\ufeff\ufffd😀\u200d')
)


def delta(sequence_number: int, text: str) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        sequence_number=sequence_number, delta=pb.Delta(text=text, token_count=1)
    )


STARTED = pb.GenerateResponse(started=pb.Started(request_id="r", model="m", n=1))


def content(event: Any) -> str:
    if "choices" not in event:
        return str(event.get("text", ""))
    choice = event["choices"][0]
    return str(choice["text"] if "text" in choice else choice["delta"].get("content", ""))


@pytest.mark.parametrize("dialect", ["chat", "completions", "native"])
@given(texts=st.lists(TEXT, max_size=6))
def test_any_text_survives(dialect: str, texts: list[str]) -> None:
    encoders: dict[str, StreamEncoder] = {
        "chat": ChatEncoder("id", False, False, False),
        "completions": CompletionEncoder("id", False, False, False, 1),
        "native": NativeEncoder("id"),
    }
    encoder = encoders[dialect]
    encoder.encode(0, STARTED)
    raw = b"".join(encoder.encode(0, delta(i, text)) for i, text in enumerate(texts, 1))
    assert [content(event.json()) for event in parse(raw).events] == texts
    # A reader that takes every Unicode line separator for a line end sees the same lines.
    lines = raw.decode().splitlines()
    assert "\n".join(lines) + "\n" * bool(texts) == raw.decode()
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert [content(json.loads(line)) for line in data] == texts


@given(value=st.recursive(TEXT | st.integers(-(2**60), 2**60), st.lists, max_leaves=8))
def test_json_round_trip(value: Any) -> None:
    encoded = encode({"value": value})
    assert json.loads(encoded) == {"value": value}
    assert len(encoded.decode().splitlines()) == 1


@given(token=st.binary(max_size=8))
def test_every_token_is_shown_without_replacement_characters(token: bytes) -> None:
    shown = shown_bytes(token)
    assert ("\ufffd" in shown) == ("\ufffd".encode() in token)
    encode(shown)


JSON = st.recursive(
    st.none() | st.booleans() | TEXT | st.sampled_from(['[{"', "\\", '\\"', "]}"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=12,
)


def depth_of(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth_of, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(depth_of, value), default=0)
    return 0


@given(value=st.dictionaries(TEXT, JSON, max_size=3), limit=st.integers(1, 8))
def test_depth_is_counted_as_a_parser_would(value: dict[str, Any], limit: int) -> None:
    data = json.dumps(value).encode()
    if depth_of(value) <= limit:
        assert decode_object(data, limit) == value
    else:
        with pytest.raises(EdgeError):
            decode_object(data, limit)


@given(data=st.binary(max_size=64))
def test_garbage_is_a_400(data: bytes) -> None:
    status = 200
    try:
        decoded: object = decode_object(data, 8)
    except EdgeError as error:
        decoded, status = {}, error.status
    assert isinstance(decoded, dict)
    assert status in (200, 400)


CALLS = pb.GenerateResponse(
    sequence_number=1,
    delta=pb.Delta(
        reasoning="Hm",
        text="So",
        tool_calls=[
            pb.ToolCallDelta(index=0, id="call_1", name="f", arguments='{"a'),
            pb.ToolCallDelta(index=0, arguments='": 1}'),
        ],
    ),
)
FIRST = {"index": 0, "id": "call_1", "type": "function"}


def test_a_chat_has_reasoning_text_and_calls_in_chunks_of_their_own() -> None:
    encoder = ChatEncoder("id", False, False, False)
    encoder.encode(0, STARTED)
    events = parse(encoder.encode(0, CALLS)).events
    assert [event.json()["choices"][0]["delta"] for event in events] == [
        {"reasoning_content": "Hm"},
        {"content": "So"},
        {"tool_calls": [FIRST | {"function": {"name": "f", "arguments": '{"a'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '": 1}'}}]},
    ]
    collector = ChatCollector("id", False)
    for message in (STARTED, CALLS):
        collector.add(0, message)
    answer = json.loads(collector.body())["choices"][0]["message"]
    assert answer["reasoning_content"] == "Hm"
    assert answer["content"] == "So"
    function = {"name": "f", "arguments": '{"a": 1}'}
    assert answer["tool_calls"] == [{"id": "call_1", "type": "function", "function": function}]


def test_the_native_dialect_tells_reasoning_and_calls_apart() -> None:
    encoder = NativeEncoder("id")
    encoder.encode(0, STARTED)
    data = parse(encoder.encode(0, CALLS)).events[0].json()
    assert (data["reasoning"], data["text"]) == ("Hm", "So")
    assert data["tool_calls"] == [
        {"index": 0, "id": "call_1", "name": "f", "arguments": '{"a'},
        {"index": 0, "arguments": '": 1}'},
    ]


def test_anthropic_has_a_block_for_each() -> None:
    encoder = AnthropicEncoder("id")
    encoder.encode(0, STARTED)
    finished = pb.Finished(finish_reason=pb.FINISH_REASON_TOOL_CALLS)
    raw = encoder.encode(0, CALLS) + encoder.encode(0, pb.GenerateResponse(finished=finished))
    kinds = [(e.json()["type"], e.json().get("index")) for e in parse(raw + encoder.end()).events]
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert kinds == [
        *((kind, 0) for kind in block),
        *((kind, 1) for kind in block),
        *((kind, 2) for kind in [block[0], block[1], block[1], block[2]]),
        ("message_delta", None),
        ("message_stop", None),
    ]
    collector = AnthropicCollector("id")
    for message in (STARTED, CALLS, pb.GenerateResponse(finished=finished)):
        collector.add(0, message)
    answer = json.loads(collector.body())
    assert [one["type"] for one in answer["content"]] == ["thinking", "text", "tool_use"]
    assert answer["content"][2]["input"] == {"a": 1}
    assert answer["stop_reason"] == "tool_use"


def test_what_a_body_may_hold_can_be_written_again() -> None:
    """A tool's schema is passed on as JSON."""
    [deepest] = [
        m.le for m in EdgeSettings.model_fields["max_json_depth"].metadata if isinstance(m, Le)
    ]
    assert isinstance(deepest, int)
    body = b'{"a":' * deepest + b"1" + b"}" * deepest
    value = decode_object(body, deepest)
    assert encode(value) == body
    assert encode({"response": {"tools": [value]}}).endswith(b"}")
