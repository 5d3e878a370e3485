"""Whatever comes in, what goes out is an answer or a refusal: every parser of the edge under random input."""

import functools
import json
import os
import string
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from starlette.datastructures import QueryParams

from edge.dialects import (
    ai_sdk,
    anthropic,
    anthropic_schema,
    native,
    native_schema,
    openai_chat,
    openai_chat_schema,
    openai_completions,
    responses,
    responses_schema,
    tgi,
    tgi_schema,
    triton,
    triton_schema,
)
from edge.dialects.dialect import ParsedRequest, PromptLimits
from edge.errors import EdgeError
from edge.json_codec import decode_object
from edge.metrics import EdgeMetrics
from edge.request_log import RequestRecord
from edge.settings import EdgeSettings

# For a longer campaign: SLUICE_FUZZ_EXAMPLES=5000 pytest tests/edge/test_fuzzing.py
EXAMPLES = int(os.environ.get("SLUICE_FUZZ_EXAMPLES", "25"))
LIMITS = PromptLimits.of(EdgeSettings())
HI = [{"role": "user", "content": "hi"}]
UI = [{"id": "1", "role": "user", "parts": [{"type": "text", "text": "hi"}]}]
TENSOR = {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["hi"]}
PATH = {"model": "m"}
Parse = Callable[[Mapping[str, Any]], ParsedRequest | None]

# What it parses, a body that is fine, and models whose names of fields are worth trying.
PARSERS: dict[str, tuple[Parse, dict[str, Any], list[type[BaseModel]]]] = {
    "chat": (
        lambda body: openai_chat.parse(body, LIMITS),
        {"messages": HI},
        [openai_chat_schema.ChatCompletionRequest],
    ),
    "completions": (
        lambda body: openai_completions.parse(body, LIMITS),
        {"prompt": "hi"},
        [openai_completions.CompletionRequest],
    ),
    "responses": (
        lambda body: responses.parse(body, LIMITS),
        {"input": "hi"},
        [responses_schema.ResponsesRequest],
    ),
    "anthropic": (
        lambda body: anthropic.parse(body, LIMITS),
        {"messages": HI, "max_tokens": 4, "model": "m"},
        [anthropic_schema.AnthropicRequest],
    ),
    "native": (
        lambda body: native.parse(body, LIMITS),
        {"prompt": "hi"},
        [native_schema.StreamRequest],
    ),
    "AI SDK chat": (lambda body: ai_sdk.parse_chat(body, LIMITS), {"messages": UI}, []),
    "AI SDK text": (lambda body: ai_sdk.parse_text(body, LIMITS), {"prompt": "hi"}, []),
    "TGI": (
        lambda body: tgi.parse(body, LIMITS),
        {"inputs": "hi"},
        [tgi_schema.TgiRequest],
    ),
    "Triton": (
        lambda body: triton.parse_generate(body, LIMITS, PATH),
        {"text_input": "hi"},
        [triton_schema.TritonGenerateRequest],
    ),
    "Triton tensors": (
        lambda body: triton.parse_infer(body, LIMITS, PATH),
        {"inputs": [TENSOR]},
        [triton_schema.TritonInferRequest],
    ),
}
COMMON = ["messages", "role", "content", "type", "text", "tools", "function", "name", "schema"]
INTERESTING: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**32, 2**53, 2**63, -(2**63), 2**64 - 1, 1e308, -0.0),
    *("", "\x00", "\n\x1b[31m", "\u2028", "auto", "user", "assistant", "tool", "system", "text"),
    *("function", "json_schema", "json_object", "required", "{}", "[" * 50, "BYTES", [], {}),
]


def names_of(models: list[type[BaseModel]]) -> list[str]:
    """Every name of a field, at any depth."""
    found = set(COMMON)
    for model in models:
        schema = model.model_json_schema()
        for part in [schema, *schema.get("$defs", {}).values()]:
            found |= part.get("properties", {}).keys()
    return sorted(found)


@functools.cache
def changes_of(name: str) -> st.SearchStrategy[dict[str, Any]]:
    """Fields to put into a body of this dialect."""
    names = names_of(PARSERS[name][2])
    values = st.recursive(
        st.sampled_from(INTERESTING) | st.text(max_size=8) | st.integers(-5, 300),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(names), inner, max_size=4)
        ),
        max_leaves=8,
    )
    return st.dictionaries(st.sampled_from(names), values, max_size=4)


def parse_safely(parse: Callable[[], object]) -> None:
    """It parses, or refuses with a status for the client's own fault."""
    refused: EdgeError | None = None
    try:
        parse()
    except EdgeError as error:
        refused = error
    if refused is not None:
        assert 400 <= refused.status < 500
        assert len(refused.message) < 1000


@pytest.mark.parametrize("name", PARSERS)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_no_body_is_more_than_a_dialect_can_take(name: str, data: st.DataObject) -> None:
    parse, fine, _ = PARSERS[name]
    changes = changes_of(name)
    body = fine | data.draw(changes)
    if data.draw(st.booleans()):  # within what is there already
        for key in ("messages", "input", "inputs"):
            if isinstance(body.get(key), list):
                extra = data.draw(st.lists(changes, max_size=2))
                body[key] = [*fine.get(key, []), *extra] if fine.get(key) != "hi" else extra
    parse_safely(lambda: parse(body))


@given(st.binary(max_size=200) | st.text('{}[]",:\\u0dtrueflsn1e-.', max_size=60).map(str.encode))
def test_no_bytes_are_more_than_a_body_can_be(data: bytes) -> None:
    parse_safely(lambda: decode_object(data, 8))


@given(
    st.text(max_size=120)
    | st.from_regex(r"\A(resume|stream)?-?[0-9a-f.:A-Z_-]{0,100}-?[0-9²]{0,400}(-end)?\Z")
)
def test_no_event_id_is_more_than_a_resume_can_take(event_id: str) -> None:
    parse_safely(lambda: native.resume(event_id))


@given(
    st.text(max_size=80)
    | st.lists(
        st.tuples(
            st.sampled_from(["prompt", "n", "stop", "seed", "logprobs", "access_token", "x"]),
            st.text(max_size=6) | st.sampled_from(["1", "-1", "1e9", "true", "nan", "%00", "²"]),
        ).map("=".join),
        max_size=6,
    ).map("&".join)
)
def test_no_query_is_more_than_a_stream_can_take(query: str) -> None:
    pairs = QueryParams(query).multi_items()
    parse_safely(lambda: native.parse_query(pairs, LIMITS))


@given(st.text(string.printable, max_size=60))
def test_what_is_logged_of_a_field_is_a_name(param: str) -> None:
    """A name that a client made up may be text of a prompt, or tell a terminal what to do."""

    async def send(_: object) -> None: ...

    record = RequestRecord("req-1", None, send, EdgeMetrics())
    record.error(EdgeError(400, "invalid_request_error", "no", param=param))
    logged = record.fields.get("param", "")
    assert logged in ("", param)
    assert not set(logged) - set(string.ascii_letters + string.digits + "_.[]-")
    assert "\\" not in json.dumps(logged)
