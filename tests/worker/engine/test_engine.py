"""The engine against a runner with real paged memory: what comes out, and that no block is ever lost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import pytest

from inference_worker.engine.choice_output import MAX_ECHO_TOKENS
from inference_worker.engine.detokenizer import ByteDetokenizer
from inference_worker.engine.engine import MAX_REFUSALS, Engine, EngineOptions
from inference_worker.engine.event import (
    Delta,
    Event,
    Failed,
    Finished,
    FinishReason,
    Scheduled,
    Started,
)
from inference_worker.engine.request import OutputParams, Request, SamplingParams, StoppingParams
from inference_worker.engine.runner import DeviceLost, OutOfMemory, Row
from tests.worker.engine.hash_runner import VOCABULARY, HashRunner, reference_completion

pytestmark = pytest.mark.usefixtures("runs_ahead")

TOKEN_BYTES = [f"<{token_id}>".encode() for token_id in range(VOCABULARY)]


def new_detokenizer(*, at_start: bool = False) -> ByteDetokenizer:
    return ByteDetokenizer(TOKEN_BYTES)


def make_engine(runner: HashRunner, **options: int | bool) -> Engine:
    limits = {"max_running": 4, "max_batch_tokens": 16, "context_length": 1000, **options}
    return Engine(runner, new_detokenizer, EngineOptions(**limits))  # type: ignore[arg-type]


def make_request(
    request_id: str,
    prompt: Sequence[int],
    max_tokens: int = 8,
    *,
    n: int = 1,
    seed: int = 0,
    stop_sequences: tuple[str, ...] = (),
    stop_token_ids: frozenset[int] = frozenset(),
    frequency_penalty: float = 0,
    output: OutputParams | None = None,
) -> Request:
    return Request(
        request_id=request_id,
        prompt=tuple(prompt),
        stopping=StoppingParams(max_tokens, stop_sequences, stop_token_ids),
        sampling=SamplingParams(seed=seed, frequency_penalty=frequency_penalty),
        output=output or OutputParams(),
        n=n,
    )


def run(engine: Engine) -> dict[str, list[Event]]:
    """Step until nothing is left, checking the blocks after each step."""
    events: dict[str, list[Event]] = defaultdict(list)
    while engine.has_work:
        engine.step()
        engine.check()
        for request, event in engine.take_events():
            events[request.request_id].append(event)
    return events


def completion(events: list[Event], choice_index: int = 0) -> list[int]:
    return [
        token.token_id
        for event in events
        if isinstance(event, Delta) and event.choice_index == choice_index and not event.is_prompt
        for token in event.tokens
    ]


def text(events: list[Event], choice_index: int = 0) -> str:
    return "".join(
        event.text
        for event in events
        if isinstance(event, Delta) and event.choice_index == choice_index and not event.is_prompt
    )


def footers(events: list[Event]) -> list[Finished]:
    return [event for event in events if isinstance(event, Finished)]


def assert_idle(engine: Engine) -> None:
    load = engine.load()
    assert (load.running, load.waiting, load.free_blocks) == (0, 0, load.total_blocks)
    engine.check()


def test_events_of_one_request_come_in_order() -> None:
    engine = make_engine(HashRunner(32, 4))
    engine.add(make_request("a", [1, 2, 3], 5))
    events = run(engine)["a"]
    assert events[0] == Started(prompt_tokens=3, cached_tokens=0, queue_position=0)
    assert events[1] == Scheduled(num_uncached=3)
    assert completion(events) == reference_completion([1, 2, 3], 5)
    (footer,) = footers(events)
    assert events[-1] is footer
    assert footer.reason is FinishReason.LENGTH
    assert footer.usage is not None
    assert (footer.usage.prompt_tokens, footer.usage.completion_tokens) == (3, 5)
    assert footer.timings is not None
    assert footer.timings.time_to_first_token > 0
    assert_idle(engine)


def test_mixed_lengths_batched_with_chunked_prefill_equal_each_alone() -> None:
    runner = HashRunner(128, 4)
    engine = make_engine(runner, max_running=8, max_batch_tokens=8)
    prompts = {f"r{length}": [length] * length for length in (1, 3, 4, 5, 17, 33, 60)}
    for request_id, prompt in prompts.items():
        engine.add(make_request(request_id, prompt, 9))
    events = run(engine)
    for request_id, prompt in prompts.items():
        assert completion(events[request_id]) == reference_completion(prompt, 9)
    assert max(runner.batch_sizes) <= 8
    assert engine.load().preemptions == 0
    assert_idle(engine)


def test_preemption_recomputes_and_changes_nothing() -> None:
    engine = make_engine(HashRunner(10, 4))
    for i in range(4):
        engine.add(make_request(f"r{i}", [i, i + 1, i + 2], 25, seed=i))
    events = run(engine)
    assert engine.load().preemptions > 0
    for i in range(4):
        assert completion(events[f"r{i}"]) == reference_completion([i, i + 1, i + 2], 25, seed=i)
    assert_idle(engine)


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


def test_choices_share_the_prompt_and_differ() -> None:
    runner = HashRunner(64, 4)
    engine = make_engine(runner)
    prompt = list(range(13))
    engine.add(make_request("a", prompt, 8, n=3, seed=5))
    peak = 0
    events: list[Event] = []
    while engine.has_work:
        engine.step()
        engine.check()
        peak = max(peak, engine.load().total_blocks - engine.load().free_blocks)
        events += [event for _, event in engine.take_events()]
    for choice_index in range(3):
        expected = reference_completion(prompt, 8, seed=5, choice_index=choice_index)
        assert completion(events, choice_index) == expected
    assert peak == 3 + 3 * 2  # three shared blocks, and two of its own for each choice
    ends = footers(events)
    assert sorted(footer.choice_index for footer in ends) == [0, 1, 2]
    assert [footer.usage is not None for footer in ends] == [False, False, True]
    assert ends[-1].usage is not None
    assert ends[-1].usage.completion_tokens == 24
    assert_idle(engine)


def test_stop_tokens_end_a_choice_and_are_not_shown() -> None:
    expected = reference_completion([1, 2], 20)
    engine = make_engine(HashRunner(32, 4))
    engine.add(make_request("a", [1, 2], 20, stop_token_ids=frozenset({expected[4]})))
    events = run(engine)["a"]
    first = expected.index(expected[4])
    assert completion(events) == expected[:first]
    footer = footers(events)[0]
    assert (footer.reason, footer.stop_token_id) == (FinishReason.STOP, expected[4])
    assert footer.usage is not None
    assert footer.usage.completion_tokens == first + 1


def test_stop_sequences_across_tokens_never_leak() -> None:
    expected = reference_completion([1, 2], 20)
    whole = "".join(f"<{token_id}>" for token_id in expected)
    stop = whole[10:17]  # begins and ends inside tokens
    engine = make_engine(HashRunner(32, 4))
    engine.add(make_request("a", [1, 2], 20, stop_sequences=("never", stop)))
    events = run(engine)["a"]
    assert text(events) == whole[: whole.index(stop)]
    footer = footers(events)[0]
    assert (footer.reason, footer.stop_sequence) == (FinishReason.STOP_SEQUENCE, stop)


def test_text_held_for_a_stop_sequence_comes_at_the_end() -> None:
    expected = reference_completion([1, 2], 6)
    whole = "".join(f"<{token_id}>" for token_id in expected)
    engine = make_engine(HashRunner(32, 4))
    engine.add(make_request("a", [1, 2], 6, stop_sequences=(whole + "x",)))
    events = run(engine)["a"]
    assert text(events) == whole
    assert completion(events) == expected
    assert footers(events)[0].reason is FinishReason.LENGTH


def test_echo_comes_first_for_every_choice() -> None:
    engine = make_engine(HashRunner(32, 4))
    engine.add(make_request("a", [1, 2, 3], 2, n=2, output=OutputParams(echo=True)))
    events = run(engine)["a"]
    for choice_index in range(2):
        deltas = [e for e in events if isinstance(e, Delta) and e.choice_index == choice_index]
        assert (deltas[0].is_prompt, deltas[0].text) == (True, "<1><2><3>")
        assert [token.token_id for token in deltas[0].tokens] == [1, 2, 3]
        assert completion(events, choice_index) == reference_completion(
            [1, 2, 3], 2, choice_index=choice_index
        )


def test_a_long_echo_comes_in_pieces() -> None:
    engine = make_engine(HashRunner(1024, 4), max_batch_tokens=4096, context_length=4096)
    prompt = [i % VOCABULARY for i in range(2 * MAX_ECHO_TOKENS + 1)]
    engine.add(make_request("a", prompt, 1, output=OutputParams(echo=True)))
    echoed = [event for event in run(engine)["a"] if isinstance(event, Delta) and event.is_prompt]
    assert [len(delta.tokens) for delta in echoed] == [MAX_ECHO_TOKENS, MAX_ECHO_TOKENS, 1]
    assert "".join(delta.text for delta in echoed) == "".join(f"<{i}>" for i in prompt)


def test_echo_alone_generates_nothing() -> None:
    engine = make_engine(HashRunner(32, 4))
    engine.add(make_request("a", [1, 2, 3], 0, output=OutputParams(echo=True)))
    events = run(engine)["a"]
    assert completion(events) == []
    footer = footers(events)[0]
    assert footer.usage is not None
    assert (footer.reason, footer.usage.completion_tokens) == (FinishReason.LENGTH, 0)


def test_context_length_ends_a_choice() -> None:
    engine = make_engine(HashRunner(32, 4), context_length=10)
    engine.add(make_request("a", [1, 2, 3], 100))
    assert len(completion(run(engine)["a"])) == 7


def test_a_sequence_that_fills_all_memory_ends() -> None:
    engine = make_engine(HashRunner(4, 4))
    engine.add(make_request("a", [1, 2, 3], 100))
    events = run(engine)["a"]
    assert len(completion(events)) == 13
    assert footers(events)[0].reason is FinishReason.LENGTH
    assert_idle(engine)


def test_a_prompt_larger_than_memory_is_ended_not_stuck() -> None:
    engine = make_engine(HashRunner(4, 4))
    engine.add(make_request("huge", list(range(17)), 1))
    engine.add(make_request("next", [1], 2))
    events = run(engine)
    assert footers(events["huge"])[0].reason is FinishReason.PREEMPTED
    assert completion(events["next"]) == reference_completion([1], 2)


@pytest.mark.parametrize("steps", [0, 1, 3, 8], ids=["queued", "prefill", "first tokens", "decode"])
@pytest.mark.parametrize("reason", [None, FinishReason.CANCELLED])
def test_cancel_frees_at_once(steps: int, reason: FinishReason | None) -> None:
    engine = make_engine(HashRunner(64, 4), max_batch_tokens=8)
    request = make_request("a", list(range(20)), 50, n=2)
    engine.add(request)
    for _ in range(steps):
        engine.step()
    engine.take_events()
    engine.cancel(request, reason)
    assert_idle(engine)
    if engine.has_work:  # a step in flight, whose output nobody wants
        engine.step()
    assert not engine.has_work
    ends = footers([event for _, event in engine.take_events()])
    if reason is None:
        assert ends == []
    else:
        assert sorted(footer.choice_index for footer in ends) == [0, 1]
        assert {footer.reason for footer in ends} == {reason}
        assert ends[-1].usage is not None
    engine.cancel(request, reason)  # again: nothing
    assert engine.take_events() == []


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
