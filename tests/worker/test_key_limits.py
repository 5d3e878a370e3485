"""A key's own limits: how many inside, how many tokens in a minute, and when to come back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_worker import key_limits as key_limits_module
from inference_worker.caller import ANYBODY, Caller
from inference_worker.errors import KeyLimit
from inference_worker.key_limits import KeyLimits, KeyTicket
from tests.worker.test_admission import Clock


def seconds_to_wait(limits: KeyLimits, caller: Caller, tokens: int) -> float:
    with pytest.raises(KeyLimit) as refusal:
        limits.enter(caller, tokens, 0.0)
    assert refusal.value.retry_after is not None
    return refusal.value.retry_after


def test_a_key_has_so_many_inside_and_others_are_none_of_its_business() -> None:
    limits = KeyLimits(Clock())
    caller = Caller("a", max_concurrent=2)
    tickets = [limits.enter(caller, 1, 0.0) for _ in range(2)]
    assert seconds_to_wait(limits, caller, 1) == 1.0
    limits.enter(Caller("b", max_concurrent=1), 1, 0.0)
    tickets[0].leave()
    tickets[0].leave()  # once
    limits.enter(caller, 1, 0.0)
    assert seconds_to_wait(limits, caller, 1) == 1.0


def test_the_time_to_come_back_is_when_the_tokens_are_there() -> None:
    clock = Clock()
    limits = KeyLimits(clock)
    caller = Caller("a", tokens_per_minute=600)  # ten a second
    limits.enter(caller, 500, 0.0).serve()
    wait = seconds_to_wait(limits, caller, 300)
    assert wait == pytest.approx(20.0)
    clock.now += wait - 0.1
    assert seconds_to_wait(limits, caller, 300) == 1.0  # never sooner than that
    clock.now += 0.2
    limits.enter(caller, 300, 0.0)


def test_completions_are_never_cut_but_the_next_request_waits_for_them() -> None:
    clock = Clock()
    limits = KeyLimits(clock)
    caller = Caller("a", tokens_per_minute=60)
    ticket = limits.enter(caller, 10, 0.0)
    ticket.serve()
    ticket.use(110)  # 60 more than the bucket had
    ticket.leave()
    assert seconds_to_wait(limits, caller, 1) == pytest.approx(61.0)


def test_what_comes_back_pays_for_what_is_computed_again_and_no_other_does() -> None:
    caller = Caller("a", tokens_per_minute=60)  # one a second
    limits = KeyLimits(Clock())
    for ticket in (limits.enter_continued(caller), limits.enter_again(caller, 0.0)):
        ticket.set_prompt_tokens(1000)
        ticket.leave()  # before the model began with it
    moved = limits.enter_continued(caller)
    moved.set_prompt_tokens(1000)
    moved.serve(100)
    limits.enter(caller, 1, 0.0).leave()  # not served either: given back
    again = limits.enter_again(caller, 0.0)
    again.set_prompt_tokens(1000)
    again.serve(100)
    assert seconds_to_wait(limits, caller, 1) == pytest.approx(41.0)
    limits.enter_again(caller, 0.0)  # in debt, and never refused for that


def test_a_prompt_larger_than_the_bucket_needs_a_full_one() -> None:
    clock = Clock()
    limits = KeyLimits(clock)
    caller = Caller("a", tokens_per_minute=60)
    limits.enter(caller, 1000, 0.0).serve()
    assert seconds_to_wait(limits, caller, 1000) == pytest.approx(1000.0)
    clock.now += 1000
    limits.enter(caller, 1000, 0.0)


def test_a_request_that_never_ran_gives_its_tokens_back() -> None:
    limits = KeyLimits(Clock())
    caller = Caller("a", tokens_per_minute=60)
    ticket = limits.enter(caller, 60, 0.0)
    assert seconds_to_wait(limits, caller, 1) > 0
    ticket.leave()
    limits.enter(caller, 60, 0.0)


def test_the_true_size_of_a_prompt_replaces_the_estimate() -> None:
    limits = KeyLimits(Clock())
    caller = Caller("a", tokens_per_minute=60)
    ticket = limits.enter(caller, 60, 0.0)
    ticket.set_prompt_tokens(10)
    limits.enter(caller, 50, 0.0)
    assert seconds_to_wait(limits, caller, 1) == pytest.approx(1.0)


def test_idle_keys_are_forgotten_when_full_or_when_too_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(key_limits_module, "MAX_IDLE_KEYS", 3)
    limits = KeyLimits(Clock())
    limits.enter(ANYBODY, 10, 0.0).leave()
    limits.enter(Caller("unused", tokens_per_minute=60), 10, 0.0).leave()
    assert len(limits) == 0
    for number in range(5):
        ticket = limits.enter(Caller(f"k{number}", tokens_per_minute=60), 60, 0.0)
        ticket.serve()
        ticket.leave()
    assert len(limits) == 3
    limits.enter(Caller("k0", tokens_per_minute=60), 60, 0.0)  # forgotten, and so forgiven
    assert seconds_to_wait(limits, Caller("k4", tokens_per_minute=60), 60) == pytest.approx(60.0)


@given(
    st.lists(
        st.tuples(st.floats(0, 30), st.integers(0, 100), st.integers(0, 100), st.booleans()),
        max_size=40,
    )
)
def test_nobody_gets_more_than_a_bucket_and_its_refill(
    steps: list[tuple[float, int, int, bool]],
) -> None:
    clock = Clock()
    began = clock.now
    limits = KeyLimits(clock)
    caller = Caller("a", max_concurrent=3, tokens_per_minute=60)
    inside: list[KeyTicket] = []
    admitted = 0
    for seconds, prompt, completion, leaves in steps:
        clock.now += seconds
        if leaves and inside:
            ticket = inside.pop(0)
            ticket.use(completion)
            ticket.leave()
            ticket.leave()
            admitted += completion
        try:
            inside.append(limits.enter(caller, prompt, 0.0))
        except KeyLimit:
            continue
        inside[-1].serve()
        assert len(inside) <= 3
        # what was used before this prompt was there, or came since
        assert admitted <= 60 + (clock.now - began) + 1e-6 or prompt == 0 == completion
        admitted += prompt
