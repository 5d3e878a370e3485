"""Whoever goes away, however: the sequence leaves the engine and its blocks are free."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator

import grpc
import httpx
import pytest

from protos.sluice.v1 import generation_pb2 as pb
from tests.integration.stack import PATIENCE, Stack, running_stack

LONG_PROMPT = "Tell me a story. " * 100
ENDLESS = 1200  # tokens: twelve seconds of them


@pytest.fixture(scope="module")
def narrow_stack() -> Iterator[Stack]:
    """One sequence at a time, and a prompt in many small steps: a queue, a prefill of a second, a decode of many."""
    flags = {"max_running": 1, "max_batch_tokens": 4, "max_waiting": 8, "prefix_cache": False}
    flags |= {"step_milliseconds": 10}
    with running_stack(flags, worker_module="inference_worker.scripted_model") as running:
        yield running


def body(prompt: str, max_tokens: int = ENDLESS) -> dict[str, object]:
    """A request that goes on until somebody stops it."""
    return {
        "prompt": prompt,
        "max_tokens": max_tokens,
        "stream": True,
        "ignore_eos": True,
        "model": "default",
    }


def connect(stack: Stack, request: dict[str, object]) -> socket.socket:
    payload = json.dumps(request).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: edge\r\ncontent-length: {len(payload)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", stack.edge_port), timeout=PATIENCE)
    connection.sendall(head.encode() + payload)
    return connection


def is_decoding(load: pb.GetLoadResponse, before: pb.GetLoadResponse) -> bool:
    return load.generated_tokens > before.generated_tokens + 2


def is_prefilling(load: pb.GetLoadResponse, before: pb.GetLoadResponse) -> bool:
    is_begun = load.steps > before.steps + 2
    return load.running == 1 and is_begun and load.generated_tokens == before.generated_tokens


def close(connection: socket.socket) -> None:
    connection.close()


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    connection.close()


def half_close(connection: socket.socket) -> None:
    connection.shutdown(socket.SHUT_WR)


def pipeline_and_close(connection: socket.socket) -> None:
    connection.sendall(b"GET /health HTTP/1.1\r\nhost: edge\r\n\r\n")
    connection.close()


@pytest.mark.parametrize("leave", [close, reset, half_close, pipeline_and_close])
@pytest.mark.parametrize("phase", ["queue", "prefill", "decode"])
def test_http_client_leaves(
    narrow_stack: Stack, phase: str, leave: Callable[[socket.socket], None]
) -> None:
    before = narrow_stack.load()
    first = connect(narrow_stack, body(LONG_PROMPT if phase == "prefill" else "Once"))
    if phase == "prefill":
        narrow_stack.wait_load(lambda load: is_prefilling(load, before))
    else:
        narrow_stack.wait_load(lambda load: is_decoding(load, before))
    if phase == "queue":
        queued = connect(narrow_stack, body("Twice"))
        narrow_stack.wait_load(lambda load: load.waiting == 1)
        leave(queued)
        load = narrow_stack.wait_load(lambda load: load.waiting == 0)
        assert load.running == 1  # the other one is not disturbed
        queued.close()
    leave(first)
    narrow_stack.wait_idle()
    assert narrow_stack.load().generated_tokens - before.generated_tokens < ENDLESS
    first.close()


def test_a_killed_grpc_client_leaves_nothing(narrow_stack: Stack) -> None:
    program = f"""
import grpc
from protos.sluice.v1 import generation_pb2 as pb
from protos.sluice.v1.generation_pb2_grpc import GenerationServiceStub
stub = GenerationServiceStub(grpc.insecure_channel({narrow_stack.worker_address!r}))
stopping = pb.Stopping(max_tokens=1200, ignore_eos=True)
for _ in stub.Generate(pb.GenerateRequest(prompt=pb.Prompt(text="Once"), stopping=stopping)):
    print("message", flush=True)
"""
    client = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert client.stdout is not None
    for _ in range(3):
        assert client.stdout.readline() == b"message\n"
    client.send_signal(signal.SIGKILL)
    client.wait()
    narrow_stack.wait_idle()


def test_a_deadline_ends_the_generation(narrow_stack: Stack) -> None:
    stopping = pb.Stopping(max_tokens=1200, ignore_eos=True)
    request = pb.GenerateRequest(prompt=pb.Prompt(text="Once"), stopping=stopping)
    try:
        messages = list(narrow_stack.stub.Generate(request, timeout=0.3))
    except grpc.RpcError as error:  # the worker ends it a little before that, if it is not busy
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED  # noqa: PT017
    else:
        assert messages[-1].finished.finish_reason == pb.FINISH_REASON_DEADLINE
    narrow_stack.wait_idle()


def test_abort_from_another_connection(narrow_stack: Stack) -> None:
    request = {"prompt": "Once", "max_tokens": 1200, "ignore_eos": True}
    with httpx.stream(
        "POST", f"{narrow_stack.url}/v1/streams", json=request, timeout=PATIENCE
    ) as response:
        lines = response.iter_lines()
        started = next(line for line in lines if line.startswith("data:"))
        request_id = json.loads(started.removeprefix("data: "))["request_id"]
        url = f"{narrow_stack.url}/v1/streams/{request_id}"
        assert httpx.delete(url).status_code == 200
        finished = [line for line in lines if line.startswith("data:")][-1]
    assert json.loads(finished.removeprefix("data: "))["finish_reason"] == "cancelled"
    narrow_stack.wait_idle()
    assert httpx.delete(url).status_code == 200  # again: it says that it had ended
    outcome = narrow_stack.stub.Abort(pb.AbortRequest(request_id=request_id)).outcome
    assert outcome == pb.ABORT_OUTCOME_ALREADY_FINISHED
