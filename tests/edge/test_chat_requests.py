"""What bodies of chats become: messages, the answer that is continued, reasoning, and what cannot be honoured."""

from typing import Any

import httpx
import pytest

from tests.edge.scripted_worker import ScriptedWorker
from tests.edge.sent_requests import CHAT, HI, refused, sent


async def test_chat_roles_and_parts(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    answer: dict[str, Any] = {
        "role": "assistant",
        "content": "yes",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": None,
    }
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = await sent(
        http,
        worker,
        CHAT,
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "system", "content": ""},
            {"role": "user", "content": parts, "name": "bob"},
            answer,
            {"role": "assistant", "content": None, "reasoning_content": None, "other": None},
        ],
    )
    assert request["prompt"]["chat"]["messages"] == [
        {"role": "system", "content": "be brief"},
        {"role": "system"},
        {"role": "user", "content": "ab", "name": "bob"},
        {"role": "assistant", "content": "yes"},
        {"role": "assistant"},
    ]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("functions", [{"name": "f"}]),
        ("modalities", ["audio"]),
        ("audio", {"voice": "x"}),
        ("prediction", {"type": "content", "content": "x"}),
        ("verbosity", "high"),
        ("web_search_options", {}),
        ("min_tokens", 5),
        ("skip_special_tokens", False),
    ],
)
async def test_unsupported_chat_features_are_named(
    http: httpx.AsyncClient, worker: ScriptedWorker, field: str, value: Any
) -> None:
    error = await refused(http, CHAT, {"messages": HI, field: value})
    assert (error["param"], error["code"]) == (field, "unsupported")
    assert field in error["message"]
    assert worker.calls == []


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "messages[0].content[0].type",
        ),
        ({"messages": HI, "temperature": "hot"}, "temperature"),
        ({"messages": HI, "temperature": "0.5"}, "temperature"),
        ({"messages": HI, "temperature": True}, "temperature"),
        ({"messages": HI, "max_tokens": -1}, "max_tokens"),
        ({"messages": HI, "max_tokens": 1.5}, "max_tokens"),
        ({"messages": HI, "max_tokens": 2**32}, "max_tokens"),
        ({"messages": HI, "seed": 2**63}, "seed"),
        ({"messages": HI, "stream": "yes"}, "stream"),
        ({"messages": HI, "stop": [1]}, "stop[0]"),
        ({"messages": HI, "stop": {"a": 1}}, "stop"),
        ({"messages": HI, "logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"messages": HI, "logit_bias": {"9999999999": 1}}, "logit_bias[9999999999]"),
        ({"messages": HI, "top_k": -2}, "top_k"),
        ({"messages": HI, "nonsense": 1}, "nonsense"),
        ({"messages": HI, "stream_options": {"nonsense": 1}}, "stream_options.nonsense"),
        ({"messages": HI, "top_logprobs": 2}, "top_logprobs"),
        ({"messages": HI, "stream_options": {}}, "stream_options"),
        ({"messages": HI, "stream_options": {}, "stream": False}, "stream_options"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "tool"}]}, "messages[0].content"),
        ({"messages": [{**HI[0], "tool_call_id": "1"}]}, "messages[0].tool_call_id"),
        ({"messages": [HI[0] | {"other": None}]}, "messages[0].other"),
        (
            {"messages": [{"role": "user", "content": "", "reasoning_content": "x"}]},
            "messages[0].reasoning_content",
        ),
        ({"messages": HI, "max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
    ],
)
async def test_bad_chat_fields_are_named(
    http: httpx.AsyncClient, worker: ScriptedWorker, body: dict[str, Any], param: str
) -> None:
    assert (await refused(http, CHAT, body))["param"] == param
    assert worker.calls == []


async def test_a_last_answer_is_continued_where_that_is_asked_for(
    http: httpx.AsyncClient, worker: ScriptedWorker
) -> None:
    body = {"messages": [*HI, {"role": "assistant", "content": "Hel"}]}

    async def continues(**fields: Any) -> Any:
        request = await sent(http, worker, CHAT, **body, **fields)
        return request["prompt"]["chat"].get("continue_final_message", False)

    assert await continues() is False
    assert await continues(add_generation_prompt=True, continue_final_message=False) is False
    assert await continues(continue_final_message=True) is True
    assert await continues(continue_final_message=True, add_generation_prompt=False) is True
    for fields in (
        {"add_generation_prompt": False},
        {"add_generation_prompt": True, "continue_final_message": True},
    ):
        error = await refused(http, CHAT, body | fields)
        assert error["param"] == "add_generation_prompt"


async def test_reasoning_effort_is_told_to_the_template(
    http: httpx.AsyncClient, worker: ScriptedWorker
) -> None:
    async def told(**fields: Any) -> Any:
        request = await sent(http, worker, CHAT, **fields)
        return request["prompt"]["chat"].get("template_arguments")

    high = {"enable_thinking": True, "reasoning_effort": "high"}
    assert await told(reasoning_effort="high") == high
    assert await told(reasoning_effort="none") == {
        "enable_thinking": False,
        "reasoning_effort": "none",
    }
    assert await told(reasoning_effort=None) is None
    own = {"enable_thinking": False}
    assert await told(reasoning_effort="high", chat_template_kwargs=own) == high | own
    error = await refused(http, CHAT, {"messages": HI, "reasoning_effort": "much"})
    assert error["param"] == "reasoning_effort"


async def test_chat_logprobs(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    request = await sent(http, worker, CHAT, logprobs=True)
    assert worker.calls == []
    assert request["output"] == {"logprobs": 0}
    request = await sent(http, worker, CHAT, logprobs=True, top_logprobs=4)
    assert request["output"] == {"logprobs": 4}
