"""With a step in flight the host waits for nothing, and the tokens are those of one step after the other."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import pytest
import torch

from inference_worker.engine.request import OutputParams, SamplingParams
from inference_worker.engine.runner import InFlight, Row
from inference_worker.model.runner import ModelRunner
from tests.gpu.test_exactness import on_gpu
from tests.worker.model.driver import new_runner
from tests.worker.model.test_running_ahead import REQUESTS, make_request, run

SYNC_FREE = {
    "greedy": SamplingParams(temperature=0),
    "sampled": SamplingParams(seed=1),
    "truncated": SamplingParams(top_p=0.9, min_p=0.01, seed=2),
    "top k": SamplingParams(top_k=20, top_p=0.9, seed=3),
    "biased": SamplingParams(logit_bias={5: 1.0}, seed=4),
}


class WatchedRunner(ModelRunner):
    """Fails where launching a decode step waits for the device."""

    num_watched = 0

    def launch(self, rows: Rows[Row]) -> InFlight:
        if not all(row.num_tokens == 1 and row.start > 0 for row in rows):
            return super().launch(rows)
        self.num_watched += 1
        torch.cuda.set_sync_debug_mode("error")
        try:
            return super().launch(rows)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", REQUESTS)
def test_running_ahead_gives_the_same_tokens(kind: str) -> None:
    ahead = new_runner(on_gpu("llama"))
    assert ahead._forward is not None
    assert ahead.runs_ahead
    one_by_one = ModelRunner(ahead._forward, ahead.cache, runs_ahead=False)
    expected, got = run(one_by_one, REQUESTS[kind]), run(ahead, REQUESTS[kind])
    assert {k: [x.token_id for x in v] for k, v in got.items()} == {
        k: [x.token_id for x in v] for k, v in expected.items()
    }


@pytest.mark.parametrize("output", [OutputParams(), OutputParams(logprobs=3)], ids=["", "scored"])
@pytest.mark.parametrize("kind", SYNC_FREE)
@pytest.mark.parametrize("is_captured", [True, False], ids=["graphs", "eager"])
def test_launching_waits_for_nothing(kind: str, output: OutputParams, is_captured: bool) -> None:
    made = new_runner(on_gpu("llama"))
    assert made._forward is not None
    graphs = made._graphs if is_captured else None
    watched = WatchedRunner(made._forward, made.cache, graphs=graphs)
    tokens = run(watched, [make_request(name, SYNC_FREE[kind], output) for name in ("a", "bb")])
    assert watched.num_watched > 10
    assert all(len(of_choice) == 24 for of_choice in tokens.values())
