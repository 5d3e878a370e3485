"""Compiles the grammars of requests: off the event loop, within limits, and each of the recent ones once."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Final

from llguidance import LLMatcher

from inference_worker.continuation import DeliveredRequest
from inference_worker.engine.fair_queue import Share
from inference_worker.engine.grammar import Grammar, GrammarFailed, GrammarState
from inference_worker.errors import InvalidField, UnsupportedField
from inference_worker.grammar.compiled import CompiledGrammar, explain
from inference_worker.grammar.lane import Lane
from inference_worker.grammar.mask_maker import MaskMaker
from inference_worker.grammar.source import GrammarSource
from inference_worker.grammar.trial import TooCostly, Trial
from inference_worker.grammar.vocabulary import Vocabulary
from inference_worker.tokenizer import Tokenizer

_QUICK_SECONDS: Final = 0.1
_NOBODYS: Final = Share()
# Between two tokens of a JSON text: one space, or a line break and an indentation. Without an end to it, a model may
# well find none.
_JSON_WHITESPACE: Final = r"\x20|\x0A(\x20{0,16}|\x09{0,8})"


@dataclass(frozen=True, slots=True)
class CompilerLimits:
    """What compiling may cost."""

    seconds: float  # processor time of one grammar
    cached: int  # compiled grammars, or refusals, that are kept
    token_seconds: float  # processor time of one token of a choice, on average


class GrammarCompiler:
    """Turns sources into grammars of one model.

    Each is tried in a process of its own first, which nothing but its own time and memory limits can hold up; what has
    passed compiles here in about the same time, on a thread and without the interpreter's lock. Two lanes: most
    grammars take a millisecond or ten, and wait at most a moment for one that does not. In either of them keys take
    turns, so that many bad grammars of one key cost another's no more than one of them does. What goes on after tokens
    that were delivered waits for no compilation.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocabulary_size: int,
        limits: CompilerLimits,
        on_outcome: Callable[[str], None] | None = None,
    ) -> None:
        """`on_outcome` hears of each that is "compiled", "cached" (found compiled) or "refused"."""
        self._limits = limits
        self._on_outcome = on_outcome or (lambda _: None)
        self._vocabulary: Vocabulary | None = None
        if tokenizer.text_bytes is not None:
            self._vocabulary = Vocabulary(tokenizer, vocabulary_size)
        self._masks = MaskMaker()
        self._cache = _Cache(limits.cached)
        self._quick = Lane("grammar-quick")
        self._quick_trial = Trial(min(_QUICK_SECONDS, limits.seconds))
        self._slow = Lane("grammar-slow")
        self._slow_trial = Trial(limits.seconds)
        self._replays = Lane("grammar-replay")

    async def compile(self, source: GrammarSource, share: Share = _NOBODYS) -> CompiledGrammar:
        """Compile, or find it compiled; `share` is whose it is.

        Raises: InvalidField, UnsupportedField (no grammar works with this model's tokenizer).
        """
        if (vocabulary := self._vocabulary) is None:
            raise UnsupportedField("constraint")
        outcome = self._cache.get(source)
        word = "compiled" if outcome is None else "cached"
        if outcome is None:
            try:
                outcome = await self._quick.run(
                    share, lambda: self._compile(self._quick_trial, source, vocabulary)
                )
            except TooCostly:
                outcome = await self._try_slowly(source, vocabulary, share)
        self._on_outcome("refused" if isinstance(outcome, str) else word)
        if isinstance(outcome, str):
            raise InvalidField(source.field, outcome)
        return outcome

    async def replay(
        self,
        grammar: Grammar,
        stop_token_ids: frozenset[int],
        delivered: DeliveredRequest,
        share: Share = _NOBODYS,
    ) -> dict[int, GrammarState]:
        """The states of the choices that are continued, each after the tokens delivered of it.

        Raises: InvalidField, if these are not of the grammar.
        """
        if not delivered.running:
            return {}
        return await self._replays.run(share, lambda: _replay(grammar, stop_token_ids, delivered))

    def close(self) -> None:
        """End the threads and processes, without waiting for what has begun."""
        for lane in (self._quick, self._slow, self._replays):
            lane.close()
        for trial in (self._quick_trial, self._slow_trial):
            trial.close()

    async def _try_slowly(
        self, source: GrammarSource, vocabulary: Vocabulary, share: Share
    ) -> _Outcome:
        try:
            return await self._slow.run(
                share, lambda: self._compile(self._slow_trial, source, vocabulary)
            )
        except TooCostly:
            problem = f"takes more than {self._limits.seconds:g} s, or too much memory, to compile"
            self._cache.put(source, problem)
            return problem

    def _compile(self, trial: Trial, source: GrammarSource, vocabulary: Vocabulary) -> _Outcome:
        # the same grammar may have been compiled while this one waited for its turn
        outcome = self._cache.get(source)
        if outcome is None:
            outcome = self._compile_anew(trial, source, vocabulary)
            self._cache.put(source, outcome)
        return outcome

    def _compile_anew(
        self, trial: Trial, source: GrammarSource, vocabulary: Vocabulary
    ) -> _Outcome:
        """Raises: TooCostly."""
        try:
            grammar = in_llguidance(source)
            if problem := trial.run(grammar):
                return explain(problem)
            return CompiledGrammar(vocabulary, grammar, self._masks, self._limits.token_seconds)
        except (ValueError, GrammarFailed) as error:
            return explain(str(error))


# A refusal is the text of what is wrong.
_Outcome = CompiledGrammar | str


def _replay(
    grammar: Grammar, stop_token_ids: frozenset[int], delivered: DeliveredRequest
) -> dict[int, GrammarState]:
    states: dict[int, GrammarState] = {}
    for index, choice in delivered.running.items():
        state = states[index] = grammar.start(stop_token_ids)
        for position, token_id in enumerate(choice.token_ids):
            try:
                state.accept(token_id)
            except GrammarFailed as error:
                path = f"{delivered.paths[index]}.token_ids[{position}]"
                raise InvalidField(path, f"is not of the constraint: {error}") from error
    return states


def in_llguidance(source: GrammarSource) -> str:
    """The source in llguidance's form, unchecked. Raises: ValueError (no JSON)."""
    match source.kind:
        case "json_schema":
            return LLMatcher.grammar_from_json_schema(
                source.text, defaults={"whitespace_pattern": _JSON_WHITESPACE}
            )
        case "regex":
            return LLMatcher.grammar_from_regex(source.text)
        case "choice":
            # one terminal: a choice of rules would keep every text as an alternative of the parser
            # escaped to ASCII: a control character as it is ends a terminal
            texts = " | ".join(map(json.dumps, json.loads(source.text)))
            return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {texts}")
        case "lark":
            return LLMatcher.grammar_from_lark(source.text)


class _Cache:
    """The outcomes of the sources that were used last."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._outcomes: OrderedDict[GrammarSource, _Outcome] = OrderedDict()
        self._lock = Lock()

    def get(self, source: GrammarSource) -> _Outcome | None:
        with self._lock:
            outcome = self._outcomes.get(source)
            if outcome is None or (isinstance(outcome, CompiledGrammar) and outcome.is_spent):
                return None
            self._outcomes.move_to_end(source)
            return outcome

    def put(self, source: GrammarSource, outcome: _Outcome) -> None:
        with self._lock:
            self._outcomes[source] = outcome
            self._outcomes.move_to_end(source)
            if len(self._outcomes) > self._size:
                self._outcomes.popitem(last=False)
