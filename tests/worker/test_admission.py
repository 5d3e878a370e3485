"""Admission's books: limits held, nothing lost, whatever the order of events."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from inference_worker.admission import Admission, AdmissionLimits, Ticket
from inference_worker.caller import Caller
from inference_worker.errors import (
    Draining,
    QueueFull,
    SluiceError,
    TokenBudgetFull,
    WouldMissDeadline,
)


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_runs_at_once_while_slots_are_free_then_waits_then_refuses() -> None:
    admission = Admission(AdmissionLimits(max_running=2, max_waiting=1, max_waiting_tokens=100))
    assert not admission.admit(2, 10).is_waiting
    assert admission.admit(1, 10).is_waiting
    with pytest.raises(QueueFull):
        admission.admit(1, 10)


def test_nobody_overtakes_the_queue() -> None:
    admission = Admission(AdmissionLimits(max_running=2, max_waiting=9, max_waiting_tokens=100))
    admission.admit(1, 10)
    assert admission.admit(2, 10).is_waiting
    assert admission.admit(
        1, 10
    ).is_waiting  # one slot is free, but the one before it waits for two


def test_the_token_budget_counts_waiting_prompts_only() -> None:
    admission = Admission(AdmissionLimits(max_running=1, max_waiting=9, max_waiting_tokens=100))
    admission.admit(1, 1_000_000)
    waiting = admission.admit(1, 60)
    with pytest.raises(TokenBudgetFull) as refusal:
        admission.admit(1, 41)
    assert "41" in str(refusal.value)
    waiting.leave_queue()
    assert admission.admit(1, 100).is_waiting


def test_the_true_size_of_a_prompt_replaces_the_estimate() -> None:
    admission = Admission(AdmissionLimits(max_running=1, max_waiting=9, max_waiting_tokens=100))
    running = admission.admit(1, 1)
    running.set_prompt_tokens(1_000_000)
    waiting = admission.admit(1, 50)
    waiting.set_prompt_tokens(20)
    assert admission.waiting_tokens == 20
    with pytest.raises(TokenBudgetFull):
        waiting.set_prompt_tokens(101)
    waiting.release()
    assert admission.waiting_tokens == 0


def test_no_queue_at_all() -> None:
    admission = Admission(AdmissionLimits(max_running=1, max_waiting=0, max_waiting_tokens=0))
    with admission.admit(1, 5), pytest.raises(QueueFull):
        admission.admit(1, 5)
    assert not admission.admit(1, 5).is_waiting


def test_alone_a_request_with_more_sequences_than_slots_runs() -> None:
    admission = Admission(AdmissionLimits(max_running=2, max_waiting=0, max_waiting_tokens=0))
    with admission.admit(5, 10) as ticket:
        assert not ticket.is_waiting
        for _ in range(4):
            ticket.finish_sequence()
        assert not admission.admit(1, 10).is_waiting
        with pytest.raises(QueueFull):
            admission.admit(1, 10)


def test_draining_refuses_everything() -> None:
    admission = Admission(AdmissionLimits(max_running=1, max_waiting=1, max_waiting_tokens=10))
    admission.stop_admitting()
    with pytest.raises(Draining):
        admission.admit(1, 1)


@pytest.mark.parametrize(("seconds_each", "expected"), [(0.01, 1.0), (0.5, 2.5), (60.0, 5.0)])
def test_the_retry_time_follows_the_drain_rate(seconds_each: float, expected: float) -> None:
    clock = Clock()
    admission = Admission(AdmissionLimits(2, max_waiting=4, max_waiting_tokens=100), clock)
    tickets = [admission.admit(1, 1) for _ in range(6)]
    for _ in range(20):  # one leaves, the queue moves up, another joins
        clock.now += seconds_each
        tickets.pop(0).release()
        tickets[1].leave_queue()
        tickets.append(admission.admit(1, 1))
    with pytest.raises(QueueFull) as refusal:
        admission.admit(1, 1)
    assert refusal.value.retry_after == pytest.approx(expected)


def test_idle_time_says_nothing_about_the_drain_rate() -> None:
    clock = Clock()
    admission = Admission(AdmissionLimits(1, max_waiting=1, max_waiting_tokens=100), clock)
    clock.now += 3600
    first = admission.admit(1, 1)
    admission.admit(1, 1)
    clock.now += 0.1
    first.release()
    assert admission.retry_after() == 1.0


def full_admission(clock: Clock, max_waiting: int = 2) -> tuple[Admission, list[Ticket]]:
    """One runs and two wait, each with a prompt of 10 tokens."""
    admission = Admission(AdmissionLimits(1, max_waiting, max_waiting_tokens=100), clock)
    return admission, [admission.admit(1, 10) for _ in range(3)]


def hold_of(admission: Admission, *request: Any) -> float:
    with pytest.raises(SluiceError) as refusal:
        admission.admit(*request)
    return refusal.value.hold


def test_a_refusal_holds_until_the_next_one_leaves_but_not_for_long() -> None:
    clock = Clock()
    admission, tickets = full_admission(clock)
    assert hold_of(admission, 1, 10) == 0.05  # no pace was seen yet
    clock.now += 0.02
    tickets[0].release()
    tickets[1].leave_queue()
    admission.admit(1, 10)
    assert hold_of(admission, 1, 10) == pytest.approx(0.02)
    clock.now += 3600
    tickets[1].release()
    tickets[2].leave_queue()
    admission.admit(1, 10)
    assert hold_of(admission, 1, 10) == 0.05


def test_a_refusal_that_a_smaller_request_would_escape_does_not_hold() -> None:
    for limits, first, second, refused, small in (
        (AdmissionLimits(4, 1, 100), (2, 10), (3, 10), (2, 10), (1, 10)),
        (AdmissionLimits(9, 1, 100, total_blocks=4, block_size=10), (1, 20), (1, 30), (1, 20), (1, 10)),
    ):  # fmt: skip
        admission = Admission(limits, Clock())
        running, waiting = admission.admit(*first), admission.admit(*second)
        assert waiting.is_waiting
        assert hold_of(admission, *refused) > 0
        running.release()  # one slot or block is free now, and the engine does not yet know of it
        assert hold_of(admission, *refused) == 0.0
        assert not admission.admit(*small).is_waiting
        assert hold_of(admission, *refused) > 0


def test_a_refusal_for_its_tokens_or_without_a_queue_does_not_hold() -> None:
    admission, _ = full_admission(Clock(), max_waiting=3)
    assert hold_of(admission, 1, 81) == 0.0
    admission = Admission(AdmissionLimits(1, max_waiting=0, max_waiting_tokens=100))
    admission.admit(1, 10)
    assert hold_of(admission, 1, 10) == 0.0  # a slot would be left open


def test_a_key_is_held_when_its_share_is_full_and_not_for_its_tokens() -> None:
    limits = AdmissionLimits(max_running=1, max_waiting=9, max_waiting_tokens=90)
    admission = Admission(limits, Clock())
    for _ in range(7):
        admission.admit(1, 1, Caller("a"))
    assert hold_of(admission, 1, 82, Caller("a")) == 0.0
    admission.admit(1, 1, Caller("a"))
    admission.admit(1, 1, Caller("a"))
    assert hold_of(admission, 1, 1, Caller("a")) > 0
    assert admission.admit(1, 1, Caller("b")).is_waiting


def test_a_pace_of_long_ago_refuses_nobody() -> None:
    clock = Clock()
    admission = Admission(AdmissionLimits(1, max_waiting=9, max_waiting_tokens=100), clock)
    first, second = admission.admit(1, 1), admission.admit(1, 1)
    clock.now += 100
    first.release()  # a request takes 100 seconds, as it seems
    second.leave_queue()
    with pytest.raises(WouldMissDeadline):
        admission.admit(1, 1, seconds_left=50)
    clock.now += 201  # and that nobody may wait keeps it from being seen that it does not
    assert admission.admit(1, 1, seconds_left=50).is_waiting


class AdmissionMachine(RuleBasedStateMachine):
    """Any order of admitting, tokenizing, scheduling, finishing and leaving."""

    tickets = Bundle("tickets")

    def __init__(self) -> None:
        super().__init__()
        self.limits = AdmissionLimits(max_running=4, max_waiting=3, max_waiting_tokens=50)
        self.admission = Admission(self.limits)
        self.held: list[Ticket] = []
        self.retry_times: list[float | None] = []

    @rule(target=tickets, sequences=st.integers(1, 6), tokens=st.integers(0, 60))
    def admit(self, sequences: int, tokens: int) -> Ticket | None:
        try:
            ticket = self.admission.admit(sequences, tokens)
        except SluiceError as error:
            self.retry_times.append(error.retry_after)
            return None
        self.held.append(ticket)
        return ticket

    @rule(ticket=tickets, tokens=st.integers(1, 60))
    def tokenized(self, ticket: Ticket | None, tokens: int) -> None:
        if ticket in self.held:
            try:
                ticket.set_prompt_tokens(tokens)
            except TokenBudgetFull:
                self.leave(ticket)

    @rule(ticket=tickets)
    def scheduled(self, ticket: Ticket | None) -> None:
        if ticket in self.held:
            ticket.leave_queue()

    @rule(ticket=tickets)
    def sequence_finished(self, ticket: Ticket | None) -> None:
        if ticket in self.held:
            ticket.finish_sequence()

    @rule(ticket=consumes(tickets), times=st.integers(1, 3))
    def left(self, ticket: Ticket | None, times: int) -> None:
        for _ in range(times):
            if ticket is not None:
                self.leave(ticket)

    def leave(self, ticket: Ticket) -> None:
        with ticket:
            pass
        if ticket in self.held:
            self.held.remove(ticket)

    @invariant()
    def limits_hold(self) -> None:
        admission = self.admission
        assert 0 <= admission.waiting_requests <= self.limits.max_waiting
        assert 0 <= admission.waiting_tokens <= self.limits.max_waiting_tokens
        assert admission.waiting_requests == sum(ticket.is_waiting for ticket in self.held)
        assert admission.requests == len(self.held)
        assert admission.sequences >= 0
        assert all(seconds is not None and 1 <= seconds <= 5 for seconds in self.retry_times)

    def teardown(self) -> None:
        for ticket in list(self.held):
            self.leave(ticket)
        admission = self.admission
        books = (admission.waiting_requests, admission.waiting_tokens, admission.sequences)
        assert books == (0, 0, 0)
        assert admission.requests == 0


AdmissionMachine.TestCase.settings = hypothesis_settings(max_examples=60, deadline=None)
TestAdmissionMachine = AdmissionMachine.TestCase
