"""Reasoning and calls of functions in a stream of text, however it is cut."""

from __future__ import annotations

import json
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_worker.chat.format import ChatFormat, ToolFormat
from inference_worker.chat.output import (
    CallPiece,
    ChatOutput,
    DeliveredOutput,
    Piece,
    Reasoning,
    Text,
)

HERMES = ChatFormat(ToolFormat.HERMES)
LLAMA3 = ChatFormat(ToolFormat.LLAMA3)
MISTRAL = ChatFormat(ToolFormat.MISTRAL)
THINKING = ChatFormat(ToolFormat.HERMES, marks_reasoning=True)
NAMES = frozenset({"f", "get_weather"})
PARIS = '{"city": "Paris {}[] \\" <tool_call>"}'

Summary = tuple[str, str, list[tuple[str, str]]]


def summary(pieces: list[Piece]) -> Summary:
    """Reasoning, text, and calls as (name, arguments)."""
    calls: list[tuple[str, str]] = []
    ids = set()
    for piece in pieces:
        if isinstance(piece, CallPiece):
            if piece.name is not None:
                assert piece.index == len(calls)
                calls.append((piece.name, ""))
                ids.add(piece.call_id)
            name, arguments = calls[piece.index]
            calls[piece.index] = (name, arguments + piece.arguments)
    assert len(ids) == len(calls)
    assert all(re.fullmatch("call_[0-9a-f]{24}", str(one)) for one in ids)
    reasoning = "".join(piece.text for piece in pieces if isinstance(piece, Reasoning))
    return reasoning, "".join(p.text for p in pieces if isinstance(p, Text)), calls


def read(
    chat_format: ChatFormat,
    parts: list[str],
    names: frozenset[str] = NAMES,
    is_reasoning: bool = False,
) -> Summary:
    output = ChatOutput(chat_format, names, is_reasoning=is_reasoning)
    pieces = [piece for part in parts for piece in output.push(part)]
    pieces += output.flush()
    result = summary(pieces)
    assert output.has_calls == bool(result[2])
    return result


