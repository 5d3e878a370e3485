"""The engine against a runner with real paged memory: what comes out, in which order, and how it ends."""

from __future__ import annotations

import pytest

from inference_worker.engine.choice_output import MAX_ECHO_TOKENS
from inference_worker.engine.event import (
    Delta,
    Event,
    FinishReason,
    Scheduled,
    Started,
)
from inference_worker.engine.request import OutputParams
from tests.worker.engine.engines import (
    assert_idle,
    completion,
    footers,
    make_engine,
    make_request,
    run,
    text,
)
from tests.worker.engine.hash_runner import VOCABULARY, HashRunner, reference_completion

pytestmark = pytest.mark.usefixtures("runs_ahead")


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
