"""What the engine computed before is not computed again, and nothing else is taken for it."""

from __future__ import annotations

import pytest

from inference_worker.engine.event import (
    Started,
)
from inference_worker.engine.request import OutputParams
from tests.worker.engine.engines import completion, footers, make_engine, make_request, run
from tests.worker.engine.hash_runner import HashRunner, reference_completion

pytestmark = pytest.mark.usefixtures("runs_ahead")


def test_prefix_cache_skips_what_is_known() -> None:
    runner = HashRunner(64, 4)
    engine = make_engine(runner)
    prompt = list(range(20))
    engine.add(make_request("first", prompt, 4))
    run(engine)
    before = runner.num_computed
    engine.add(make_request("second", [*prompt, 50, 51], 4))
    events = run(engine)["second"]
    started = events[0]
    assert isinstance(started, Started)
    assert started.cached_tokens == 20
    assert (
        runner.num_computed - before == 2 + 3
    )  # the rest of the prompt, then all but the last token
    footer = footers(events)[0]
    assert footer.usage is not None
    assert footer.usage.cached_tokens == 20
    assert completion(events) == reference_completion([*prompt, 50, 51], 4)


def test_a_fully_cached_prompt_still_computes_a_token() -> None:
    engine = make_engine(HashRunner(64, 4))
    for request_id in ("first", "second"):
        engine.add(make_request(request_id, list(range(8)), 4))
        events = run(engine)[request_id]
        assert completion(events) == reference_completion(list(range(8)), 4)
    assert isinstance(events[0], Started)
    assert events[0].cached_tokens == 4


def test_equal_blocks_after_different_beginnings_are_not_shared() -> None:
    engine = make_engine(HashRunner(64, 4))
    for request_id, beginning in (("a", 1), ("b", 2)):
        prompt = [beginning] * 4 + [7] * 8
        engine.add(make_request(request_id, prompt, 6))
        events = run(engine)[request_id]
        assert completion(events) == reference_completion(prompt, 6)
        assert isinstance(events[0], Started)
        assert events[0].cached_tokens == 0


def test_waiting_for_memory_forgets_no_prefix() -> None:
    engine = make_engine(HashRunner(16, 4))
    engine.add(make_request("known", list(range(24)), 1))
    run(engine)
    engine.add(make_request("running", [90] * 20, 12))
    engine.step()
    engine.add(make_request("waiting", [91] * 44, 1))
    for _ in range(5):
        engine.step()
        assert (engine.load().running, engine.load().waiting) == (1, 1)
    engine.take_events()
    engine.add(make_request("again", list(range(24)), 1))
    ((_, started),) = engine.take_events()
    assert isinstance(started, Started)
    assert started.cached_tokens == 20


def test_choices_with_a_scored_prompt_share_it_too() -> None:
    runner = HashRunner(64, 4)
    engine = make_engine(runner)
    scored = OutputParams(logprobs=0, echo=True, prompt_logprobs=True)
    prompt = list(range(13))
    engine.add(make_request("a", prompt, 1, n=3, output=scored))
    events = run(engine)["a"]
    assert runner.num_computed == 13 + 2 * 1
    for choice_index in range(3):
        assert completion(events, choice_index) == reference_completion(
            prompt, 1, choice_index=choice_index
        )


def test_without_prefix_cache_requests_share_nothing_but_choices_do() -> None:
    runner = HashRunner(64, 4)
    engine = make_engine(runner, prefix_cache=False)
    prompt = list(range(16))
    engine.add(make_request("first", prompt, 1))
    run(engine)
    engine.add(make_request("second", prompt, 1, n=3))
    before = runner.num_computed
    events = run(engine)["second"]
    assert isinstance(events[0], Started)
    assert events[0].cached_tokens == 0
    assert runner.num_computed - before == 16 + 2 * 4  # two siblings compute the last block alone
