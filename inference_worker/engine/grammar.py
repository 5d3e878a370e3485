"""The engine's view of a grammar: which tokens may come next in one choice, and what the choice said so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol


class GrammarFailed(Exception):
    """A choice cannot go on within its grammar; the text is for the caller."""


class GrammarState(Protocol):
    """Where one choice stands. It belongs to the choice alone, and outlives a preemption."""

    @property
    def is_complete(self) -> bool:
        """Whether the text is whole and nothing can follow it."""
        ...

    def accept(self, token_id: int) -> None:
        """Go on by a drawn token that is no stop token. Raises: GrammarFailed, if it may not come here."""
        ...


@dataclass(frozen=True, slots=True)
class Masks:
    """The tokens that may come next in each of several choices.

    `bits` holds one row a choice, all of the same length: bit i of a row, counted from the least significant of its
    first byte, says whether token i may come. A row in `failures` means nothing: that choice cannot go on.
    """

    bits: bytes
    failures: dict[int, Exception] = field(default_factory=dict)  # by row


class Grammar(Protocol):
    """A compiled grammar, shared by all choices that obey it."""

    def start(self, stop_token_ids: frozenset[int]) -> GrammarState:
        """The state before a choice's first token. Its masks allow the stop tokens where the text is whole, only there.

        Raises: GrammarFailed.
        """
        ...

    def masks(self, states: Sequence[GrammarState]) -> Masks:
        """What may come next in each of the states, which may be of any grammar of the same model."""
        ...
