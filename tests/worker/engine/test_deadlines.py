"""A request ends at its deadline, wherever it is; one that waits never reaches the model."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from inference_worker.engine.choice_output import ChoiceOutput
from inference_worker.engine.continuation import Continuation, Delivered, continue_choice
from inference_worker.engine.deadlines import SPARE
from inference_worker.engine.event import Expired, Failed, FinishReason, Scheduled, Started
from inference_worker.engine.request import OutputParams
from inference_worker.engine.runner import Row
from tests.worker.engine.engines import (
    assert_idle,
    completion,
    footers,
    make_engine,
    make_request,
    new_detokenizer,
    run,
)
from tests.worker.engine.hash_runner import HashRunner, reference_completion

pytestmark = pytest.mark.usefixtures("runs_ahead")

FAR = 1e12  # seconds


class Clock:
    """What the engine takes for the time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def seen_by(runner: HashRunner) -> set[str]:
    """Ids of the requests that reach the model from now on."""
    seen: set[str] = set()
    before: Callable[[Row], None] = runner._before_row

    def note(row: Row) -> None:
        seen.add(row.sequence.request.request_id)
        before(row)

    runner._before_row = note
    return seen


def test_one_that_waits_at_its_deadline_never_reaches_the_model(clock: Clock) -> None:
    runner = HashRunner(32, 4)
    seen = seen_by(runner)
    engine = make_engine(runner, max_running=1)
    engine.add(make_request("running", [1, 2], 12))
    engine.add(replace(make_request("late", [3] * 9, n=2), deadline=10.0))
    engine.add(replace(make_request("patient", [4]), deadline=FAR))
    for _ in range(3):
        engine.step()
    clock.now = 10.0
    events = run(engine)
    assert seen == {"running", "patient"}
    started, failed = events["late"]
    assert isinstance(started, Started)
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, Expired)
    assert completion(events["running"]) == reference_completion([1, 2], 12)
    assert completion(events["patient"]) == reference_completion([4], 8)


def test_one_that_waits_with_tokens_of_another_engine_ends_with_them(clock: Clock) -> None:
    runner = HashRunner(32, 4)
    seen = seen_by(runner)
    engine = make_engine(runner, max_running=1)
    engine.add(make_request("running", [1, 2], 12))
    engine.step()
    output = ChoiceOutput(0, new_detokenizer(), ())
    brought = continue_choice(output, Delivered((5, 6), num_characters=6), [3] * 9, is_echoed=False)
    for name, continuation in (
        ("goes on", Continuation({0: brought}, {1: 3})),
        ("one is over", Continuation(finished={1: 3})),
    ):
        late = make_request(name, [3] * 9, n=2)
        engine.add(replace(late, continuation=continuation, deadline=10.0))
    clock.now = 10.0
    events = run(engine)
    assert seen == {"running"}
    for name, tokens in (("goes on", 2), ("one is over", 0)):
        (footer,) = footers(events[name])
        assert (footer.reason, footer.completion_tokens) == (FinishReason.DEADLINE, tokens)
        assert footer.usage is not None
        assert footer.usage.completion_tokens == tokens + 3


def test_a_deadline_that_has_passed_when_it_comes(clock: Clock) -> None:
    clock.now = 5.0
    runner = HashRunner(32, 4)
    seen = seen_by(runner)
    engine = make_engine(runner)
    engine.add(replace(make_request("late", [3]), deadline=5.0))
    events = run(engine)
    assert isinstance(events["late"][-1], Failed)
    assert not seen


def test_one_that_expires_in_prefill_has_nothing_to_end_with(clock: Clock) -> None:
    runner = HashRunner(32, 4)
    engine = make_engine(runner, max_batch_tokens=4)
    engine.add(replace(make_request("late", [3] * 40), deadline=10.0))
    for _ in range(4):
        engine.step()
    assert engine.load().running == 1
    computed = runner.num_computed
    clock.now = 10.0
    events = run(engine)
    assert [type(event) for event in events["late"]] == [Started, Scheduled, Failed]
    assert runner.num_computed <= computed + 4  # a step in flight, at most
    assert_idle(engine)


def test_one_that_expires_in_decode_ends_with_what_it_has(clock: Clock) -> None:
    engine = make_engine(HashRunner(64, 4))
    engine.add(replace(make_request("late", [3, 4], 50, n=2), deadline=10.0))
    engine.add(make_request("other", [5], 30))
    for _ in range(8):
        engine.step()
    clock.now = 10.0
    events = run(engine)
    assert [footer.reason for footer in footers(events["late"])] == [FinishReason.DEADLINE] * 2
    usage = footers(events["late"])[-1].usage
    assert usage is not None
    tokens = [completion(events["late"], choice) for choice in (0, 1)]
    assert usage.completion_tokens == sum(map(len, tokens))
    for choice in (0, 1):
        assert 0 < len(tokens[choice]) < 50
        expected = reference_completion([3, 4], 50, 0, choice)
        assert tokens[choice] == expected[: len(tokens[choice])]
    assert completion(events["other"]) == reference_completion([5], 30)
    assert_idle(engine)


def test_a_preempted_one_ends_with_what_it_had(clock: Clock) -> None:
    engine = make_engine(HashRunner(8, 4))  # room for 32 tokens
    engine.add(make_request("older", [1] * 6, 26))
    engine.add(replace(make_request("late", [2] * 6, 26), deadline=10.0))
    while engine.load().preemptions == 0:
        engine.step()
    clock.now = 10.0
    events = run(engine)
    assert [footer.reason for footer in footers(events["late"])] == [FinishReason.DEADLINE]
    got = completion(events["late"])
    assert 0 < len(got) < 26
    assert got == reference_completion([2] * 6, 26)[: len(got)]
    assert completion(events["older"]) == reference_completion([1] * 6, 26)


def test_the_echo_alone_is_no_token(clock: Clock) -> None:
    engine = make_engine(HashRunner(32, 4), max_batch_tokens=4)
    output = OutputParams(echo=True)
    engine.add(replace(make_request("late", [3] * 12, output=output), deadline=10.0))
    engine.step()
    clock.now = 10.0
    assert isinstance(run(engine)["late"][-1], Failed)


def test_deadlines_of_those_who_ended_before_are_forgotten() -> None:
    engine = make_engine(HashRunner(32, 4))
    far = time.monotonic() + 3600
    for number in range(500):
        engine.add(replace(make_request(f"r{number}", [1], 1), deadline=far))
        run(engine)
    assert len(engine._deadlines) <= 2 + SPARE