def hermes(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


CASES: list[tuple[ChatFormat, str, Summary]] = [
    (HERMES, "plain < text <tool", ("", "plain < text <tool", [])),
    (HERMES, hermes("f", PARIS), ("", "", [("f", PARIS)])),
    (HERMES, f"Well.\n\n{hermes('f', '{}')}", ("", "Well.", [("f", "{}")])),
    (
        HERMES,
        hermes("f", PARIS) + "\n" + hermes("g", '{"a": [1, {"b": 2}]}') + "\n",
        ("", "", [("f", PARIS), ("g", '{"a": [1, {"b": 2}]}')]),
    ),
    (HERMES, hermes("f", "{}") + " and more", ("", " and more", [("f", "{}")])),
    # the other way round, and with members nobody knows
    (
        HERMES,
        '<tool_call>{"id": 7, "arguments": {"x": 1}, "name": "f"}</tool_call>',
        ("", "", [("f", '{"x": 1}')]),
    ),
    (HERMES, '<tool_call>{"name": "f"}</tool_call>', ("", "", [("f", "{}")])),
    (HERMES, '<tool_call>{"name": "caf\\u00e9"}</tool_call>', ("", "", [("café", "{}")])),
    # cut by max_tokens
    (HERMES, '<tool_call>\n{"name": "f", "arguments": {"x": "y', ("", "", [("f", '{"x": "y')])),
    (HERMES, '<tool_call>\n{"name": "f', ("", '<tool_call>\n{"name": "f', [])),
    # no calls
    (HERMES, "a <tool_call>\nno</tool_call> b", ("", "a <tool_call>\nno</tool_call> b", [])),
    (HERMES, '<tool_call>{"x": 1}</tool_call>', ("", '<tool_call>{"x": 1}</tool_call>', [])),
    (HERMES, '<tool_call>{"name": 7}</tool_call>', ("", '<tool_call>{"name": 7}</tool_call>', [])),
    (
        HERMES,
        '<tool_call>{"name": "f", "arguments": "x"}',
        ("", '<tool_call>{"name": "f", "arguments": "x"}', []),
    ),
    (HERMES, '<tool_call>{"name": "f", "arguments": {} x}', ("", "x}", [("f", "{}")])),
    # a call behind one that is none
    (
        HERMES,
        "<tool_call>no</tool_call>\n" + hermes("f", "{}"),
        ("", "<tool_call>no</tool_call>", [("f", "{}")]),
    ),
    (LLAMA3, '{"name": "f", "parameters": {"a": 1}}', ("", "", [("f", '{"a": 1}')])),
    (
        LLAMA3,
        '<|python_tag|>{"name": "f", "parameters": {}}; {"name": "get_weather", "parameters": {}}',
        ("", "", [("f", "{}"), ("get_weather", "{}")]),
    ),
    (LLAMA3, '{"name": "Ada", "age": 36}', ("", '{"name": "Ada", "age": 36}', [])),
    (LLAMA3, 'Say {"name": "f"}', ("", 'Say {"name": "f"}', [])),
    (LLAMA3, '{"a": [1, 2]} is JSON', ("", '{"a": [1, 2]} is JSON', [])),
    (LLAMA3, " \n", ("", " \n", [])),
    (
        MISTRAL,
        'Hm.[TOOL_CALLS][{"name": "f", "arguments": {"a": "]"}}, {"name": "g", "arguments": {}}]',
        ("", "Hm.", [("f", '{"a": "]"}'), ("g", "{}")]),
    ),
    (
        MISTRAL,
        '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]get_weather[ARGS]{"city": "x"}',
        ("", "", [("f", '{"a": 1}'), ("get_weather", '{"city": "x"}')]),
    ),
    (MISTRAL, "a [TOOL and [no]", ("", "a [TOOL and [no]", [])),
    (MISTRAL, "[TOOL_CALLS]what", ("", "[TOOL_CALLS]what", [])),
    (MISTRAL, "[TOOL_CALLS] [{what}]", ("", "[TOOL_CALLS] [{what}]", [])),
    (MISTRAL, "[TOOL_CALLS]f[ARGS]{} Bye", ("", "Bye", [("f", "{}")])),
    (
        MISTRAL,
        '[TOOL_CALLS][{what}][TOOL_CALLS][{"name": "f", "arguments": {}}]',
        ("", "[TOOL_CALLS][{what}]", [("f", "{}")]),
    ),
    (
        MISTRAL,
        "[TOOL_CALLS]" + "n" * 300 + "[ARGS]{}[TOOL_CALLS]f[ARGS]{}",
        ("", "[TOOL_CALLS]" + "n" * 300 + "[ARGS]{}", [("f", "{}")]),
    ),
    (THINKING, "<think>\nHm. So </thin.\n</think>\n\nYes.", ("Hm. So </thin.", "Yes.", [])),
    (THINKING, "\n<think>Hm</think>" + hermes("f", "{}"), ("Hm", "", [("f", "{}")])),
    (THINKING, "Yes <think>no</think>", ("", "Yes <think>no</think>", [])),
    (THINKING, "<think>cut sho", ("cut sho", "", [])),
    (THINKING, "<thi", ("", "<thi", [])),
    (HERMES, "<think>no</think>", ("", "<think>no</think>", [])),
]


@pytest.mark.parametrize(("chat_format", "text", "expected"), CASES)
def test_whole_by_character_and_in_halves(
    chat_format: ChatFormat, text: str, expected: Summary
) -> None:
    assert read(chat_format, [text]) == expected
    assert read(chat_format, list(text)) == expected
    for cut in range(len(text)):
        assert read(chat_format, [text[:cut], text[cut:]]) == expected


@pytest.mark.parametrize("chat_format", [HERMES, LLAMA3, MISTRAL])
def test_without_tools_all_is_text(chat_format: ChatFormat) -> None:
    for text in (hermes("f", "{}"), '{"name": "f"}', "[TOOL_CALLS]f[ARGS]{}"):
        assert read(chat_format, list(text), names=frozenset()) == ("", text, [])


def test_reasoning_that_the_prompt_has_begun() -> None:
    parts = ["\nHm", ".\n</thi", "nk>\n", "\nYes\n"]
    assert read(THINKING, parts, is_reasoning=True) == ("Hm.", "Yes\n", [])


def test_arguments_come_as_they_are_written() -> None:
    output = ChatOutput(HERMES, NAMES, is_reasoning=False)
    seen = []
    for character in hermes("f", '{"city": "Paris"}'):
        seen += output.push(character)
    pieces = [piece for piece in seen if isinstance(piece, CallPiece)]
    assert pieces[0].name == "f"
    assert len(pieces) > 10
    assert all(piece.name is None and piece.call_id is None for piece in pieces[1:])


TEXTS = st.text(
    st.sampled_from(list('<tool_call>/[TOOL_CALLS]ARGS{}",: \\\nnamefx1|;think')), max_size=60
) | st.sampled_from([case[1] for case in CASES])


@given(
    chat_format=st.sampled_from([HERMES, LLAMA3, MISTRAL, THINKING]),
    texts=st.lists(TEXTS, max_size=4),
    cuts=st.lists(st.integers(0, 200), max_size=8),
)
def test_the_cuts_do_not_matter(chat_format: ChatFormat, texts: list[str], cuts: list[int]) -> None:
    text = "".join(texts)
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    parts = [text[a:b] for a, b in pairwise(places)]
    assert read(chat_format, parts) == read(chat_format, [text])


@given(
    chat_format=st.sampled_from([HERMES, LLAMA3, MISTRAL, THINKING]),
    texts=st.lists(TEXTS, max_size=4),
    cuts=st.lists(st.integers(0, 200), max_size=8),
    num_read=st.integers(0, 40),
    is_parallel=st.booleans(),
)
def test_who_has_the_beginning_gets_the_rest(
    chat_format: ChatFormat, texts: list[str], cuts: list[int], num_read: int, is_parallel: bool
) -> None:
    text = "".join(texts)
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    parts = [text[a:b] for a, b in pairwise(places)]

    def pieces(parts: list[str], delivered: DeliveredOutput | None = None) -> list[Piece]:
        output = ChatOutput(
            chat_format, NAMES, is_reasoning=False, is_parallel=is_parallel, delivered=delivered
        )
        pushed = [piece for part in parts for piece in output.push(part)]
        return [*pushed, *output.flush()]

    begun = pieces(list(text))[:num_read]
    calls = [piece for piece in begun if isinstance(piece, CallPiece)]
    delivered = DeliveredOutput(
        text_characters=sum(len(p.text) for p in begun if isinstance(p, Text)),
        reasoning_characters=sum(len(p.text) for p in begun if isinstance(p, Reasoning)),
        tool_calls=sum(call.name is not None for call in calls),
        argument_characters=sum(len(call.arguments) for call in calls),
    )
    assert summary([*begun, *pieces(parts, delivered)]) == summary(pieces([text]))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    ),
    st.booleans(),
    st.integers(1, 9),
)
def test_any_arguments(value: object, is_ascii: bool, step: int) -> None:
    written = json.dumps({"value": value}, ensure_ascii=is_ascii)
    for chat_format, text in (
        (HERMES, hermes("f", written)),
        (LLAMA3, f'{{"name": "f", "parameters": {written}}}'),
        (MISTRAL, f"[TOOL_CALLS]f[ARGS]{written}"),
    ):
        parts = [text[i : i + step] for i in range(0, len(text), step)]
        assert read(chat_format, parts) == ("", "", [("f", written)])


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, ChatFormat()),
        ("{{ messages }}", ChatFormat()),
        ("{% if tools %}<tool_call>{% endif %}", HERMES),
        ("{% if tools %}<tool_call>{% endif %}<think></think>", THINKING),
        ("{% if tools %}<|python_tag|>", LLAMA3),
        ("{% if tools %}[TOOL_CALLS]", MISTRAL),
        ("{% if tools %}[TOOL_CALLS]x[ARGS]", ChatFormat(ToolFormat.MISTRAL, has_args_mark=True)),
    ],
)
def test_the_template_tells_the_format(template: str | None, expected: ChatFormat) -> None:
    assert ChatFormat.of_template(template) == expected


def test_calls_behind_the_first_are_dropped_if_only_one_may_be() -> None:
    output = ChatOutput(HERMES, NAMES, is_reasoning=False, is_parallel=False)
    text = f"{hermes('f', PARIS)}\n{hermes('g', PARIS)}"
    assert summary([*output.push(text), *output.flush()]) == ("", "", [("f", PARIS)])
