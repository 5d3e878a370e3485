"""What a choice's grammar may cost: told by a clock of the test's own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest
from llguidance import LLMatcher

from inference_worker.engine.grammar import GrammarFailed, Masks
from inference_worker.grammar.budget import BURST_TOKENS, Budget
from inference_worker.grammar.compiled import CompiledGrammar, MatcherState
from inference_worker.grammar.compiler import in_llguidance
from inference_worker.grammar.mask_maker import Clocks, MaskMaker
from inference_worker.grammar.source import GrammarSource
from inference_worker.grammar.vocabulary import Vocabulary
from tests.worker.grammar.noise import Noise

PER_TOKEN = 0.001


def test_a_budget_is_an_average_with_some_slack() -> None:
    budget = Budget(PER_TOKEN)
    for _ in range(10 * BURST_TOKENS):
        budget.earn()
        budget.spend(PER_TOKEN)
    assert not budget.is_spent
    budget.spend(0.99 * BURST_TOKENS * PER_TOKEN)
    assert not budget.is_spent
    budget.spend(0.02 * BURST_TOKENS * PER_TOKEN)
    assert budget.is_spent


def test_what_is_saved_up_is_bounded() -> None:
    budget = Budget(PER_TOKEN)
    for _ in range(1000 * BURST_TOKENS):
        budget.earn()
    budget.spend(1.01 * BURST_TOKENS * PER_TOKEN)
    assert budget.is_spent


class Costly:
    """A matcher whose every call takes time, of a clock that no other thing moves."""

    def __init__(self, matcher: LLMatcher, laboratory: Laboratory) -> None:
        self.matcher = matcher
        self.laboratory = laboratory
        self.seconds_of_mask = self.seconds_of_token = 0.0

    def unsafe_compute_mask_ptr(self, pointer: int, num_bytes: int) -> None:
        self.laboratory.now += self.seconds_of_mask
        self.laboratory.num_alone += 1
        self.matcher.unsafe_compute_mask_ptr(pointer, num_bytes)

    def consume_token(self, token_id: int) -> bool:
        self.laboratory.now += self.seconds_of_token
        return self.matcher.consume_token(token_id)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.matcher, name)


class Laboratory:
    """A mask maker and digits, with a clock of their own."""

    def __init__(self, noise: Noise) -> None:
        self.now = 0.0
        self.num_alone = self.num_together = 0  # masks
        self.maker = MaskMaker(Clocks(thread=lambda: self.now, wall=lambda: self.now))
        self._executor: Any = self.maker._executor
        self.maker._executor = self  # type: ignore[assignment]
        vocabulary = Vocabulary(noise.tokenizer, noise.vocabulary_size)
        source = in_llguidance(GrammarSource("regex", "[0-9]+"))
        self.grammar = CompiledGrammar(vocabulary, source, self.maker, PER_TOKEN)
        self.digit = next(i for i in range(300) if noise.tokenizer.token_bytes(i) == b"7")

    def start(self, **seconds: float) -> MatcherState:
        state = self.grammar.start(frozenset())
        costly = Costly(state.matcher, self)
        for name, value in seconds.items():
            setattr(costly, name, value)
        state.matcher = costly  # type: ignore[assignment]
        return state

    def unsafe_compute_mask_ptr(self, matchers: list[Any], *place: int) -> None:
        """In place of the executor's."""
        of_mine = [m for m, _ in matchers if isinstance(m, Costly)]
        self.now += sum(m.seconds_of_mask for m in of_mine)
        self.num_together += len(of_mine)
        real = [(m.matcher if isinstance(m, Costly) else m, row) for m, row in matchers]
        self._executor.unsafe_compute_mask_ptr(real, *place)

    def step(self, states: Sequence[MatcherState]) -> Masks:
        """Masks, then a token for each."""
        masks = self.grammar.masks(states)
        for row, state in enumerate(states):
            if row not in masks.failures:
                state.accept(self.digit)
        return masks


@pytest.fixture
def laboratory(noise: Noise) -> Laboratory:
    return Laboratory(noise)


def test_rows_within_their_share_are_never_timed_alone(laboratory: Laboratory) -> None:
    share = PER_TOKEN / len(os.sched_getaffinity(0))
    states = [laboratory.start(seconds_of_mask=0.9 * share) for _ in range(3)]
    for _ in range(3 * BURST_TOKENS):
        assert not laboratory.step(states).failures
    assert laboratory.num_alone == 0
    assert laboratory.num_together == 9 * BURST_TOKENS


def test_a_costly_row_fails_alone_and_soon(laboratory: Laboratory) -> None:
    cheap = [laboratory.start() for _ in range(2)]
    hostile = laboratory.start(seconds_of_mask=20 * PER_TOKEN)
    states = [cheap[0], hostile, cheap[1]]
    first = laboratory.step(states)
    num_steps = 1
    while not (masks := laboratory.step(states)).failures:
        num_steps += 1
        assert num_steps < BURST_TOKENS
        assert masks.bits == first.bits  # after a digit, what may follow is what it was
    assert list(masks.failures) == [1]
    assert isinstance(masks.failures[1], GrammarFailed)
    assert "1 ms of processor time a token" in str(masks.failures[1])
    # the first mask is charged to nobody; then each takes 20 shares of the 100, and a token gives 1
    assert num_steps == 1 + BURST_TOKENS // 19
    assert laboratory.num_together == 3
    laboratory.step(cheap)  # still row by row: that these are cheap must show first
    laboratory.step(cheap)
    assert laboratory.num_together == 5


def test_taking_a_token_counts_too(laboratory: Laboratory) -> None:
    state = laboratory.start(seconds_of_token=10.5 * PER_TOKEN)
    for _ in range(BURST_TOKENS // 10):
        state.accept(laboratory.digit)
    with pytest.raises(GrammarFailed, match="processor time"):
        state.accept(laboratory.digit)
    assert not laboratory.grammar.is_spent  # the grammar's next choice has a budget of its own
