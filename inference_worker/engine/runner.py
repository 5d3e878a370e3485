"""The engine's view of a model: run one step over a batch, give one drawn token for each sequence that is whole."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Protocol

from inference_worker.engine.event import Token
from inference_worker.engine.sequence import Sequence


class Row:
    """A sequence's part in one step, fixed when it is made: `token_ids[start:stop]` of the sequence.

    The runner computes these tokens and writes their KV to the blocks of `sequence.block_table`, which the scheduler
    has reserved up to `stop`. `start` is what had been computed, or was being computed, before. Where `start` is the
    length of `token_ids`, the row's only token is the one that the step before draws, which the host has not read yet.
    """

    __slots__ = ("is_whole", "num_tokens", "sequence", "start", "stop")

    def __init__(self, sequence: Sequence, num_tokens: int) -> None:
        """The next `num_tokens` tokens, at least 1."""
        self.sequence = sequence
        self.num_tokens = num_tokens
        self.start = sequence.num_computed_tokens
        self.stop = self.start + num_tokens
        # whether every token has its KV after this step, so that the next token can be drawn
        self.is_whole = num_tokens == sequence.num_uncomputed_tokens


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
    """The device could not allocate what a step needs; the engine runs its rows in smaller steps, a bounded number of
    times, and ends what finds no memory even alone with PREEMPTED.
    """


class DeviceLost(Exception):
    """The device runs nothing any more; no request can be served."""


class InFlight(Protocol):
    """A step that was launched."""

    def collect(self) -> list[RowOutput]:
        """Wait for the step; one output a row, in order. Called once, in the order of the launches.

        Raises: as `Runner.launch` does.
        """
        ...


class Runner(Protocol):
    """A model that runs steps. Called from the engine's thread only."""

    num_blocks: int  # KV blocks; block ids are 0 .. num_blocks - 1
    block_size: int  # tokens in a block
    # Whether launching costs less than the step takes, so that the next step is launched before this one is collected.
    # It then takes what this one draws from where it lies on the device.
    runs_ahead: bool

    def launch(self, rows: Rows[Row]) -> InFlight:
        """Begin a step.

        Rows of one token whose start is above 0 (decode) stand before all others (prefill chunks). Steps take effect
        in the order of their launches: what one writes to a block, the next one reads or overwrites. At most one other
        step is in flight. What a row says of itself holds until the step is collected; its sequence may be longer by
        then, or finished and without blocks.

        Raises: OutOfMemory, with nothing lost; DeviceLost; anything else says that one of the rows cannot be run.
        """
        ...

    def close(self) -> None:
        """Release the model's memory. No step follows."""
        ...


class SynchronousRunner(ABC):
    """A runner whose steps are over when they have been launched."""

    runs_ahead = False

    def launch(self, rows: Rows[Row]) -> InFlight:
        """See Runner."""
        return _Done(self.execute(rows))

    @abstractmethod
    def execute(self, rows: Rows[Row]) -> list[RowOutput]:
        """Run one step; one output a row, in order. Raises: as `Runner.launch` does."""


@dataclass(frozen=True, slots=True)
class _Done:
    outputs: list[RowOutput]

    def collect(self) -> list[RowOutput]:
        return self.outputs
