"""What bodies become in the contract's words, and what is refused."""

import gzip
import json
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf import json_format

from tests.edge.scripted_worker import ScriptedWorker, bad_field, failing

HI = [{"role": "user", "content": "hi"}]
CHAT, COMPLETIONS, STREAMS = "/v1/chat/completions", "/v1/completions", "/v1/streams"
INPUT: dict[str, dict[str, Any]] = {
    CHAT: {"messages": HI},
    COMPLETIONS: {"prompt": "hi"},
    STREAMS: {"prompt": "hi"},
}
EVERYWHERE = pytest.mark.parametrize("path", INPUT)
OPENAI = pytest.mark.parametrize("path", [CHAT, COMPLETIONS])


async def sent(
    http: httpx.AsyncClient, worker: ScriptedWorker, path: str, **fields: Any
) -> dict[str, Any]:
    """What the worker received, as JSON, without id and timeout."""
    response = await http.post(path, json=INPUT[path] | fields)
    assert response.status_code == 200, response.text
    request = json_format.MessageToDict(worker.call.request, preserving_proto_field_name=True)
    assert request.pop("request_id")
    assert request.pop("timeout")
    worker.calls.clear()
    return request


async def refused(http: httpx.AsyncClient, path: str, body: Any) -> dict[str, Any]:
    """The error of a 400."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = await http.post(path, content=content)
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error


@EVERYWHERE
async def test_what_is_left_out_stays_unset(
    http: httpx.AsyncClient, worker: ScriptedWorker, path: str
) -> None:
    request = await sent(http, worker, path)
    prompt: dict[str, Any] = {"text": "hi"}
    if path == CHAT:
        prompt = {"chat": {"messages": HI}}
    assert request == {"prompt": prompt, "sampling": {}, "stopping": {}, "output": {}}
    nulls = ("temperature", "top_k", "seed", "stop", "logprobs", "max_tokens", "n", "logit_bias")
    assert await sent(http, worker, path, **dict.fromkeys(nulls)) == request


@EVERYWHERE
async def test_every_sampling_and_stopping_field(
    http: httpx.AsyncClient, worker: ScriptedWorker, path: str
) -> None:
    request = await sent(
        http,
        worker,
        path,
        model="default",
        n=2,
        temperature=0.5,
        top_p=0.25,
        top_k=40,
        min_p=0.125,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=2,
        logit_bias={"7": -100, "8": 0.5},
        seed=-(2**63),
        max_tokens=5,
        stop=["a", "b"],
        stop_token_ids=[3],
        ignore_eos=True,
    )
    assert request["model"] == "default"
    assert request["n"] == 2
    assert request["sampling"] == {
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 40,
        "min_p": 0.125,
        "repetition_penalty": 1.5,
        "presence_penalty": -0.5,
        "frequency_penalty": 2.0,
        "logit_bias": {"7": -100.0, "8": 0.5},
        "seed": str(-(2**63)),
    }
    assert request["stopping"] == {
        "max_tokens": 5,
        "stop_sequences": ["a", "b"],
        "stop_token_ids": [3],
        "ignore_eos": True,
    }


@EVERYWHERE
@pytest.mark.parametrize("off", [0, -1])
async def test_top_k_0_and_minus_1_are_off(
    http: httpx.AsyncClient, worker: ScriptedWorker, path: str, off: int
) -> None:
    assert (await sent(http, worker, path, top_k=off))["sampling"] == {}


@EVERYWHERE
async def test_zero_is_sent_where_it_means_something(
    http: httpx.AsyncClient, worker: ScriptedWorker, path: str
) -> None:
    request = await sent(http, worker, path, temperature=0, max_tokens=0, seed=0, stop="x")
    assert request["sampling"] == {"temperature": 0.0, "seed": "0"}
    assert request["stopping"] == {"max_tokens": 0, "stop_sequences": ["x"]}


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


@OPENAI
async def test_fields_without_effect_are_accepted(
    http: httpx.AsyncClient, worker: ScriptedWorker, path: str
) -> None:
    plain = await sent(http, worker, path)
    fields: dict[str, Any] = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "skip_special_tokens": True,
        "min_tokens": 0,
    }
    if path == CHAT:
        fields |= {
            "parallel_tool_calls": True,
            "tools": [],
            "tool_choice": "none",
            "response_format": {"type": "text"},
            "modalities": ["text"],
            "audio": None,
            "logprobs": False,
        }
    else:
        fields |= {
            "suffix": "",
            "best_of": 1,
            "details": True,
            "watermark": False,
            "typical_p": 1.0,
        }
    assert await sent(http, worker, path, **fields) == plain


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
    ("field", "value"),
    [
        ("suffix", "x"),
        ("best_of", 3),
        ("typical_p", 0.5),
        ("truncate", 10),
        ("watermark", True),
        ("grammar", {"type": "regex", "value": "a"}),
        ("decoder_input_details", True),
    ],
)
async def test_unsupported_completions_features_are_named(
    http: httpx.AsyncClient, field: str, value: Any
) -> None:
    error = await refused(http, COMPLETIONS, {"prompt": "x", field: value})
    assert (error["param"], error["code"]) == (field, "unsupported")


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


@EVERYWHERE
@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'"x"', b"null", b"\xff", b'{"model":"\\ud800"}', b'{"temperature":NaN}'],
)
async def test_what_is_no_json_object_is_a_400(
    http: httpx.AsyncClient, path: str, body: bytes
) -> None:
    assert (await refused(http, path, body))["message"]


async def test_max_completion_tokens(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    request = await sent(http, worker, CHAT, max_completion_tokens=3)
    assert request["stopping"] == {"max_tokens": 3}
    assert await sent(http, worker, CHAT, max_completion_tokens=3, max_tokens=3) == request


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_priority_is_vllms_where_lower_goes_first(
    http: httpx.AsyncClient, worker: ScriptedWorker, path: str
) -> None:
    assert (await sent(http, worker, path, priority=-7))["priority"] == 7
    assert "priority" not in await sent(http, worker, path)
    error = await refused(http, path, INPUT[path] | {"priority": "high"})
    assert error["param"] == "priority"


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


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", [{"text": ""}]),
        ("a", [{"text": "a"}]),
        (["a", "b"], [{"text": "a"}, {"text": "b"}]),
        ([1, 2], [{"token_ids": {"ids": [1, 2]}}]),
        ([[1], [2, 3]], [{"token_ids": {"ids": [1]}}, {"token_ids": {"ids": [2, 3]}}]),
    ],
)
async def test_completion_prompts(
    http: httpx.AsyncClient, worker: ScriptedWorker, prompt: Any, expected: list[Any]
) -> None:
    response = await http.post(COMPLETIONS, json={"prompt": prompt})
    assert response.status_code == 200, response.text
    requests = sorted(
        (call.request for call in worker.calls), key=lambda request: request.request_id
    )
    assert [json_format.MessageToDict(r.prompt) for r in requests] == [
        json_format.MessageToDict(json_format.ParseDict(e, type(requests[0].prompt)()))
        for e in expected
    ]
    assert len({request.request_id for request in requests}) == len(expected)


@pytest.mark.parametrize(
    "prompt", [None, [], [[]], [[], [1]], ["a", 1], [1.5], [-1], {"a": 1}, ["x"] * 5]
)
async def test_bad_completion_prompts(http: httpx.AsyncClient, prompt: Any) -> None:
    assert (await refused(http, COMPLETIONS, {"prompt": prompt}))["param"].startswith("prompt")


async def test_echo_and_its_other_name(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    body = {"prompt": "x", "echo": False, "return_full_text": True}
    assert (await refused(http, COMPLETIONS, body))["param"] == "echo"
    request = await sent(http, worker, COMPLETIONS, echo=True, return_full_text=True)
    assert request["output"] == {"echo": True}


@EVERYWHERE
async def test_a_compressed_body_is_a_415(
    http: httpx.AsyncClient, worker: ScriptedWorker, path: str
) -> None:
    body = gzip.compress(json.dumps(INPUT[path]).encode())
    response = await http.post(path, content=body, headers={"content-encoding": "gzip"})
    assert response.status_code == 415
    assert "content-encoding" in response.json()["error"]["message"]
    assert worker.calls == []
    headers = {"content-encoding": "identity"}
    assert (await http.post(path, json=INPUT[path], headers=headers)).status_code == 200


async def test_tgi_parameters(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    request = await sent(
        http,
        worker,
        COMPLETIONS,
        max_new_tokens=9,
        return_full_text=True,
        stop_sequences=["x"],
        top_n_tokens=2,
        repetition_penalty=1.25,
        do_sample=True,
        seed=None,
        typical_p=None,
    )
    assert request["stopping"] == {"max_tokens": 9, "stop_sequences": ["x"]}
    assert request["output"] == {"echo": True, "logprobs": 2, "prompt_logprobs": True}
    assert request["sampling"] == {"repetition_penalty": 1.25}
    greedy = await sent(http, worker, COMPLETIONS, do_sample=False)
    assert greedy["sampling"] == {"temperature": 0.0}
    asked = await sent(http, worker, COMPLETIONS, do_sample=False, temperature=0.5)
    assert asked["sampling"] == {"temperature": 0.5}


@pytest.mark.parametrize(
    ("path", "fields", "field", "param"),
    [
        (CHAT, {"max_tokens": 1}, "stopping.max_tokens", "max_tokens"),
        (CHAT, {"max_completion_tokens": 1}, "stopping.max_tokens", "max_completion_tokens"),
        (CHAT, {}, "stopping.stop_sequences", "stop"),
        (CHAT, {}, "sampling.top_p", "top_p"),
        (CHAT, {}, "output.logprobs", "top_logprobs"),
        (CHAT, {}, "prompt.chat.continue_final_message", "continue_final_message"),
        (CHAT, {}, "prompt", "messages"),
        (CHAT, {}, "prompt.chat.messages[0].role", "messages[0].role"),
        (CHAT, {}, "n", "n"),
        (COMPLETIONS, {"max_new_tokens": 1}, "stopping.max_tokens", "max_new_tokens"),
        (COMPLETIONS, {"max_tokens": 1}, "stopping.max_tokens", "max_tokens"),
        (COMPLETIONS, {"stop_sequences": ["x"]}, "stopping.stop_sequences", "stop_sequences"),
        (COMPLETIONS, {"top_n_tokens": 9}, "output.logprobs", "top_n_tokens"),
        (COMPLETIONS, {}, "output.logprobs", "logprobs"),
        (COMPLETIONS, {}, "prompt.token_ids.ids[3]", "prompt[3]"),
        (STREAMS, {}, "stopping.max_tokens", "max_tokens"),
        (STREAMS, {}, "prompt.token_ids.ids", "token_ids"),
        (STREAMS, {}, "output.token_ids", "return_token_ids"),
        (STREAMS, {}, "sampling.logit_bias", "logit_bias"),
    ],
)
async def test_the_workers_field_names_become_the_dialects(
    http: httpx.AsyncClient,
    worker: ScriptedWorker,
    path: str,
    fields: dict[str, Any],
    field: str,
    param: str,
) -> None:
    worker.script = failing(grpc.StatusCode.INVALID_ARGUMENT, f"{field}: no", bad_field(field))
    error = await refused(http, path, INPUT[path] | fields)
    assert (error["param"], error["message"]) == (param, f"{param}: no")


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("prompt_logprobs needs output.echo", "prompt_logprobs needs return_full_text"),
        ("output.echo, which stands first.", "return_full_text, which stands first."),
        (
            "output.echo: 0 only with stopping.max_tokens.",
            "return_full_text: 0 only with max_tokens.",
        ),
        ("my.output.echo", "my.output.echo"),
    ],
)
async def test_names_anywhere_in_the_workers_words(
    http: httpx.AsyncClient, worker: ScriptedWorker, message: str, shown: str
) -> None:
    worker.script = failing(grpc.StatusCode.INVALID_ARGUMENT, message, bad_field("output.echo"))
    error = await refused(http, COMPLETIONS, {"prompt": "x", "return_full_text": True})
    assert (error["param"], error["message"]) == ("return_full_text", shown)


async def test_request_ids_for_the_worker_are_the_edges_own(
    http: httpx.AsyncClient, worker: ScriptedWorker
) -> None:
    for _ in range(2):
        await http.post(CHAT, json=INPUT[CHAT], headers={"x-request-id": "same"})
    ids = [call.request.request_id for call in worker.calls]
    assert len(set(ids)) == 2
    assert all(request_id.startswith("chatcmpl-") for request_id in ids)


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        ("/v1/completions", "best_of", True),
        ("/v1/completions", "min_tokens", False),
        ("/v1/completions", "skip_special_tokens", 1),
        ("/v1/responses", "background", 0),
        ("/v1/responses", "top_logprobs", False),
    ],
)
async def test_a_number_is_no_truth_and_no_truth_a_number(
    http: httpx.AsyncClient, worker: ScriptedWorker, path: str, field: str, value: object
) -> None:
    asked = "input" if path == "/v1/responses" else "prompt"
    answer = await http.post(path, json={asked: "x", field: value})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)
    assert worker.calls == []
