"""The output of a chat, told apart as it streams: reasoning, text, calls of functions.

Whatever is not what its format says stays text, so that nothing the model wrote is lost.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from inference_worker.chat.call_readers import CallEvent, call_reader
from inference_worker.chat.format import ChatFormat
from inference_worker.chat.reasoning import ReasoningReader

_ID_BYTES: Final = 12


@dataclass(frozen=True, slots=True)
class Reasoning:
    """More of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class Text:
    """More of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class CallPiece:
    """More of one call. The first piece has its id and name."""

    index: int
    arguments: str
    call_id: str | None = None
    name: str | None = None


Piece = Reasoning | Text | CallPiece


@dataclass(slots=True)
class DeliveredOutput:
    """What the reader has of one choice's output, and what of the pieces that follow is therefore left out.

    Wherever a text is cut, its pieces joined are the same: lengths tell how far the reader has come.
    """

    text_characters: int = 0
    reasoning_characters: int = 0
    tool_calls: int = 0
    argument_characters: int = 0  # of all calls

    @property
    def num_characters(self) -> int:
        return self.text_characters + self.reasoning_characters + self.argument_characters

    def __bool__(self) -> bool:
        """Whether there is anything left to leave out."""
        return bool(self.num_characters or self.tool_calls)

    def leave_out(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """What the reader does not have of the pieces from the output's beginning on."""
        for piece in pieces:
            match piece:
                case Text():
                    rest = piece.text[self.text_characters :]
                    self.text_characters -= len(piece.text) - len(rest)
                    if rest:
                        yield Text(rest)
                case Reasoning():
                    rest = piece.text[self.reasoning_characters :]
                    self.reasoning_characters -= len(piece.text) - len(rest)
                    if rest:
                        yield Reasoning(rest)
                case CallPiece():
                    yield from self._leave_out_of_call(piece)

    def _leave_out_of_call(self, piece: CallPiece) -> Iterator[CallPiece]:
        rest = piece.arguments[self.argument_characters :]
        self.argument_characters -= len(piece.arguments) - len(rest)
        if piece.name is None or self.tool_calls == 0:
            if rest or piece.name is not None:
                yield replace(piece, arguments=rest)
            return
        self.tool_calls -= 1
        if rest:
            yield CallPiece(piece.index, rest)


class ChatOutput:
    """Takes one choice's text apart."""

    def __init__(
        self,
        chat_format: ChatFormat,
        tool_names: frozenset[str],
        *,
        is_reasoning: bool,
        is_parallel: bool = True,
        delivered: DeliveredOutput | None = None,
    ) -> None:
        """`tool_names` is empty where no calls are looked for; `is_reasoning` if the prompt has begun to.

        Not `is_parallel`: calls behind the first one are dropped. `delivered` is what the reader has of the pieces;
        they are not given again.
        """
        self._delivered = delivered or DeliveredOutput()
        self._most_calls = None if is_parallel else 1
        self._reasoning = ReasoningReader(
            is_reasoning=is_reasoning, may_begin=chat_format.marks_reasoning
        )
        self._calls = call_reader(chat_format, tool_names)
        self._num_calls = 0
        self._is_dropping = False

    @property
    def has_calls(self) -> bool:
        return self._num_calls > 0

    def push(self, text: str) -> list[Piece]:
        """Take more text, and give what is certain of it."""
        pieces: list[Piece] = []
        reasoning, answer = self._reasoning.push(text)
        if reasoning:
            pieces.append(Reasoning(reasoning))
        pieces += self._read(self._calls.push(answer))
        return self._undelivered(pieces)

    def flush(self) -> list[Piece]:
        """The text ends here."""
        pieces: list[Piece] = []
        reasoning, answer = self._reasoning.flush()
        if reasoning:
            pieces.append(Reasoning(reasoning))
        pieces += self._read(self._calls.push(answer))
        pieces += self._read(self._calls.flush())
        return self._undelivered(pieces)

    def _undelivered(self, pieces: list[Piece]) -> list[Piece]:
        return list(self._delivered.leave_out(pieces)) if self._delivered else pieces

    def _read(self, found: Iterator[str | CallEvent]) -> Iterator[Piece]:
        for one in found:
            if isinstance(one, str):
                if one:
                    yield Text(one)
            elif one.name is not None and self._num_calls == self._most_calls:
                self._is_dropping = True
            elif self._is_dropping:
                pass
            elif one.name is not None:
                self._num_calls += 1
                call_id = f"call_{secrets.token_hex(_ID_BYTES)}"
                yield CallPiece(self._num_calls - 1, one.arguments, call_id, one.name)
            elif one.arguments:
                yield CallPiece(self._num_calls - 1, one.arguments)
