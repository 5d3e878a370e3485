"""Reads what another worker delivered of a request, checks that it can have, and brings the choices up to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from inference_worker.chat.output import DeliveredOutput
from inference_worker.engine.choice_output import ChoiceOutput
from inference_worker.engine.continuation import (
    Continuation,
    Continued,
    Delivered,
    StopSequenceDelivered,
    continue_choice,
)
from inference_worker.engine.detokenizer import NewDetokenizer
from inference_worker.engine.stop_strings import StopString
from inference_worker.errors import InvalidField
from inference_worker.field_rules import refuse_unknown_fields
from protos.sluice.v1 import generation_pb2 as pb

_PATH: Final = "continuation.choices"
# Text can be delivered before its token; no vocabulary known has a token whose text is longer.
_MAX_CHARACTERS_AHEAD: Final = 4096
_MAX_SEQUENCE_NUMBER: Final = 2**63  # far from where the contract's numbers end
# What there is besides text where the output is told apart.
_TOLD_APART: Final = ("reasoning_characters", "tool_calls", "argument_characters")


@dataclass(frozen=True, slots=True)
class DeliveredRequest:
    """What the caller has of a request, by choice; nothing of those that are not named."""

    running: Mapping[int, Delivered]
    finished: Mapping[int, int]  # completion tokens
    paths: Mapping[int, str]  # where each choice stands in the message
    outputs: Mapping[int, DeliveredOutput]  # of the running ones

    @property
    def num_tokens(self) -> int:
        """Tokens that have to be computed again."""
        return sum(len(choice.token_ids) for choice in self.running.values())

    @property
    def num_tokens_in_usage(self) -> int:
        """Completion tokens that the first worker made."""
        return self.num_tokens + sum(self.finished.values())

    def num_tokens_of(self, choice_index: int) -> int:
        """Completion tokens of a choice that is not over."""
        choice = self.running.get(choice_index)
        return 0 if choice is None else len(choice.token_ids)

    def to_engine(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        is_echoed: bool,
        stop_sequences: Sequence[str],
        new_detokenizer: NewDetokenizer,
        n: int,
    ) -> tuple[Continuation, bool]:
        """The engine's form of it, and whether any of the prompt's echo is still to be sent.

        Raises: InvalidField.
        """
        if not self.paths:
            return Continuation(), is_echoed
        automata = tuple(map(StopString, stop_sequences))
        continued: dict[int, Continued] = {}
        for index, delivered in self.running.items():
            path = self.paths[index]
            _check_against_prompt(path, delivered, len(prompt), max_tokens, is_echoed)
            output = ChoiceOutput(index, new_detokenizer(at_start=is_echoed), automata)
            try:
                continued[index] = continue_choice(output, delivered, prompt, is_echoed=is_echoed)
            except StopSequenceDelivered as stop:
                raise InvalidField(
                    f"{path}.token_ids",
                    f"spell the stop sequence {str(stop)!r}: the choice is over",
                ) from stop
            num_characters = self.outputs[index].num_characters
            if num_characters > output.num_decoded + _MAX_CHARACTERS_AHEAD:
                raise InvalidField(
                    f"{path}.text_characters",
                    f"{num_characters} is more than the tokens, which spell "
                    f"{output.num_decoded}, and one more can have",
                )
        echoed = [self.running[i].num_echoed if i in self.running else 0 for i in self._open(n)]
        return Continuation(continued, self.finished), is_echoed and min(echoed) < len(prompt)

    def _open(self, n: int) -> list[int]:
        return [index for index in range(n) if index not in self.finished]


def read_continuation(
    message: pb.Continuation,
    n: int,
    *,
    max_tokens: int,
    vocabulary_size: int,
    stop_token_ids: frozenset[int],
    is_told_apart: bool,
) -> DeliveredRequest:
    """Check everything that can be checked without the prompt's tokens.

    `is_told_apart`: there may be more in the output than text. `max_tokens` is what was asked for, or all that ever
    fit.

    Raises: InvalidField, UnsupportedField.
    """
    refuse_unknown_fields(message, "continuation")
    if message.sequence_number > _MAX_SEQUENCE_NUMBER:
        raise InvalidField(
            "continuation.sequence_number", f"must be at most {_MAX_SEQUENCE_NUMBER}"
        )
    running: dict[int, Delivered] = {}
    finished: dict[int, int] = {}
    paths: dict[int, str] = {}
    outputs: dict[int, DeliveredOutput] = {}
    for position, choice in enumerate(message.choices):
        path = f"{_PATH}[{position}]"
        refuse_unknown_fields(choice, path)
        index = choice.choice_index
        if index >= n:
            raise InvalidField(
                f"{path}.choice_index", f"must be below n, which is {n}, got {index}"
            )
        if index in paths:
            raise InvalidField(f"{path}.choice_index", f"{index} comes twice")
        paths[index] = path
        if choice.HasField("completion_tokens"):
            finished[index] = _read_finished(path, choice, max_tokens)
        else:
            _check_length(path, len(choice.token_ids), max_tokens)
            _check_tokens(path, choice.token_ids, vocabulary_size, stop_token_ids)
            running[index], output = _read_running(path, choice, is_told_apart)
            outputs[index] = output
    if len(finished) == n:
        raise InvalidField(_PATH, "all choices are over: nothing is left to generate")
    return DeliveredRequest(running, finished, paths, outputs)


def _read_running(
    path: str, choice: pb.DeliveredChoice, is_told_apart: bool
) -> tuple[Delivered, DeliveredOutput]:
    """For the engine, which knows text alone, and for who tells that apart, who then needs all of it again."""
    output = DeliveredOutput(
        choice.text_characters,
        choice.reasoning_characters,
        choice.tool_calls,
        choice.argument_characters,
    )
    if not is_told_apart:
        for name in _TOLD_APART:
            if getattr(choice, name):
                raise InvalidField(f"{path}.{name}", "there is none in the output of this request")
    num_characters = 0 if is_told_apart else choice.text_characters
    return Delivered(tuple(choice.token_ids), num_characters, choice.echoed_tokens), output


def _read_finished(path: str, choice: pb.DeliveredChoice, max_tokens: int) -> int:
    others = (choice.token_ids, choice.text_characters, choice.echoed_tokens)
    if any(others) or any(getattr(choice, name) for name in _TOLD_APART):
        raise InvalidField(f"{path}.completion_tokens", "stands alone, for a choice that is over")
    if choice.completion_tokens > max_tokens:
        raise InvalidField(
            f"{path}.completion_tokens",
            f"{choice.completion_tokens} is more than max_tokens, {max_tokens}",
        )
    return choice.completion_tokens


def _check_length(path: str, num_tokens: int, max_tokens: int) -> None:
    if num_tokens > max_tokens:
        raise InvalidField(
            f"{path}.token_ids", f"{num_tokens} are more than max_tokens, {max_tokens}"
        )


def _check_tokens(
    path: str, token_ids: Sequence[int], vocabulary_size: int, stop_token_ids: frozenset[int]
) -> None:
    if token_ids and (highest := max(token_ids)) >= vocabulary_size:
        where = f"{path}.token_ids[{list(token_ids).index(highest)}]"
        raise InvalidField(
            where, f"{highest} is outside the vocabulary of {vocabulary_size} tokens"
        )
    if not stop_token_ids.isdisjoint(token_ids):
        index = next(i for i, token_id in enumerate(token_ids) if token_id in stop_token_ids)
        raise InvalidField(
            f"{path}.token_ids[{index}]", f"{token_ids[index]} is a stop token: the choice is over"
        )


def _check_against_prompt(
    path: str, delivered: Delivered, num_prompt_tokens: int, max_tokens: int, is_echoed: bool
) -> None:
    _check_length(path, len(delivered.token_ids), max_tokens)
    most = num_prompt_tokens if is_echoed else 0
    if delivered.num_echoed > most:
        raise InvalidField(
            f"{path}.echoed_tokens", f"must be at most {most}, got {delivered.num_echoed}"
        )
    has_more = bool(delivered.token_ids or delivered.num_characters)
    if is_echoed and has_more and delivered.num_echoed < most:
        raise InvalidField(
            f"{path}.echoed_tokens",
            f"must be {most}, all of the prompt's tokens, before a completion begins, "
            f"got {delivered.num_echoed}",
        )
