"""An internal service that has the contract's one file, and generates its own stubs from it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clients.contract import COUNT, COUNTED, ENDLESS, occupied
from tests.clients.foreign_process import ForeignError, ForeignProcess, running
from tests.integration.stack import PATIENCE, ROOT, Stack

CONTRACT = "protos/sluice/v1/generation.proto"
QUESTION = {
    "prompt": {"chat": {"messages": [{"role": "user", "content": COUNT}]}},
    "sampling": {"temperature": 0},
}
LONG = {**QUESTION, "stopping": {"max_tokens": ENDLESS}}


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the stubs of a copy of the contract."""
    folder = tmp_path_factory.mktemp("service")
    (folder / CONTRACT).parent.mkdir(parents=True)
    shutil.copy(ROOT / CONTRACT, folder / CONTRACT)
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I."]
    subprocess.run(
        [*command, "--python_out=.", "--grpc_python_out=.", CONTRACT], cwd=folder, check=True
    )
    return folder


def client(stubs: Path, stack: Stack) -> Any:
    """The service, isolated (-I): neither this folder nor PYTHONPATH is where it imports from."""
    script = Path(__file__).with_name("grpc_client.py")
    return running([sys.executable, "-I", script, stubs, stack.worker_address])


@pytest.fixture(scope="module")
def service(stubs: Path, stack: Stack) -> Iterator[ForeignProcess]:
    with client(stubs, stack) as process:
        yield process


@pytest.fixture(scope="module")
def slow_service(stubs: Path, slow_stack: Stack) -> Iterator[ForeignProcess]:
    with client(stubs, slow_stack) as process:
        yield process


def text_of(messages: list[dict[str, Any]]) -> str:
    return "".join(message.get("delta", {}).get("text", "") for message in messages)


def test_a_generation_is_streamed(service: ForeignProcess, stubs: Path) -> None:
    assert Path(service.call("where")).is_relative_to(stubs)
    messages = service.call("stream", request=QUESTION, timeout=PATIENCE)
    assert "started" in messages[0]
    assert text_of(messages) == COUNTED
    finished = messages[-1]["finished"]
    assert finished["finish_reason"] == "FINISH_REASON_STOP"
    assert finished["usage"]["completion_tokens"] > 0
    assert [int(message.get("sequence_number", 0)) for message in messages] == [
        *range(len(messages))
    ]


def test_a_bad_field_is_named(service: ForeignProcess) -> None:
    bad = {**QUESTION, "sampling": {"temperature": 200}}
    with pytest.raises(ForeignError) as caught:
        service.call("stream", request=bad, timeout=PATIENCE)
    assert caught.value.name == "INVALID_ARGUMENT"
    (violation,) = caught.value.fields["google.rpc.BadRequest"]["fieldViolations"]
    assert violation["field"] == "sampling.temperature"


def test_a_deadline_ends_the_generation(slow_service: ForeignProcess, slow_stack: Stack) -> None:
    before = slow_stack.load().generated_tokens
    # it has begun by then, and ends a little before the deadline with what it has
    messages = slow_service.call("stream", request=LONG, timeout=5)
    assert text_of(messages)
    assert messages[-1]["finished"]["finish_reason"] == "FINISH_REASON_DEADLINE"
    slow_stack.wait_idle()
    assert slow_stack.load().generated_tokens - before < ENDLESS, "it ended by itself"


def test_a_cancel_frees_the_sequence(slow_service: ForeignProcess, slow_stack: Stack) -> None:
    before = slow_stack.load().generated_tokens
    left = slow_service.call("leave", request=LONG)
    assert left["text"]
    assert left["code"] == "CANCELLED"
    slow_stack.wait_idle()
    assert slow_stack.load().generated_tokens - before < ENDLESS, "it ended by itself"


def test_overload_says_why_and_when_to_come_back(
    slow_service: ForeignProcess, slow_stack: Stack
) -> None:
    with occupied(slow_stack), pytest.raises(ForeignError) as caught:
        slow_service.call("stream", request=QUESTION, timeout=PATIENCE)
    assert caught.value.name == "RESOURCE_EXHAUSTED"
    assert caught.value.fields["google.rpc.ErrorInfo"]["reason"] == "QUEUE_FULL"
    delay = caught.value.fields["google.rpc.RetryInfo"]["retryDelay"]
    assert 1 <= float(delay.removesuffix("s")) <= 5


def test_buf_curl_streams_with_the_contract_alone(stubs: Path, stack: Stack) -> None:
    buf = Path(sys.executable).with_name("buf")
    result = subprocess.run(
        [
            *(buf, "curl", "--http2-prior-knowledge", "--protocol", "grpc"),
            *("--schema", stubs, "-d", json.dumps(QUESTION)),
            f"http://{stack.worker_address}/sluice.v1.GenerationService/Generate",
        ],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert result.returncode == 0, result.stderr
    decoder, rest, messages = json.JSONDecoder(), result.stdout.strip(), []
    while rest:
        message, end = decoder.raw_decode(rest)
        messages.append(message)
        rest = rest[end:].lstrip()
    assert "started" in messages[0]
    assert text_of(messages) == COUNTED
