"""A request while the engine works on it: its sequences, and the counts and times that its last message reports."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

from inference_worker.engine.event import Timings, Token, Usage
from inference_worker.engine.observer import Phase
from inference_worker.engine.request import Request
from inference_worker.engine.sequence import Sequence
from inference_worker.engine.stop_strings import StopString


@dataclass(eq=False, slots=True)
class LiveRequest:
    """The leader (the first choice that is not over) computes the prompt; its siblings join when that is done, and
    share the blocks.
    """

    request: Request
    stop_strings: tuple[StopString, ...] = ()
    sequences: list[Sequence] = field(default_factory=list)  # unfinished ones, the leader first
    unbegun: deque[int] = field(default_factory=deque)  # choices that had no sequence yet, in order
    num_choices_left: int = 0  # choices not yet finished, those not yet begun included
    scored_prompt: list[Token] = field(default_factory=list)  # with output.prompt_logprobs
    num_completion_tokens: int = 0
    num_cached_tokens: int = 0
    scheduled_at: float | None = None
    first_token_at: float | None = None

    def __post_init__(self) -> None:
        finished = self.request.continuation.finished
        self.unbegun.extend(i for i in range(self.request.n) if i not in finished)
        self.num_choices_left = len(self.unbegun)
        self.num_completion_tokens = self.request.continuation.num_tokens
        self.stop_strings = tuple(map(StopString, self.request.stopping.stop_sequences))

    @property
    def phase(self) -> Phase:
        """How far it came."""
        if self.first_token_at is not None:
            return Phase.DECODE
        return Phase.QUEUED if self.scheduled_at is None else Phase.PREFILL

    @property
    def has_tokens(self) -> bool:
        """Whether its reader may have any: also one that has not reached the model may go on after some."""
        return self.first_token_at is not None or self.request.continuation.has_tokens

    def prompt_tokens(self) -> list[Token]:
        """The prompt, scored if that was asked for. Complete once the leader has computed it."""
        if not self.request.output.prompt_logprobs:
            return [Token(token_id) for token_id in self.request.prompt]
        return [Token(self.request.prompt[0]), *self.scored_prompt]

    def add_prompt_scores(self, start: int, scores: tuple[Token, ...]) -> None:
        """Add scores of positions start+1 and on; those known from before a preemption are left as they are."""
        known = len(self.scored_prompt) - start
        self.scored_prompt.extend(scores[max(known, 0) :])

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=len(self.request.prompt),
            completion_tokens=self.num_completion_tokens,
            cached_tokens=self.num_cached_tokens,
        )

    def timings(self) -> Timings:
        """Seconds of each phase up to now, the request's last moment."""
        now = time.monotonic()
        scheduled = now if self.scheduled_at is None else self.scheduled_at
        first_token = now if self.first_token_at is None else self.first_token_at
        return Timings(
            queued=scheduled - self.request.admitted_at,
            prefill=first_token - scheduled,
            decode=now - first_token,
            time_to_first_token=0.0
            if self.first_token_at is None
            else first_token - self.request.admitted_at,
        )
