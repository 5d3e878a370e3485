"""Overload is told truthfully, at once, and only to those whom it concerns."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from tests.integration.stack import PATIENCE, Stack, running_stack


@pytest.fixture(scope="module")
def small_stack() -> Iterator[Stack]:
    with running_stack({"max_running": 2, "max_waiting": 1}) as running:
        yield running


def test_beyond_slots_and_queue_it_is_429(small_stack: Stack) -> None:
    body = {
        "model": "default",
        "prompt": "Once",
        "max_tokens": 1000,
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
        client.completions.create(stream=True, max_tokens=1000, **options)  # type: ignore[call-overload]
        for _ in range(3)
    ]
    with pytest.raises(openai.RateLimitError) as caught:
        client.completions.create(max_tokens=1, **options)  # type: ignore[call-overload]
    assert caught.value.response.headers["retry-after"]
    for stream in streams:
        stream.close()
    assert patient.completions.create(max_tokens=1, **options).choices[0].text  # type: ignore[call-overload]
