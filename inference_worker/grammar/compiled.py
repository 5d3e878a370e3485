"""A compiled grammar and its states: the engine's `Grammar` by llguidance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, cast

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits

from inference_worker.engine.grammar import GrammarFailed, GrammarState, Masks
from inference_worker.grammar.limits import PARSER_LIMITS
from inference_worker.grammar.vocabulary import StopTokens, Vocabulary, stop_tokens

_MAX_PROBLEM_CHARS: Final = 300


class CompiledGrammar:
    """The engine's `Grammar`. Its choices share what the lexer finds out on its way."""

    def __init__(self, vocabulary: Vocabulary, grammar: str) -> None:
        """`grammar` is in llguidance's form. Raises: GrammarFailed, if nothing can be made of it."""
        self._vocabulary = vocabulary
        self._matcher = LLMatcher(
            vocabulary.ll, grammar, log_level=0, limits=LLParserLimits(**PARSER_LIMITS)
        )
        # One call for all rows lets go of the interpreter once; to get it back from a busy event loop may take longer
        # than a mask does.
        self._executor = LLExecutor(num_threads=1)
        # The lexer's states have run out, or may have: whoever starts from here would fail as well.
        self.is_spent = False
        if self._matcher.is_error():
            raise GrammarFailed(explain(self._matcher.get_error()))
        self._check_first_token()

    def start(self, stop_token_ids: frozenset[int]) -> MatcherState:
        """See Grammar."""
        return MatcherState(self, self._matcher.deep_copy(), stop_tokens(stop_token_ids))

    def masks(self, states: Sequence[GrammarState]) -> Masks:
        """See Grammar."""
        mine = cast(Sequence[MatcherState], states)
        vocabulary = self._vocabulary
        bits = np.zeros((len(mine), vocabulary.words), dtype=np.uint32)
        matchers = [(state.matcher, row) for row, state in enumerate(mine)]
        self._executor.unsafe_compute_mask_ptr(
            matchers, bits.ctypes.data, vocabulary.words * bits.itemsize, len(mine)
        )
        word, bit = divmod(vocabulary.end_id, 32)
        may_end = (bits[:, word] >> bit & 1).tolist()
        bits &= vocabulary.text_mask
        failures: dict[int, Exception] = {}
        for row, state in enumerate(mine):
            state.stops.put(bits[row], is_allowed=bool(may_end[row]))
            if state.matcher.is_error():
                failures[row] = state.failure()
        return Masks(bits.tobytes(), failures)

    def _check_first_token(self) -> None:
        """Raises: GrammarFailed, if no token can begin a text."""
        masks = self.masks([self.start(frozenset())])
        if masks.failures:
            raise masks.failures[0]
        if not any(masks.bits):
            raise GrammarFailed("no text matches it, unless the empty one does")


class MatcherState:
    """The engine's `GrammarState`."""

    def __init__(self, grammar: CompiledGrammar, matcher: LLMatcher, stops: StopTokens) -> None:
        self._grammar = grammar
        self.matcher = matcher
        self.stops = stops

    @property
    def is_complete(self) -> bool:
        """See GrammarState."""
        return self.matcher.is_stopped() and not self.matcher.is_error()

    def accept(self, token_id: int) -> None:
        """See GrammarState."""
        if not self.matcher.consume_token(token_id):
            raise self.failure()

    def failure(self) -> GrammarFailed:
        """Why the matcher cannot go on."""
        self._grammar.is_spent = True
        return GrammarFailed(explain(self.matcher.get_error()))


def explain(problem: str) -> str:
    """llguidance's words, in one line of bounded length."""
    if problem.startswith("NoExtension"):
        return "no text matches it"
    line = " ".join(problem.replace("<non-verbose/>", "").split())
    return line if len(line) <= _MAX_PROBLEM_CHARS else line[: _MAX_PROBLEM_CHARS - 1] + "…"
