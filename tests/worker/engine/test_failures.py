"""What fails in the engine fails alone: rows, texts, and steps that find no memory."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from inference_worker.engine.detokenizer import ByteDetokenizer
from inference_worker.engine.engine import MAX_REFUSALS
from inference_worker.engine.event import (
    Failed,
    FinishReason,
)
from inference_worker.engine.request import OutputParams
from inference_worker.engine.runner import DeviceLost, OutOfMemory, Row
from tests.worker.engine.engines import (
    TOKEN_BYTES,
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


def test_a_failing_row_fails_its_request_alone() -> None:
    def explode(row: Row) -> None:
        if row.sequence.request.request_id == "bad" and row.start >= 5:
            raise ArithmeticError("boom")

    engine = make_engine(HashRunner(64, 4, before_row=explode))
    for request_id in ("a", "bad", "b"):
        engine.add(make_request(request_id, [1, 2, 3], 10))
    events = run(engine)
    assert isinstance(events["bad"][-1], Failed)
    assert isinstance(events["bad"][-1].error, ArithmeticError)
    for request_id in ("a", "b"):
        assert completion(events[request_id]) == reference_completion([1, 2, 3], 10)
    assert_idle(engine)


def test_a_failing_choice_fails_its_siblings_with_it() -> None:
    def explode(row: Row) -> None:
        if row.sequence.choice_index == 1 and row.start >= 5:
            raise ArithmeticError("boom")

    engine = make_engine(HashRunner(64, 4, before_row=explode))
    engine.add(make_request("a", [1, 2, 3], 10, n=3))
    events = run(engine)["a"]
    assert sum(isinstance(event, Failed) for event in events) == 1
    assert isinstance(events[-1], Failed)
    assert_idle(engine)


class BrokenDetokenizer(ByteDetokenizer):
    def flush(self) -> str:
        raise ValueError("cannot be flushed")


def new_broken_detokenizer(*, at_start: bool = False) -> BrokenDetokenizer:
    return BrokenDetokenizer(TOKEN_BYTES)


def test_a_request_that_cannot_be_ended_properly_fails_alone() -> None:
    engine = make_engine(HashRunner(64, 4))
    engine._new_detokenizer = new_broken_detokenizer
    bad = make_request("bad", [1, 2], 10)
    engine.add(bad)
    engine._new_detokenizer = new_detokenizer
    engine.add(make_request("good", [1, 2], 10))
    engine.step()
    engine.cancel(bad, FinishReason.CANCELLED)
    events = [(request.request_id, event) for request, event in engine.take_events()]
    assert isinstance(dict(events)["bad"], Failed)
    before = [event for request_id, event in events if request_id == "good"]
    assert completion(before + run(engine)["good"]) == reference_completion([1, 2], 10)


def test_a_lost_device_is_not_blamed_on_requests() -> None:
    def lose(_: Row) -> None:
        raise DeviceLost

    engine = make_engine(HashRunner(64, 4, before_row=lose))
    engine.add(make_request("a", [1, 2], 10))
    with pytest.raises(DeviceLost):
        run(engine)


def test_out_of_memory_is_retried_with_smaller_batches() -> None:
    class Small(HashRunner):
        def execute(self, rows: Sequence[Row]) -> list:  # type: ignore[type-arg]
            if len(rows) > 2:
                raise OutOfMemory
            return super().execute(rows)

    engine = make_engine(Small(64, 4))
    for i in range(4):
        engine.add(make_request(f"r{i}", [i, 1, 2], 5))
    events = run(engine)
    for i in range(4):
        assert completion(events[f"r{i}"]) == reference_completion([i, 1, 2], 5)


class Cramped(HashRunner):
    """A device without memory for steps of more than some tokens, or for a request at all."""

    def __init__(self, most_tokens: int, never: str = "", only_times: int = 2**31) -> None:
        super().__init__(64, 4, before_row=self.check_memory)
        self.most_tokens = most_tokens
        self.never = never
        self.times_left = only_times

    def check_memory(self, row: Row) -> None:
        is_refused = (
            row.num_tokens > self.most_tokens or row.sequence.request.request_id == self.never
        )
        if is_refused and self.times_left:
            self.times_left -= 1
            raise OutOfMemory


@pytest.mark.usefixtures("runs_ahead")
def test_a_chunk_too_large_for_the_device_is_cut() -> None:
    engine = make_engine(Cramped(most_tokens=3))
    for i in range(3):
        engine.add(make_request(f"r{i}", range(i, i + 15), 6, n=2))
    events = run(engine)
    for i in range(3):
        for choice_index in range(2):
            assert completion(events[f"r{i}"], choice_index) == reference_completion(
                range(i, i + 15), 6, choice_index=choice_index
            )
        assert {footer.reason for footer in footers(events[f"r{i}"])} == {FinishReason.LENGTH}
    assert_idle(engine)


@pytest.mark.usefixtures("runs_ahead")
def test_memory_that_comes_back_in_time_costs_nothing_but_time() -> None:
    engine = make_engine(Cramped(most_tokens=99, never="a", only_times=10))
    engine.add(make_request("a", [1, 2, 3], 6))
    assert completion(run(engine)["a"]) == reference_completion([1, 2, 3], 6)
    assert engine.load().preemptions > 0
    assert_idle(engine)


@pytest.mark.usefixtures("runs_ahead")
def test_a_token_refused_now_and_then_ends_nothing_and_cuts_no_chunk() -> None:
    refused: set[int] = set()

    def refuse_each_token_once(row: Row) -> None:
        if row.num_tokens == 1 and row.start not in refused:
            refused.add(row.start)
            raise OutOfMemory

    runner = HashRunner(64, 4, before_row=refuse_each_token_once)
    engine = make_engine(runner, max_batch_tokens=64)
    # with its prompt to be scored it is computed again from the first token on
    scored = OutputParams(logprobs=0, echo=True, prompt_logprobs=True)
    engine.add(make_request("a", range(9), 2 * MAX_REFUSALS, output=scored))
    assert completion(run(engine)["a"]) == reference_completion(range(9), 2 * MAX_REFUSALS)
    assert len(refused) > MAX_REFUSALS
    assert min(size for size in runner.batch_sizes if size > 1) >= 9


@pytest.mark.usefixtures("runs_ahead")
def test_a_request_that_finds_no_memory_ends_preempted_and_alone() -> None:
    engine = make_engine(Cramped(most_tokens=99, never="a"))
    engine.add(make_request("a", [1, 2, 3], 6, n=2))
    engine.add(make_request("b", [4, 5], 6))
    events = run(engine)
    assert [footer.reason for footer in footers(events["a"])] == [FinishReason.PREEMPTED] * 2
    assert footers(events["a"])[-1].usage is not None
    assert completion(events["b"]) == reference_completion([4, 5], 6)
    assert_idle(engine)
