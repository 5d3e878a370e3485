"""The OpenAI SDK in front of the gateway of the vLLM world, which drives our worker."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import openai
import pytest

from inference_worker.default_model import CHECKPOINT
from protos.sluice.v1 import generation_pb2 as pb
from protos.sluice.v1.generation_pb2_grpc import GenerationServiceStub
from tests.free_port import free_port
from tests.gateway_packages import gateway_variables, needs_gateway
from tests.integration.stack import PATIENCE, ROOT, LoggedProcess

pytestmark = needs_gateway

QUESTION = "Count to 10"
ANSWER = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10"

# A client in a process of its own, to be killed: a line for each piece.
CLIENT = """
import sys, openai
client = openai.OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0)
messages = [{"role": "user", "content": "Hi"}]
for chunk in client.chat.completions.create(model="slow", messages=messages, stream=True):
    if text := chunk.choices[0].delta.content:
        print(text, flush=True)
"""


@dataclass
class Gateway:
    """A worker, the gateway before it, and a client of the gateway."""

    worker: LoggedProcess
    stub: GenerationServiceStub
    url: str

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=PATIENCE)

    def wait_idle(self) -> None:
        def is_idle() -> bool:
            load = self.stub.GetLoad(pb.GetLoadRequest(), timeout=PATIENCE)
            is_empty = not (load.requests or load.running or load.waiting)
            return is_empty and load.free_blocks == load.total_blocks

        wait_until(is_idle)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextmanager
def running_gateway(log: Path, module: str, **flags: object) -> Iterator[Gateway]:
    variables = gateway_variables()
    fixed = {"port": 0, "threads": 1, "vllm_engine": True}
    worker = LoggedProcess(module, fixed | flags, variables=variables)
    gateway = None
    try:
        address = worker.wait_for_line(event="ready")["address"]
        port, metrics_port = free_port(), free_port()  # it takes none by itself and tells none
        with log.open("wb") as output:
            gateway = subprocess.Popen(
                [
                    *(sys.executable, "-m", "smg", "launch"),
                    *("--host", "127.0.0.1", "--port", str(port)),
                    *("--prometheus-port", str(metrics_port)),
                    *("--worker-urls", f"grpc://{address}"),
                ],
                cwd=log.parent,
                env=variables,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        with grpc.insecure_channel(address) as channel:
            stub = GenerationServiceStub(channel)
            running = Gateway(worker, stub, f"http://127.0.0.1:{port}/v1")
            name = stub.GetModel(pb.GetModelRequest(), timeout=PATIENCE).model

            def is_ready() -> bool:
                assert gateway.poll() is None, log.read_text(errors="replace")[-2000:]
                try:
                    return name in {model.id for model in running.client.models.list()}
                except openai.APIError:
                    return False

            wait_until(is_ready)
            yield running
            running.wait_idle()
    finally:
        if gateway is not None:
            gateway.kill()
            gateway.wait()
        worker.stop(signal.SIGKILL)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """Before the embedded model."""
    log = tmp_path_factory.mktemp("gateway") / "log"
    with running_gateway(log, "inference_worker") as running:
        yield running


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """Before a worker with one place and no queue, whose answers take a minute.

    The gateway cannot see its files, and asks it for the tokenizer.
    """
    log = tmp_path_factory.mktemp("gateway") / "log"
    model = CHECKPOINT.relative_to(ROOT)
    flags = {"model": model, "model_name": "slow", "step_milliseconds": 20}
    places = {"max_running": 1, "max_waiting": 0}
    with running_gateway(log, "inference_worker.scripted_model", **flags, **places) as running:
        yield running


def test_a_chat_streams_and_is_the_same_unstreamed(gateway: Gateway) -> None:
    messages: list[openai.types.chat.ChatCompletionMessageParam] = [
        {"role": "user", "content": QUESTION}
    ]
    chat = gateway.client.chat.completions
    whole = chat.create(model="sluice-tiny", messages=messages, temperature=0)
    assert whole.choices[0].message.content == ANSWER
    assert whole.choices[0].finish_reason == "stop"

    stream = chat.create(
        model="sluice-tiny",
        messages=messages,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, reasons, usage = "", [], None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert (text, reasons) == (ANSWER, ["stop"])
    assert usage is not None
    assert whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert usage.prompt_tokens == whole.usage.prompt_tokens

    # what the gateway makes of the tokens is what the worker itself says
    ours = gateway.stub.Generate(
        pb.GenerateRequest(
            prompt=pb.Prompt(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content=QUESTION)]))
        ),
        timeout=PATIENCE,
    )
    footer = list(ours)[-1].finished
    assert footer.usage.completion_tokens == usage.completion_tokens
    assert footer.usage.prompt_tokens == usage.prompt_tokens


@pytest.mark.parametrize("stop", [" 6,", ", 7", "9, 1"])
def test_a_stop_sequence_cuts_the_same_text_streamed_and_not(gateway: Gateway, stop: str) -> None:
    messages: list[openai.types.chat.ChatCompletionMessageParam] = [
        {"role": "user", "content": QUESTION}
    ]
    chat = gateway.client.chat.completions
    whole = chat.create(model="sluice-tiny", messages=messages, temperature=0, stop=[stop])
    assert whole.choices[0].message.content == ANSWER[: ANSWER.index(stop)]
    stream = chat.create(
        model="sluice-tiny", messages=messages, temperature=0, stop=[stop], stream=True
    )
    pieces = [choice.delta.content or "" for chunk in stream for choice in chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content


def test_a_schema_and_a_required_call_are_kept_to(gateway: Gateway) -> None:
    chat = gateway.client.chat.completions
    weather: dict[str, object] = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
    }
    answer = chat.create(
        model="sluice-tiny",
        messages=[{"role": "user", "content": "What is the weather in Paris?"}],
        tools=[{"type": "function", "function": {"name": "get_weather", "parameters": weather}}],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        temperature=0,
        max_completion_tokens=200,
    )
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "get_weather"

    yes_or_no = chat.create(
        model="sluice-tiny",
        messages=[{"role": "user", "content": QUESTION}],
        extra_body={"regex": "(yes|no)"},
    )
    assert yes_or_no.choices[0].message.content in ("yes", "no")


def test_a_bad_request_is_told_with_the_name_of_the_field(gateway: Gateway) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        gateway.client.completions.create(
            model="sluice-tiny", prompt="Hi", max_tokens=4, extra_body={"min_tokens": 2}
        )
    assert "sampling_params.min_tokens" in str(caught.value)


def test_killing_the_client_frees_the_sequence(slow: Gateway) -> None:
    client = subprocess.Popen([sys.executable, "-c", CLIENT, slow.url], stdout=subprocess.PIPE)
    assert client.stdout is not None
    assert client.stdout.readline().strip()  # it streams
    with pytest.raises(openai.RateLimitError):  # and holds the only place
        slow.client.chat.completions.create(
            model="slow", messages=[{"role": "user", "content": "Me too"}]
        )
    client.kill()
    client.wait()
    client.stdout.close()
    slow.wait_idle()
    line = slow.worker.wait_for_line(event="request", phase="finished")
    assert line["finish_reasons"] == ["CANCELLED"]
