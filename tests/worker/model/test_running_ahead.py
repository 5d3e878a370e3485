"""The model with a step in flight while the host goes on: the same tokens as step by step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence as Rows

import pytest

from inference_worker.engine.detokenizer import ByteDetokenizer
from inference_worker.engine.engine import Engine, EngineOptions
from inference_worker.engine.event import Delta, Failed, Finished, Token
from inference_worker.engine.request import OutputParams, Request, SamplingParams, StoppingParams
from inference_worker.engine.runner import InFlight, Row
from inference_worker.model.runner import ModelRunner
from tests.worker.model.driver import new_runner, prompt_of
from tests.worker.model.tiny_models import build

NUM_TOKENS = 24
GREEDY = SamplingParams(temperature=0)
SCORED = OutputParams(logprobs=2, echo=True, prompt_logprobs=True)


def make_request(
    name: str,
    sampling: SamplingParams,
    output: OutputParams,
    n: int = 1,
    num_tokens: int = NUM_TOKENS,
) -> Request:
    prompt = prompt_of(5 + 7 * len(name))
    return Request(name, tuple(prompt), StoppingParams(num_tokens), sampling, output, n)


REQUESTS = {
    "greedy": [make_request("a", GREEDY, OutputParams()), make_request("bb", GREEDY, SCORED)],
    "mixed": [
        make_request("a", GREEDY, OutputParams()),
        make_request("bb", SamplingParams(seed=3), OutputParams(logprobs=0), n=3),
        make_request("ccc", SamplingParams(top_p=0.9, top_k=40, seed=4), OutputParams()),
        make_request("dddd", SamplingParams(top_p=0.5, logit_bias={7: 2.5}, seed=5), SCORED),
    ],
    "penalties": [
        make_request("a", SamplingParams(repetition_penalty=1.3, seed=1), OutputParams()),
        make_request("bb", SamplingParams(seed=2), OutputParams()),
    ],
}


class WatchedRunner(ModelRunner):
    """Counts the rows whose token the host did not know when they were launched."""

    num_fed = 0

    def launch(self, rows: Rows[Row]) -> InFlight:
        self.num_fed += sum(row.start == len(row.sequence.token_ids) for row in rows)
        return super().launch(rows)


def new_detokenizer(*, at_start: bool = False) -> ByteDetokenizer:
    return ByteDetokenizer([b"x"] * 199)


def run(runner: ModelRunner, requests: list[Request]) -> dict[tuple[str, int], list[Token]]:
    options = EngineOptions(max_running=4, max_batch_tokens=16, context_length=200)
    engine = Engine(runner, new_detokenizer, options)
    for request in requests:
        engine.add(request)
    tokens: dict[tuple[str, int], list[Token]] = defaultdict(list)
    while engine.has_work:
        engine.step()
        engine.check()
        for request, event in engine.take_events():
            assert not isinstance(event, Failed), event
            if isinstance(event, Delta):
                tokens[request.request_id, event.choice_index] += event.tokens
            elif isinstance(event, Finished):
                assert event.stop_token_id is None
    return tokens


@pytest.mark.parametrize("kind", REQUESTS)
def test_running_ahead_gives_the_same_tokens(kind: str) -> None:
    one_by_one = new_runner(build("llama"))
    ahead = WatchedRunner(one_by_one._forward, one_by_one.cache, runs_ahead=True)  # type: ignore[arg-type]
    expected = run(one_by_one, REQUESTS[kind])
    got = run(ahead, REQUESTS[kind])
    assert {k: [x.token_id for x in v] for k, v in got.items()} == {
        k: [x.token_id for x in v] for k, v in expected.items()
    }
    for key, tokens in got.items():
        for token, wanted in zip(tokens, expected[key], strict=True):
            assert token.logprob == pytest.approx(wanted.logprob, abs=1e-4)
            assert len(token.top) == len(wanted.top)
    assert (ahead.num_fed > 0) == (kind != "penalties")
