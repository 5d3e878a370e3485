"""Random bytes at both ports, random messages at the worker: nobody falls over, and no log tells what was in them."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protos.sluice.v1 import generation_pb2 as pb
from tests.integration.stack import PATIENCE, Stack, running_stack

# For a longer campaign: SLUICE_FUZZ_EXAMPLES=5000 pytest tests/integration/test_fuzzing.py
EXAMPLES = int(os.environ.get("SLUICE_FUZZ_EXAMPLES", "150"))
SECRET = "zebra marmalade"  # stands in every prompt, and may stand in no log
fuzzed = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None
)

CHAT = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 4, "stream": True}
REQUESTS = [
    ("POST", "/v1/chat/completions", CHAT),
    ("POST", "/v1/completions", {"prompt": SECRET, "max_tokens": 2, "stop": ["a"], "n": 2}),
    ("POST", "/v1/messages", CHAT | {"model": "default"}),
    ("POST", "/v1/responses", {"input": SECRET, "max_output_tokens": 2}),
    ("POST", "/v1/streams", {"prompt": SECRET, "max_tokens": 2}),
    ("POST", "/generate", {"inputs": SECRET, "parameters": {"max_new_tokens": 2}}),
    ("POST", "/v2/models/default/generate", {"text_input": SECRET, "max_tokens": 2}),
    ("GET", "/v1/streams?prompt=zebra%20marmalade&max_tokens=2", None),
    ("DELETE", "/v1/streams/stream-1", None),
    ("GET", "/v1/models/default", None),
]
PIECES = [
    *(b"\r\n", b"\n", b"\x00", b"\xff\xfe", b"\x1b[31mred", b"%0d%0aevil: 1", b"\r\n\r\n", b"GET "),
    *(
        b"content-length: 99999999999999999999\r\n",
        b"content-length: -1\r\n",
        b"expect: 100-continue",
    ),
    *(
        b"transfer-encoding: chunked\r\n",
        b"upgrade: websocket\r\nconnection: upgrade\r\n",
        b"[" * 99,
    ),
    *(
        b"ffffffffffffffff\r\n",
        b"x-request-id: a\x1b]0;b\x07\r\n",
        b"last-event-id: x-1\r\n",
        b"{}",
    ),
    *(b"HTTP/0.9", b"HTTP/9.9", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01\x02\x00\x01"),
]


def request_bytes(method: str, path: str, body: Any) -> bytes:
    data = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nhost: a\r\ncontent-length: {len(data)}\r\n\r\n"
    return head.encode() + data


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A request that was fine, with a few places changed."""
    data = request_bytes(*draw(st.sampled_from(REQUESTS)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        cut = draw(st.integers(0, 12))
        piece = draw(st.sampled_from(PIECES) | st.binary(max_size=4))
        data = data[:at] + piece + data[at + cut :]
    return data


def exchange(port: int, data: bytes) -> bytes:
    """Sends all, reads to the end."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as client:
        with contextlib.suppress(ConnectionError, OSError):
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            while more := client.recv(65536):
                answer += more
    return answer


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack({}, {"read_timeout_seconds": 5}) as stack:
        yield stack
        for process in (stack.edge, stack.worker):
            logged = {json.dumps(line): line for line in process.lines}
            for word in (*SECRET.split(), "\\u001b"):
                assert [line for text, line in logged.items() if word in text] == []
            assert [line for line in process.lines if line["level"] == "error"] == []
            assert process.process.poll() is None
        with httpx.Client(base_url=stack.url, trust_env=False, timeout=PATIENCE) as http:
            answer = http.post("/v1/completions", json={"prompt": "one", "max_tokens": 1})
        assert answer.status_code == 200
        stack.wait_idle()


@fuzzed
@given(data=st.binary(max_size=300) | mutated())
def test_no_bytes_bring_the_edge_down(stack: Stack, data: bytes) -> None:
    answer = exchange(stack.edge_port, data)
    for line in answer.split(b"HTTP/1.1 ")[1:]:
        assert line[:3].isdigit()
        assert int(line[:3]) < 500, (data, answer)
    head = answer.partition(b"\r\n\r\n")[0]
    assert b"evil:" not in head
    assert b"\x1b" not in head


@fuzzed
@given(data=st.binary(max_size=300), begins=st.booleans())
def test_no_bytes_bring_the_worker_down(stack: Stack, data: bytes, begins: bool) -> None:
    preface = (
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00" if begins else b""
    )
    exchange(int(stack.worker_address.rpartition(":")[2]), preface + data)
    assert stack.stub.GetLoad(pb.GetLoadRequest(), timeout=PATIENCE).total_blocks > 0


NUMBERS = [0, 1, 2, 3, 5, 16, 100, 1000, 2**16, 2**31 - 1, 2**32 - 1]
WORDS = [
    *("", "a", SECRET, "user", "assistant", "\x1b[31m\n", "default", "{}", '{"type": "object"}'),
    *("<|im_end|>", "(a|b)+", 'start: "x"', "\U0010ffff", "x" * 300, "resume-1"),
]


def scalar(draw: st.DrawFn, field: Any) -> Any:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING:
            if field.type == FieldDescriptor.TYPE_BYTES:
                return draw(st.binary(max_size=8))
            return draw(st.sampled_from(WORDS) | st.text(max_size=6))
        case FieldDescriptor.CPPTYPE_BOOL:
            return draw(st.booleans())
        case FieldDescriptor.CPPTYPE_FLOAT | FieldDescriptor.CPPTYPE_DOUBLE:
            return draw(st.sampled_from([0.0, 0.5, 1.0, -1.0, 1e30, float("inf"), float("nan")]))
        case FieldDescriptor.CPPTYPE_INT32 | FieldDescriptor.CPPTYPE_INT64:
            return draw(st.sampled_from([-(2**31), -1, 0, 1, 7, 2**31 - 1]))
        case FieldDescriptor.CPPTYPE_ENUM:
            return draw(st.integers(0, 12))
    return draw(st.sampled_from(NUMBERS))


def fill(draw: st.DrawFn, message: Message, depth: int = 0) -> None:
    """Sets some fields of a message to something."""
    fields = message.DESCRIPTOR.fields
    chance = 3 if depth else 2
    for field in fields:
        if draw(st.integers(0, chance)):
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            if field.name == "logit_bias":
                message.logit_bias[draw(st.sampled_from(NUMBERS))] = 1.0  # type: ignore[attr-defined]
        elif hasattr(values := getattr(message, field.name), "extend"):
            for _ in range(draw(st.integers(0, 3))):
                if field.message_type is None:
                    values.append(scalar(draw, field))
                elif depth < 5:
                    fill(draw, values.add(), depth + 1)
        elif field.message_type is None:
            with contextlib.suppress(ValueError):  # an enum's value that there is not
                setattr(message, field.name, scalar(draw, field))
        elif depth < 5:
            getattr(message, field.name).SetInParent()
            fill(draw, getattr(message, field.name), depth + 1)


@st.composite
def requests(draw: st.DrawFn) -> pb.GenerateRequest:
    request = pb.GenerateRequest()
    fill(draw, request)
    if draw(st.booleans()):
        request.prompt.text = SECRET
    if draw(st.booleans()):
        request.ClearField("model")
        request.ClearField("request_id")
    if not request.stopping.HasField("max_tokens") or request.stopping.max_tokens > 16:
        request.stopping.max_tokens = 3
    return request


EXPECTED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.PERMISSION_DENIED,
}


@fuzzed
@given(request=requests(), unknown=st.booleans())
def test_no_message_is_more_than_the_worker_can_take(
    stack: Stack, request: pb.GenerateRequest, unknown: bool
) -> None:
    if unknown:
        request.MergeFromString(b"\xf8\x3f\x01")  # field 1023
    call = stack.stub.Generate(request, timeout=PATIENCE)
    with contextlib.suppress(grpc.RpcError):
        for _ in call:
            pass
    assert call.code() in EXPECTED, (call.code(), call.details())
