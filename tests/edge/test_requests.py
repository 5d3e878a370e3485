"""What bodies become in the contract's words."""

from typing import Any

import httpx
import pytest
from google.protobuf import json_format

from tests.edge.scripted_worker import ScriptedWorker
from tests.edge.sent_requests import CHAT, COMPLETIONS, EVERYWHERE, HI, INPUT, OPENAI, refused, sent


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


async def test_echo_and_its_other_name(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    body = {"prompt": "x", "echo": False, "return_full_text": True}
    assert (await refused(http, COMPLETIONS, body))["param"] == "echo"
    request = await sent(http, worker, COMPLETIONS, echo=True, return_full_text=True)
    assert request["output"] == {"echo": True}


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


async def test_request_ids_for_the_worker_are_the_edges_own(
    http: httpx.AsyncClient, worker: ScriptedWorker
) -> None:
    for _ in range(2):
        await http.post(CHAT, json=INPUT[CHAT], headers={"x-request-id": "same"})
    ids = [call.request.request_id for call in worker.calls]
    assert len(set(ids)) == 2
    assert all(request_id.startswith("chatcmpl-") for request_id in ids)
