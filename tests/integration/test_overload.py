"""Overload is told truthfully, at once, and only to those whom it concerns."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import openai
import pytest

from tests.integration.stack import PATIENCE, Stack, running_stack


@pytest.fixture(scope="module")
def small_stack() -> Iterator[Stack]:
    """Two slots and a queue of one; 200 tokens a second, so that who is in is still in when the others come."""
    flags = {"max_running": 2, "max_waiting": 1, "step_milliseconds": 5}
    with running_stack(flags, worker_module="inference_worker.scripted_model") as running:
        yield running


def test_beyond_slots_and_queue_it_is_429(small_stack: Stack) -> None:
    body = {
        "model": "default",
        "prompt": "Once",
        "max_tokens": 400,
        "ignore_eos": True,
        "stream": True,
    }

    def request(_: int) -> httpx.Response:
        return httpx.post(f"{small_stack.url}/v1/completions", json=body, timeout=PATIENCE)

    with ThreadPoolExecutor(12) as pool:
        responses = list(pool.map(request, range(12)))
    accepted = [response for response in responses if response.status_code == 200]
    refused = [response for response in responses if response.status_code != 200]
    assert len(accepted) >= 3
    assert refused
    for response in accepted:
        assert response.text.endswith("data: [DONE]\n\n")
        assert "error" not in response.text
    for response in refused:
        assert response.status_code == 429
        assert 1 <= int(response.headers["retry-after"]) <= 5
        assert response.json()["error"]["type"] == "overloaded"
    small_stack.wait_idle()


def test_the_openai_client_raises_its_own_class_and_then_succeeds(small_stack: Stack) -> None:
    client = openai.OpenAI(base_url=f"{small_stack.url}/v1", api_key="none", max_retries=0)
    patient = client.with_options(max_retries=5)
    options = {"model": "default", "prompt": "Once", "extra_body": {"ignore_eos": True}}
    streams = [
        client.completions.create(stream=True, max_tokens=4000, **options)  # type: ignore[call-overload]
        for _ in range(3)
    ]
    with pytest.raises(openai.RateLimitError) as caught:
        client.completions.create(max_tokens=1, **options)  # type: ignore[call-overload]
    assert caught.value.response.headers["retry-after"]
    for stream in streams:
        stream.close()
    assert patient.completions.create(max_tokens=1, **options).choices[0].text  # type: ignore[call-overload]


def test_each_reason_reaches_a_client_with_its_status() -> None:
    """Real processes, a step of 20 ms, one slot and room for two to wait."""
    worker = {
        "step_milliseconds": 20,
        "max_running": 1,
        "max_waiting": 2,
        "max_waiting_tokens": 100,
    }
    hashes = {
        name: hashlib.sha256(f"{name}-key".encode()).hexdigest()
        for name in ("limited", "other", "third")
    }
    keys = "; ".join(f"{name}: sha256:{digest}" for name, digest in hashes.items())
    keys = keys.replace(hashes["limited"], f"{hashes['limited']} max_concurrent=1")
    module = "inference_worker.scripted_model"
    with (
        running_stack(worker, {"api_keys": keys}, module) as stack,
        httpx.Client(base_url=stack.url, timeout=PATIENCE) as http,
        ExitStack() as streams,
    ):
        lines: list[Iterator[str]] = []

        def headers(key: str, **more: str) -> dict[str, str]:
            return {"authorization": f"Bearer {key}-key", **more}

        def begin(key: str, max_tokens: int = 3000) -> None:
            body = {"prompt": "Once", "max_tokens": max_tokens}
            stream = http.stream("POST", "/v1/streams", json=body, headers=headers(key))
            response = streams.enter_context(stream)
            assert response.status_code == 200
            lines.append(response.iter_lines())  # whose end would be the stream's
            next(lines[-1])

        def refusal(key: str, prompt: str = "Once", **more: str) -> httpx.Response:
            body = {"prompt": prompt, "max_tokens": 4}
            return http.post("/v1/completions", json=body, headers=headers(key, **more))

        begin("limited")
        limited = refusal("limited")
        begin("other")  # waits
        too_large = refusal("other", "one two three four five six seven eight nine ten " * 30)
        begin("third")
        full = refusal("other")
        messages = {
            "model": "default",
            "max_tokens": 4,
            "messages": [{"role": "user", "content": "hi"}],
        }
        anthropic = http.post("/v1/messages", json=messages, headers=headers("other"))
        codes = [answer.json()["error"]["code"] for answer in (limited, too_large, full, anthropic)]
        assert codes == ["key_limit", "token_budget", "queue_full", "queue_full"]
        assert [a.status_code for a in (limited, too_large, full, anthropic)] == [
            429,
            429,
            429,
            529,
        ]
        for answer in (limited, too_large, full, anthropic):
            assert 1 <= int(answer.headers["retry-after"]) <= 5


def test_a_deadline_from_http_ends_a_request_in_the_queue_and_in_decode() -> None:
    worker = {"step_milliseconds": 20, "max_running": 1}
    with (
        running_stack(worker, worker_module="inference_worker.scripted_model") as stack,
        httpx.Client(base_url=stack.url, timeout=PATIENCE) as http,
    ):
        body = {"prompt": "Once", "max_tokens": 3000, "timeout": 4}
        with http.stream("POST", "/v1/streams", json=body) as stream:
            lines = stream.iter_lines()
            assert any(line == "event: delta" for line in lines)
            late = http.post(
                "/v1/completions", json={"prompt": "hi"}, headers={"X-Request-Timeout": "0.3"}
            )
            assert (late.status_code, late.json()["error"]["type"]) == (504, "timeout")
            data = [line for line in lines if line.startswith("data:")]
        assert json.loads(data[-1].removeprefix("data:"))["finish_reason"] == "deadline"
