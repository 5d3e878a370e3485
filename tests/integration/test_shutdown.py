"""Stopping either process under load: running streams end as they should, exit codes are 0."""

from __future__ import annotations

import contextlib
import json
import signal

import httpx
import pytest

from tests.integration.stack import PATIENCE, Stack, running_stack

SLOW = {"step_milliseconds": 10}
SCRIPTED = "inference_worker.scripted_model"


def start_stream(stack: Stack, client: httpx.Client, max_tokens: int) -> httpx.Response:
    body = {"prompt": "go", "max_tokens": max_tokens, "stream": True, "model": "default"}
    request = client.build_request("POST", f"{stack.url}/v1/completions", json=body)
    response = client.send(request, stream=True)
    assert response.status_code == 200
    return response


def read_to_failure(response: httpx.Response) -> dict[str, str]:
    """The error of a stream that failed: its last event, before a connection that is not closed properly."""
    lines = []
    with contextlib.suppress(httpx.RemoteProtocolError):
        for line in response.iter_lines():
            lines.append(line)  # noqa: PERF402 - what came before the failure counts
    *_, last = [line for line in lines if line]
    error: dict[str, str] = json.loads(last.removeprefix("data: "))["error"]
    return error


@pytest.mark.parametrize("name", ["worker", "edge"])
def test_sigterm_lets_a_running_stream_finish_and_refuses_new_work(name: str) -> None:
    with (
        running_stack(SLOW, worker_module=SCRIPTED) as stack,
        httpx.Client(timeout=PATIENCE) as client,
    ):
        response = start_stream(stack, client, 200)
        process = stack.worker if name == "worker" else stack.edge
        process.process.send_signal(signal.SIGTERM)
        process.wait_for_line(event="draining" if name == "worker" else "edge stopping")
        if name == "worker":
            body = {"prompt": "go", "max_tokens": 1, "model": "default"}
            refused = httpx.post(f"{stack.url}/v1/completions", json=body, timeout=PATIENCE)
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) >= 1
        text = response.read().decode()
        assert text.endswith("data: [DONE]\n\n")
        assert '"finish_reason":"length"' in text
        assert process.process.wait(timeout=PATIENCE) == 0


@pytest.mark.parametrize("name", ["worker", "edge"])
def test_what_outlasts_the_drain_ends_with_an_error_that_clients_can_tell(name: str) -> None:
    drain = {"drain_seconds": 0.3}
    with (
        running_stack({**SLOW, **drain}, drain, worker_module=SCRIPTED) as stack,
        httpx.Client(timeout=PATIENCE) as client,
    ):
        response = start_stream(stack, client, 3000)
        process = stack.worker if name == "worker" else stack.edge
        assert process.stop() == 0
        assert read_to_failure(response)["type"] == "unavailable"


def test_a_second_signal_ends_the_worker_at_once() -> None:
    with (
        running_stack(SLOW, worker_module=SCRIPTED) as stack,
        httpx.Client(timeout=PATIENCE) as client,
    ):
        response = start_stream(stack, client, 3000)
        stack.worker.process.send_signal(signal.SIGINT)
        stack.worker.wait_for_line(event="draining")
        assert stack.worker.stop(signal.SIGINT) == 128 + signal.SIGINT
        assert read_to_failure(response)["type"] == "unavailable"
        response.close()
        stack.edge.stop()
        stack.worker.process.returncode = 0  # seen and meant; the stack's own check is for the rest
