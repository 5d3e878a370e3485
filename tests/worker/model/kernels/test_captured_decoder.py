"""The whole CUDA path but for the recording of graphs: kernels over fixed input tensors, a step in flight.

With recorded graphs the same is in tests/gpu/test_running_ahead.py.
"""

from __future__ import annotations

from typing import Any, cast

import pytest
from transformers import PreTrainedModel

from inference_worker.engine.request import OutputParams
from inference_worker.model import kernel_decoder, loader, self_check
from inference_worker.model.decode_graphs import call_again
from inference_worker.model.forward import TransformersForward
from inference_worker.model.kernel_decoder import KernelDecoder
from tests.worker.model.driver import generate, new_runner
from tests.worker.model.kernels.device import DEVICE
from tests.worker.model.test_running_ahead import GREEDY, WatchedRunner, make_request, run
from tests.worker.model.tiny_models import build


def new_model() -> PreTrainedModel:
    model: Any = build("llama")
    return cast(PreTrainedModel, model.to(DEVICE))


def test_padded_rows_in_flight_change_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_can_use_kernels", lambda *_: True)
    monkeypatch.setattr(loader, "new_capture", lambda _: call_again)
    monkeypatch.setattr(loader, "ModelRunner", WatchedRunner)
    monkeypatch.setattr(self_check, "_LENGTH", 6)  # the interpreter takes its time
    model = new_model()
    requests = [make_request(name, GREEDY, OutputParams(), num_tokens=4) for name in ("", "a", "b")]
    expected = [generate(model, list(r.prompt), 4)[len(r.prompt) :] for r in requests]
    runner = new_runner(model)
    assert isinstance(runner, WatchedRunner)
    assert isinstance(runner._forward, KernelDecoder)
    assert "decode graphs of 1 to 8 rows" in runner.description
    tokens = run(runner, requests)  # three rows, of a size of four
    assert [[x.token_id for x in tokens[r.request_id, 0]] for r in requests] == expected
    assert runner.num_fed > 0


def test_layers_that_the_kernels_cannot_compute_are_left_to_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("its rotary embedding is of another kind")

    monkeypatch.setattr(loader, "_can_use_kernels", lambda *_: True)
    monkeypatch.setattr(kernel_decoder, "_angles", refuse)
    monkeypatch.setattr(self_check, "_LENGTH", 6)
    assert isinstance(new_runner(new_model())._forward, TransformersForward)
