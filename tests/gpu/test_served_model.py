"""The embedded model on a GPU says what it says on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from inference_worker.engine.engine import Engine, EngineOptions
from inference_worker.engine.event import Delta, Failed
from inference_worker.engine.request import Request, SamplingParams, StoppingParams
from inference_worker.model.loader import load_model
from inference_worker.settings import WorkerSettings

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
