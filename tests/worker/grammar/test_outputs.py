"""Whatever the model draws, what it says is of the grammar's language."""

from __future__ import annotations

import json
import re

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inference_worker.chat.format import ChatFormat, ToolFormat, ToolSpec, calls_grammar
from inference_worker.chat.output import ChatOutput
from tests.worker.grammar.noise import Choice, Noise
from tests.worker.grammar.schemas import Schema, schemas
from tests.worker.test_chat_output import summary

FEW = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)
# Of dates a grammar tells the days of each month, but not which years are leap years.
FORMATS = jsonschema.FormatChecker(["email", "ipv4", "ipv6", "uuid"])


def check_json(schema: Schema, choice: Choice) -> None:
    if choice.reason == "LENGTH":
        return
    assert choice.reason == "STOP"
    jsonschema.Draft202012Validator(schema, format_checker=FORMATS).validate(
        json.loads(choice.text)
    )


@FEW
@given(schemas(), st.integers(0, 2**32))
def test_json_obeys_its_schema(noise: Noise, schema: Schema, seed: int) -> None:
    grammar = noise.compile("json_schema", schema)
    requests = [
        noise.request(grammar, seed=seed + i, temperature=1.5, max_tokens=90) for i in range(2)
    ]
    for (choice,) in noise.run(*requests):
        check_json(schema, choice)


def test_json_mostly_ends_by_itself(noise: Noise) -> None:
    """The property above would hold for outputs that are all cut off, too."""
    schema = {"type": "array", "items": {"type": "string", "maxLength": 9}, "minItems": 2}
    grammar = noise.compile("json_schema", schema)
    choices = noise.run(*[noise.request(grammar, seed=seed) for seed in range(20)])
    whole = [choice for (choice,) in choices if choice.reason == "STOP"]
    assert len(whole) >= 15
    assert len({choice.text for choice in whole}) >= 10


@settings(FEW, max_examples=12)
@given(schemas(), st.integers(0, 2**32))
def test_json_in_byte_tokens(byte_fallback: Noise, schema: Schema, seed: int) -> None:
    """Every character beyond ASCII is several tokens here."""
    grammar = byte_fallback.compile("json_schema", schema)
    check_json(schema, byte_fallback.write(grammar, seed=seed, max_tokens=200))


@pytest.mark.parametrize(
    "pattern",
    [
        "[a-z]{3,9}@[a-z]+\\.(com|org)",
        "(ab|abc)(c|cd)?",
        "[αβγ]{2,6}",
        "(🦊|é|日本){3}",
        "-?(0|[1-9][0-9]*)(\\.[0-9]{1,3})?",
        "<\\|im_end\\|>!",
        "[^\\n]{5,30}",
    ],
)
def test_regex_matches_whole(noise: Noise, byte_fallback: Noise, pattern: str) -> None:
    for model in (noise, byte_fallback):
        grammar = model.compile("regex", pattern)
        requests = [model.request(grammar, seed=seed) for seed in range(6)]
        for (choice,) in model.run(*requests):
            assert choice.reason == "STOP"
            assert re.fullmatch(pattern, choice.text), choice.text


def test_choice_is_one_of_the_texts(noise: Noise, byte_fallback: Noise) -> None:
    texts = ["yes", "no", "no way", 'a "quote"', "back\\slash", "line\nbreak", "🦊", "<|im_end|>"]
    for model in (noise, byte_fallback):
        grammar = model.compile("choice", texts)
        requests = [model.request(grammar, seed=seed, temperature=3.0) for seed in range(40)]
        said = [choice for (choice,) in model.run(*requests)]
        assert {choice.reason for choice in said} == {"STOP"}
        assert {choice.text for choice in said} <= set(texts)
        assert len({choice.text for choice in said}) >= 4


def test_lark(noise: Noise) -> None:
    grammar = noise.compile(
        "lark",
        """
        start: sum
        sum: NUMBER ("+" NUMBER)+
        NUMBER: /[1-9][0-9]{0,2}/
        """,
    )
    choices = noise.run(*[noise.request(grammar, seed=seed) for seed in range(10)])
    for (choice,) in choices:
        assert re.match(r"[1-9][0-9]{0,2}(\+[1-9][0-9]{0,2})*", choice.text)
    whole = [choice.text for (choice,) in choices if choice.reason == "STOP"]
    assert whole
    assert all(re.fullmatch(r"[1-9]\d{0,2}(\+[1-9]\d{0,2})+", text) for text in whole)


def test_special_tokens_never_come_inside(noise: Noise) -> None:
    """Neither where anything may come, nor where a grammar asks for their ids."""
    for kind, source in (("regex", "(.|\\n)*"), ("lark", "start: (<[0-200]>)*")):
        grammar = noise.compile(kind, source)  # type: ignore[arg-type]
        choice = noise.write(grammar, max_tokens=200, stop_token_ids=frozenset())
        assert choice.reason == "LENGTH"
        assert len(choice.tokens) == 200
        assert not {0, 1, 2} & set(choice.token_ids)
        assert all(noise.tokenizer.token_bytes(i) for i in choice.token_ids)


TREE: Schema = {
    "$defs": {
        "place": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Köln"]}, "next": {"$ref": "#/$defs/next"}},
            "required": ["city", "next"],
            "additionalProperties": False,
        },
        "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/place"}]},
    },
    "type": "object",
    "properties": {"from": {"$ref": "#/$defs/place"}},
    "required": ["from"],
    "additionalProperties": False,
}
NUMBER: Schema = {
    "$ref": "#/$defs/number",
    "$defs": {
        "number": {
            "type": "object",
            "properties": {"place": {"type": "integer", "minimum": 1, "maximum": 30}},
            "required": ["place"],
            "additionalProperties": False,
        }
    },
}


@pytest.mark.parametrize("is_parallel", [False, True])
@pytest.mark.parametrize(
    "chat_format",
    [
        ChatFormat(ToolFormat.HERMES),
        ChatFormat(ToolFormat.LLAMA3),
        ChatFormat(ToolFormat.MISTRAL),
        ChatFormat(ToolFormat.MISTRAL, has_args_mark=True),
    ],
    ids=str,
)
def test_required_calls_obey_schemas_with_definitions_of_their_own(
    noise: Noise, chat_format: ChatFormat, is_parallel: bool
) -> None:
    """Of two functions that mean different things by one name; and what was written is read as calls."""
    schemas = {"go": TREE, "pick": NUMBER}
    tools = [ToolSpec(name, schema) for name, schema in schemas.items()]
    grammar = noise.compile("lark", calls_grammar(chat_format, tools, is_parallel=is_parallel))
    requests = [
        noise.request(grammar, seed=seed, prompt=(5, 6, seed), max_tokens=150) for seed in range(12)
    ]
    written = [choice for (choice,) in noise.run(*requests) if choice.reason == "STOP"]
    called = set()
    for choice in written:
        output = ChatOutput(chat_format, frozenset(schemas), is_reasoning=False)
        reasoning, text, calls = summary([*output.push(choice.text), *output.flush()])
        assert (reasoning, text) == ("", "")
        assert len(calls) == 1 or is_parallel
        for name, arguments in calls:
            jsonschema.validate(json.loads(arguments), schemas[name])
            called.add(name)
    assert called == {"go", "pick"}
