"""One choice of a request while the engine works on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from inference_worker.engine.choice_output import ChoiceOutput
from inference_worker.engine.grammar import GrammarState
from inference_worker.engine.request import Request


class State(Enum):
    """WAITING -> RUNNING -> FINISHED, and back from RUNNING to WAITING on preemption."""

    WAITING = auto()  # holds no blocks
    RUNNING = auto()  # holds blocks and takes part in steps
    FINISHED = auto()  # holds no blocks and never runs again


@dataclass(eq=False, slots=True)
class Sequence:
    """Tokens, their KV blocks, and the output made of them.

    A step counts from its launch on: what it computes is computed, what it draws is pending until it is read back.

    Invariants: `num_computed_tokens <= len(token_ids) + num_pending_tokens`; the block table covers at least the
    computed tokens; a block shared with another sequence is full and is never written again.
    """

    request: Request
    choice_index: int
    output: ChoiceOutput
    token_ids: list[int]  # prompt, then completion
    max_tokens: int  # prompt and completion, at which the sequence ends
    is_leader: bool = True  # the first choice to run: it computes the prompt for the others
    num_echoed: int = 0  # prompt tokens that the reader has, if the request echoes its prompt
    most_tokens_of_step: int = 2**31  # less once the device lacked memory for a step of more
    # since its latest token, by a device that lacked memory for a step of this sequence alone
    num_times_refused: int = 0
    has_drawn: bool = False  # whether this engine drew a token for it
    grammar: GrammarState | None = None  # has accepted the completion so far
    cache_salt: bytes = b""  # only sequences of the same salt share blocks
    state: State = State.WAITING
    num_computed_tokens: int = 0  # tokens whose KV is in the cache
    num_pending_tokens: int = 0  # tokens drawn by steps in flight, which follow token_ids
    num_charged_tokens: int = 0  # tokens that its key was charged for
    num_cached_tokens: int = 0  # prompt tokens that came from the prefix cache when it first ran
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(
        default_factory=list
    )  # of the full blocks of token_ids, as far as known

    @property
    def must_compute_prompt(self) -> bool:
        """Whether every position of the prompt has to give logits: the leader of a request that wants them scored."""
        return self.request.output.prompt_logprobs and self.is_leader

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt)

    @property
    def num_completion_tokens(self) -> int:
        return len(self.token_ids) - len(self.request.prompt)

    @property
    def is_full(self) -> bool:
        """Whether no token may follow."""
        return len(self.token_ids) >= self.max_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) + self.num_pending_tokens - self.num_computed_tokens

    @property
    def num_drawn_tokens(self) -> int:
        """Completion tokens, the pending ones included: the position of the next one in the completion."""
        return self.num_completion_tokens + self.num_pending_tokens

    @property
    def is_ending(self) -> bool:
        """Whether its last token is pending, so that it needs no further step."""
        return (
            self.num_pending_tokens > 0
            and len(self.token_ids) + self.num_pending_tokens >= self.max_tokens
        )

    @property
    def is_spoken(self) -> bool:
        """Whether its grammar leaves nothing to say."""
        return self.grammar is not None and self.grammar.is_complete

    @property
    def must_know_last_token(self) -> bool:
        """Whether the next token's distribution is made by the host from the tokens before it."""
        return self.request.sampling.has_penalties or self.grammar is not None
