"""What the reader has of a request that another engine began, and the outputs brought up to that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from inference_worker.engine.choice_output import ChoiceOutput
from inference_worker.engine.event import Token
from inference_worker.engine.grammar import GrammarState


class StopSequenceDelivered(ValueError):
    """The delivered tokens spell a stop sequence: the choice had ended before."""


@dataclass(frozen=True, slots=True)
class Delivered:
    """What the reader has of a choice that is not over."""

    token_ids: tuple[int, ...] = ()  # of the completion
    num_characters: int = 0  # of its text; may exceed what the tokens spell by a part of the next
    num_echoed: int = 0  # tokens of the prompt; all of them where there are completion tokens


@dataclass(frozen=True, slots=True)
class Continued:
    """A choice that goes on. What it holds belongs to the sequence that takes it over, and serves once."""

    token_ids: tuple[int, ...]
    num_echoed: int
    output: ChoiceOutput
    grammar: GrammarState | None = None  # that has accepted the tokens


@dataclass(frozen=True, slots=True)
class Continuation:
    """A request's choices as another engine left them. A choice that is not named was not begun."""

    continued: Mapping[int, Continued] = field(default_factory=lambda: MappingProxyType({}))
    finished: Mapping[int, int] = field(  # completion tokens of the choices that are over
        default_factory=lambda: MappingProxyType({})
    )

    @property
    def num_tokens(self) -> int:
        """Completion tokens that the request brings with it."""
        continued = sum(len(choice.token_ids) for choice in self.continued.values())
        return continued + sum(self.finished.values())

    @property
    def has_tokens(self) -> bool:
        """Whether the reader has any, or the end of a choice, which may have had none."""
        return bool(self.finished) or self.num_tokens > 0


def continue_choice(
    output: ChoiceOutput, delivered: Delivered, prompt: Sequence[int], *, is_echoed: bool
) -> Continued:
    """Bring a new choice's output up to what was delivered.

    `is_echoed`: the request echoes its prompt. Takes time in proportion to the tokens; no engine waits for it.

    Raises: StopSequenceDelivered.
    """
    if is_echoed and delivered.num_echoed == len(prompt):
        for _nothing_left in output.echo([Token(i) for i in prompt], len(prompt)):
            pass
    output.replay(delivered.token_ids, delivered.num_characters)
    if output.stop_sequence is not None:
        raise StopSequenceDelivered(output.stop_sequence)
    return Continued(delivered.token_ids, delivered.num_echoed, output)
