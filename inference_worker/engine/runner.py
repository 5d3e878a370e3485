"""The engine's view of a model: run one step over a batch, give one drawn token for each sequence that is whole."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Protocol

from inference_worker.engine.event import Token
from inference_worker.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Row:
    """A sequence's part in one step.

    The runner computes `sequence.token_ids[start:stop]`, where start = sequence.num_computed_tokens, and writes their
    KV to the blocks of `sequence.block_table`, which the scheduler has reserved up to `stop`.
    """

    sequence: Sequence
    num_tokens: int  # at least 1

    @property
    def start(self) -> int:
        return self.sequence.num_computed_tokens

    @property
    def stop(self) -> int:
        return self.sequence.num_computed_tokens + self.num_tokens

    @property
    def is_whole(self) -> bool:
        """Whether every token has its KV after this step, so that the next token can be drawn."""
        return self.stop == len(self.sequence.token_ids)


@dataclass(frozen=True, slots=True)
class RowOutput:
    """What a step gave one row.

    `token` is the drawn token of a whole row and None otherwise. `prompt_logprobs` holds, for a request with
    `output.prompt_logprobs`, one Token for each prompt position start+1 .. min(stop, prompt length - 1), scored by the
    position before it. `error` fails this sequence's request alone; the other fields mean nothing then.
    """

    token: Token | None = None
    prompt_logprobs: tuple[Token, ...] = ()
    error: Exception | None = None


class OutOfMemory(Exception):
    """The device could not allocate what a step needs; the engine runs its rows in smaller steps."""


class DeviceLost(Exception):
    """The device runs nothing any more; no request can be served."""


class Runner(Protocol):
    """A model that runs steps. Called from the engine's thread only."""

    num_blocks: int  # KV blocks; block ids are 0 .. num_blocks - 1
    block_size: int  # tokens in a block

    def execute(self, rows: Rows[Row]) -> list[RowOutput]:
        """Run one step; one output a row, in order.

        Rows of one token whose start is above 0 (decode) stand before all others (prefill chunks). The engine advances
        `num_computed_tokens` after the step, not the runner.

        Raises: OutOfMemory, with nothing lost; DeviceLost; anything else says that one of the rows cannot be run.
        """
        ...

    def close(self) -> None:
        """Release the model's memory. No step follows."""
        ...
