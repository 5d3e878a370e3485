"""The embedded model on a GPU says what it says on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from inference_worker.engine.engine import Engine, EngineOptions
from inference_worker.engine.event import Delta, Failed
from inference_worker.engine.request import Request, SamplingParams, StoppingParams
from inference_worker.model.loader import load_model
from inference_worker.settings import WorkerSettings
from protos.sluice.v1 import generation_pb2 as pb
from tests.integration.stack import running_stack

PINNED = json.loads((Path(__file__).parent.parent / "worker" / "pinned_answers.json").read_text())


@pytest.mark.parametrize("max_running", [1, 32])
def test_pinned_answers(max_running: int) -> None:
    settings = WorkerSettings(device="cuda", dtype="float32", max_running=max_running)
    served = load_model(settings)
    options = EngineOptions(max_running, settings.max_batch_tokens, served.info.context_length)
    engine = Engine(served.runner, served.tokenizer.new_detokenizer, options)
    expected = {}
    for number, pinned in enumerate(PINNED):
        prompt = served.tokenizer.encode_chat(pinned["messages"])
        stopping = StoppingParams(200, stop_token_ids=served.info.eos_token_ids)
        engine.add(Request(str(number), tuple(prompt), stopping, SamplingParams(temperature=0)))
        expected[str(number)] = pinned["answer"]
    texts = dict.fromkeys(expected, "")
    while engine.has_work:
        engine.step()
        for request, event in engine.take_events():
            assert not isinstance(event, Failed), event
            if isinstance(event, Delta):
                texts[request.request_id] += event.text
    assert texts == expected


def test_through_grpc_and_sse() -> None:
    """The model is loaded on one thread and run on another, whose current device and stream are its own."""
    with running_stack({"device": "cuda", "dtype": "float32", "kv_cache_mib": 256}) as stack:
        assert stack.stub.GetModel(pb.GetModelRequest()).device.startswith("cuda")
        for pinned in PINNED[:8]:
            chat = pb.Chat(messages=[pb.ChatMessage(**row) for row in pinned["messages"]])
            request = pb.GenerateRequest(prompt=pb.Prompt(chat=chat))
            answer = stack.stub.Generate(request)
            assert "".join(message.delta.text for message in answer) == pinned["answer"]
            body = {"model": "default", "stream": True, "messages": pinned["messages"]}
            streamed = httpx.post(f"{stack.url}/v1/chat/completions", json=body, timeout=60)
            events = [
                json.loads(line.removeprefix("data: "))
                for line in streamed.text.splitlines()
                if line.startswith("data: {")
            ]
            deltas = [choice["delta"] for event in events for choice in event["choices"]]
            assert "".join(delta.get("content") or "" for delta in deltas) == pinned["answer"]
        constrained = pb.GenerateRequest(
            prompt=pb.Prompt(text="A number: "), constraint=pb.Constraint(regex="[1-9][0-9]{2}")
        )
        number = "".join(message.delta.text for message in stack.stub.Generate(constrained))
        assert number.isdigit()
        assert len(number) == 3
