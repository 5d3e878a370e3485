"""The sum of the first messages of a stream, in the words of a continuation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from protos.sluice.v1 import generation_pb2 as pb

_TOKEN_BYTES: Final = 4
_CHOICE_BYTES: Final = 64  # without its tokens


class DeliveredChoices:
    """One DeliveredChoice for each choice of which anything came. Iterating gives them."""

    def __init__(self, choices: Iterable[pb.DeliveredChoice] = ()) -> None:
        self._choices: dict[int, pb.DeliveredChoice] = {}
        for choice in choices:
            self._choice(choice.choice_index).CopyFrom(choice)

    def __iter__(self) -> Iterator[pb.DeliveredChoice]:
        return iter(self._choices.values())

    @property
    def num_bytes(self) -> int:
        """About what they take."""
        num_tokens = sum(len(choice.token_ids) for choice in self)
        return _CHOICE_BYTES * len(self._choices) + _TOKEN_BYTES * num_tokens

    @property
    def has_tokens(self) -> bool:
        """Whether there are any, or the end of a choice, which may have had none."""
        return any(choice.token_ids or choice.HasField("completion_tokens") for choice in self)

    def copy(self) -> DeliveredChoices:
        """Another one, to add to."""
        return DeliveredChoices(self)

    def add(self, message: pb.GenerateResponse) -> None:
        """Add the message that follows."""
        if message.HasField("delta"):
            self._add_delta(message.delta)
        elif message.HasField("finished"):
            finished = message.finished
            choice = self._choice(finished.choice_index)
            choice.Clear()  # of a choice that is over nothing else counts
            choice.choice_index = finished.choice_index
            choice.completion_tokens = finished.completion_tokens

    def _add_delta(self, delta: pb.Delta) -> None:
        choice = self._choice(delta.choice_index)
        if delta.is_prompt:
            choice.echoed_tokens += delta.token_count
            return
        choice.token_ids.extend(delta.token_ids)
        choice.text_characters += len(delta.text)
        choice.reasoning_characters += len(delta.reasoning)
        for call in delta.tool_calls:
            choice.tool_calls += call.HasField("name")
            choice.argument_characters += len(call.arguments)

    def _choice(self, index: int) -> pb.DeliveredChoice:
        choice = self._choices.get(index)
        if choice is None:
            choice = self._choices[index] = pb.DeliveredChoice(choice_index=index)
        return choice
