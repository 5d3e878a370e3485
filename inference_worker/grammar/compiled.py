"""A compiled grammar and its states: the engine's `Grammar` by llguidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, cast

import numpy as np
from llguidance import LLMatcher, LLParserLimits

from inference_worker.engine.grammar import GrammarFailed, GrammarState, Masks
from inference_worker.grammar.budget import Budget
from inference_worker.grammar.limits import PARSER_LIMITS
from inference_worker.grammar.mask_maker import MaskMaker
from inference_worker.grammar.vocabulary import StopTokens, Vocabulary, Words, stop_tokens

_MAX_PROBLEM_CHARS: Final = 300


class CompiledGrammar:
    """The engine's `Grammar`. Its choices share what the lexer finds out on its way."""

    def __init__(
        self, vocabulary: Vocabulary, grammar: str, maker: MaskMaker, seconds_per_token: float
    ) -> None:
        """`grammar` is in llguidance's form; `seconds_per_token` of processor time is what each choice may take.

        Raises: GrammarFailed, if nothing can be made of it.
        """
        self._vocabulary = vocabulary
        self._maker = maker
        self._seconds_per_token = seconds_per_token
        self._matcher = LLMatcher(
            vocabulary.ll, grammar, log_level=0, limits=LLParserLimits(**PARSER_LIMITS)
        )
        # The lexer's states have run out, or may have: whoever starts from here would fail as well.
        self.is_spent = False
        if self._matcher.is_error():
            raise GrammarFailed(explain(self._matcher.get_error()))
        self._check_first_token()

    def start(self, stop_token_ids: frozenset[int]) -> MatcherState:
        """See Grammar."""
        budget = Budget(self._seconds_per_token)
        return MatcherState(
            self,
            self._matcher.deep_copy(),
            stop_tokens(stop_token_ids),
            budget,
            self._maker.clocks.thread,
        )

    def masks(self, states: Sequence[GrammarState]) -> Masks:
        """See Grammar."""
        return self._masks(cast(Sequence[MatcherState], states), self._maker.fill)

    def _masks(
        self, mine: Sequence[MatcherState], fill: Callable[[Words, Sequence[MatcherState]], object]
    ) -> Masks:
        vocabulary = self._vocabulary
        bits = np.zeros((len(mine), vocabulary.words), dtype=np.uint32)
        fill(bits, mine)
        word, bit = divmod(vocabulary.end_id, 32)
        may_end = (bits[:, word] >> bit & 1).tolist()
        bits &= vocabulary.text_mask
        failures: dict[int, Exception] = {}
        for row, state in enumerate(mine):
            state.stops.put(bits[row], is_allowed=bool(may_end[row]))
            if state.matcher.is_error():
                failures[row] = state.failure()
            elif state.budget.is_spent:
                failures[row] = state.too_slow()
        return Masks(bits.tobytes(), failures)

    def _check_first_token(self) -> None:
        """Raises: GrammarFailed, if no token can begin a text."""
        # not by the maker's own account: that is the engine's, and this another thread
        masks = self._masks([self.start(frozenset())], self._maker.fill_together)
        if masks.failures:
            raise masks.failures[0]
        if not any(masks.bits):
            raise GrammarFailed("no text matches it, unless the empty one does")


class MatcherState:
    """The engine's `GrammarState`."""

    def __init__(
        self,
        grammar: CompiledGrammar,
        matcher: LLMatcher,
        stops: StopTokens,
        budget: Budget,
        clock: Callable[[], float],
    ) -> None:
        """`clock` gives processor time of the calling thread, in seconds."""
        self._grammar = grammar
        self._clock = clock
        self.matcher = matcher
        self.stops = stops
        self.budget = budget

    @property
    def is_complete(self) -> bool:
        """See GrammarState."""
        return self.matcher.is_stopped() and not self.matcher.is_error()

    def accept(self, token_id: int) -> None:
        """See GrammarState."""
        began_at = self._clock()
        is_allowed = self.matcher.consume_token(token_id)
        self.budget.earn()
        self.budget.spend(self._clock() - began_at)
        if not is_allowed:
            raise self.failure()
        if self.budget.is_spent:
            raise self.too_slow()

    def failure(self) -> GrammarFailed:
        """Why the matcher cannot go on."""
        self._grammar.is_spent = True
        return GrammarFailed(explain(self.matcher.get_error()))

    def too_slow(self) -> GrammarFailed:
        """Why the choice may not go on."""
        milliseconds = 1e3 * self.budget.seconds_per_token
        return GrammarFailed(f"takes more than {milliseconds:g} ms of processor time a token")


def explain(problem: str) -> str:
    """llguidance's words, in one line of bounded length."""
    if problem.startswith("NoExtension"):
        return "no text matches it"
    line = " ".join(problem.replace("<non-verbose/>", "").split())
    return line if len(line) <= _MAX_PROBLEM_CHARS else line[: _MAX_PROBLEM_CHARS - 1] + "…"
