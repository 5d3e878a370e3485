"""API keys from the edge to the worker: limits of a key are its own, and nobody ends another's request."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pytest

from edge.api_keys import ApiKey, digest_of, line_of
from tests.integration.stack import PATIENCE, Stack, running_stack

ALICE, BOB = "sluice_alices", "sluice_bobs"
KEYS = [ApiKey("alice", (digest_of(ALICE),), max_concurrent=1), ApiKey("bob", (digest_of(BOB),))]
ENDLESS = {"prompt": "Tell me a story", "max_tokens": 1000, "ignore_eos": True}


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack(
        {"text": "word ", "step_milliseconds": 20},
        {"api_keys": ";".join(map(line_of, KEYS))},
        "inference_worker.scripted_model",
    ) as stack:
        yield stack


@pytest.fixture
def http(stack: Stack) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=stack.url, timeout=PATIENCE, trust_env=False) as http:
        yield http
    stack.wait_idle()


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_a_key_has_limits_of_its_own_and_its_requests_are_its_own(http: httpx.Client) -> None:
    with http.stream("POST", "/v1/streams", json=ENDLESS, headers=bearer(ALICE)) as stream:
        assert stream.status_code == 200
        lines = stream.iter_lines()
        started = json.loads(next(line for line in lines if line.startswith("data: "))[6:])
        request_id = started["request_id"]
        short = {"prompt": "hi", "max_tokens": 1}
        refused = http.post("/v1/completions", json=short, headers=bearer(ALICE))
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        other = http.post("/v1/completions", json=short, headers=bearer(BOB))
        assert other.status_code == 200
        path = f"/v1/streams/{request_id}"
        assert http.delete(path, headers=bearer(BOB)).status_code == 404
        assert http.delete(path, headers=bearer(ALICE)).json()["outcome"] == "aborted"
        assert any('"cancelled"' in line for line in lines)
