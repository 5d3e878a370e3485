"""What is refused of a body, by the name that its dialect has for it."""

import gzip
import json
from typing import Any

import grpc
import httpx
import pytest

from tests.edge.scripted_worker import ScriptedWorker, bad_field, failing
from tests.edge.sent_requests import CHAT, COMPLETIONS, EVERYWHERE, INPUT, STREAMS, refused


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


@EVERYWHERE
@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'"x"', b"null", b"\xff", b'{"model":"\\ud800"}', b'{"temperature":NaN}'],
)
async def test_what_is_no_json_object_is_a_400(
    http: httpx.AsyncClient, path: str, body: bytes
) -> None:
    assert (await refused(http, path, body))["message"]


@pytest.mark.parametrize(
    "prompt", [None, [], [[]], [[], [1]], ["a", 1], [1.5], [-1], {"a": 1}, ["x"] * 5]
)
async def test_bad_completion_prompts(http: httpx.AsyncClient, prompt: Any) -> None:
    assert (await refused(http, COMPLETIONS, {"prompt": prompt}))["param"].startswith("prompt")


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
