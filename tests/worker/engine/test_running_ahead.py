"""A step is launched before the one before it is read back, and whatever comes of that one, nothing is mixed up."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from inference_worker.engine.event import Failed, FinishReason, Started
from inference_worker.engine.runner import DeviceLost, InFlight, OutOfMemory, Row
from tests.worker.engine.engines import (
    assert_idle,
    completion,
    footers,
    make_engine,
    make_request,
    run,
)
from tests.worker.engine.hash_runner import HashRunner, reference_completion


class AheadRunner(HashRunner):
    runs_ahead = True


class BadLauncher(AheadRunner):
    """Fails at some launches, counted from 0."""

    def __init__(self, failing: set[int], error: Exception) -> None:
        super().__init__(64, 4)
        self._failing = failing
        self._error = error
        self._count = itertools.count()

    def launch(self, rows: Sequence[Row]) -> InFlight:
        if next(self._count) in self._failing:
            raise self._error
        return super().launch(rows)


def test_the_next_step_is_launched_before_this_one_is_read_back() -> None:
    runner = AheadRunner(64, 4)
    engine = make_engine(runner)
    engine.add(make_request("a", [1, 2, 3], 5))
    events = run(engine)["a"]
    assert runner.most_in_flight == 2
    assert completion(events) == reference_completion([1, 2, 3], 5)
    assert (
        runner.num_computed == 3 + 4
    )  # the last token is known to be the last: nothing is computed in vain


def test_a_step_computed_in_vain_is_dropped_and_never_shared() -> None:
    prompt = [1, 2]
    expected = reference_completion(prompt, 20)
    end = expected.index(expected[5])
    runner = AheadRunner(64, 4)
    engine = make_engine(runner)
    stop = frozenset({expected[5]})
    for request_id in ("first", "again"):
        engine.add(make_request(request_id, prompt, 20, stop_token_ids=stop))
        events = run(engine)[request_id]
        assert completion(events) == expected[:end]
        assert [footer.reason for footer in footers(events)] == [FinishReason.STOP]
    assert_idle(engine)
    # the stop token, computed in vain, completes a block; it is not in the cache for all that
    whole = [*prompt, *expected[: end + 1]]
    assert len(whole) % 4 == 0
    engine.add(make_request("longer", [*whole, 0], 3))
    events = run(engine)["longer"]
    assert isinstance(events[0], Started)
    assert events[0].cached_tokens == len(whole) - 4
    assert completion(events) == reference_completion([*whole, 0], 3)


def test_penalties_are_read_back_first() -> None:
    runner = AheadRunner(64, 4)
    engine = make_engine(runner)
    engine.add(make_request("a", [1, 2, 3], 5, frequency_penalty=1))
    assert completion(run(engine)["a"]) == reference_completion([1, 2, 3], 5)
    assert runner.most_in_flight == 1


def test_memory_is_not_preempted_from_under_a_step() -> None:
    runner = AheadRunner(10, 4)
    engine = make_engine(runner)
    for i in range(4):
        engine.add(make_request(f"r{i}", [i, i + 1, i + 2], 25, seed=i))
    events = run(engine)
    assert engine.load().preemptions > 0
    assert runner.most_in_flight == 2
    for i in range(4):
        assert completion(events[f"r{i}"]) == reference_completion([i, i + 1, i + 2], 25, seed=i)


def test_nobody_is_preempted_while_a_step_in_flight_may_free_a_block() -> None:
    engine = make_engine(AheadRunner(3, 4))
    engine.add(
        make_request("longer", [1], 5)
    )  # needs its second block when the other one's last token is pending
    engine.add(make_request("ending", [2, 2], 4))
    events = run(engine)
    assert engine.load().preemptions == 0
    assert completion(events["longer"]) == reference_completion([1], 5)
    assert completion(events["ending"]) == reference_completion([2, 2], 4)


def test_blocks_of_a_cancelled_request_are_safe_to_reuse_at_once() -> None:
    runner = AheadRunner(6, 4)  # one request fills it
    engine = make_engine(runner)
    cancelled = make_request("cancelled", [5] * 14, 8)
    engine.add(cancelled)
    for _ in range(4):
        engine.step()
    engine.cancel(cancelled, None)  # with a step in flight
    engine.add(make_request("next", [6] * 14, 8))
    assert completion(run(engine)["next"]) == reference_completion([6] * 14, 8)
    assert_idle(engine)


@pytest.mark.parametrize("failing", [{0}, {1}, {3}, {3, 5}], ids=str)
@pytest.mark.parametrize("error", [OutOfMemory(), ArithmeticError()], ids=["memory", "other"])
def test_a_launch_that_fails_is_repeated_in_halves(failing: set[int], error: Exception) -> None:
    engine = make_engine(BadLauncher(failing, error))
    for i in range(3):
        engine.add(make_request(f"r{i}", [i, 1, 2], 8))
    events = run(engine)
    for i in range(3):
        assert completion(events[f"r{i}"]) == reference_completion([i, 1, 2], 8)
    assert_idle(engine)


def test_a_step_that_fails_late_takes_nothing_along() -> None:
    """The step after it was launched on what it did not write."""

    def fail(row: Row) -> None:
        if row.sequence.request.request_id == "bad" and row.start >= 6:
            raise ArithmeticError("boom")

    engine = make_engine(AheadRunner(64, 4, before_row=fail))
    for request_id in ("a", "bad", "b"):
        engine.add(make_request(request_id, [1, 2, 3], 10))
    events = run(engine)
    assert isinstance(events["bad"][-1], Failed)
    assert completion(events["bad"]) == reference_completion([1, 2, 3], 4)
    for request_id in ("a", "b"):
        assert completion(events[request_id]) == reference_completion([1, 2, 3], 10)
    assert_idle(engine)


def test_a_device_lost_in_flight_is_told() -> None:
    def lose(row: Row) -> None:
        if row.start >= 5:
            raise DeviceLost

    engine = make_engine(AheadRunner(64, 4, before_row=lose))
    engine.add(make_request("a", [1, 2], 10))
    with pytest.raises(DeviceLost):
        run(engine)
