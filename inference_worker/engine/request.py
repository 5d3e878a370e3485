"""What a caller asks of the engine. Every default of the wire contract is resolved before these are made."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from inference_worker.engine.continuation import Continuation
from inference_worker.engine.fair_queue import Share
from inference_worker.engine.grammar import Grammar, GrammarState


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn. The ranges are those of the wire contract and are checked by the service."""

    temperature: float = 1.0  # 0 is greedy
    top_k: int | None = None  # None keeps all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    seed: int = 0  # any 64-bit value

    @property
    def has_penalties(self) -> bool:
        """Whether the tokens so far change the logits."""
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty)


@dataclass(frozen=True, slots=True)
class StoppingParams:
    """When a choice ends."""

    max_tokens: int  # 0 only for an echoed prompt
    stop_sequences: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = (
        frozenset()
    )  # the end-of-sequence tokens included, if they count


@dataclass(frozen=True, slots=True)
class OutputParams:
    """What the deltas carry besides text."""

    logprobs: int | None = None  # None: off; k: the drawn token and the k likeliest
    echo: bool = False
    prompt_logprobs: bool = False  # only with echo and logprobs


_next_key = itertools.count().__next__


@dataclass(frozen=True, slots=True)
class Request:
    """One generation: `n` choices from one prompt."""

    request_id: str  # the caller's name for it; an ended request's may come again
    prompt: tuple[int, ...]  # token ids, at least one
    stopping: StoppingParams
    sampling: SamplingParams = field(default_factory=SamplingParams)
    output: OutputParams = field(default_factory=OutputParams)
    n: int = 1
    continuation: Continuation = field(default_factory=Continuation)
    is_continuable: bool = False  # whether its reader goes on at another engine after a shutdown
    grammar: Grammar | None = None  # what the completion of each choice belongs to
    share: Share = field(default_factory=Share)  # of the engine, while others wait too
    deadline: float | None = None  # in time.monotonic's seconds: it ends then, with what it has
    admitted_at: float = field(default_factory=time.monotonic)  # start of the request's timings
    # Tells this request from every other of the process, also from an earlier one of the same id that is only just
    # leaving: what is still on its way for that one must not reach this one.
    key: int = field(default_factory=_next_key)

    def with_grammar(self, grammar: Grammar, states: Mapping[int, GrammarState]) -> Request:
        """The same request, kept to a grammar; `states` are those of the choices that are continued."""
        continued = {
            index: replace(choice, grammar=states[index])
            for index, choice in self.continuation.continued.items()
        }
        continuation = replace(self.continuation, continued=MappingProxyType(continued))
        return replace(self, grammar=grammar, continuation=continuation)
