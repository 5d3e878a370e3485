"""The output of a chat, told apart as it streams: reasoning, text, calls of functions.

Whatever is not what its format says stays text, so that nothing the model wrote is lost.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass
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


class ChatOutput:
    """Takes one choice's text apart."""

    def __init__(
        self,
        chat_format: ChatFormat,
        tool_names: frozenset[str],
        *,
        is_reasoning: bool,
        is_parallel: bool = True,
    ) -> None:
        """`tool_names` is empty where no calls are looked for; `is_reasoning` if the prompt has begun to.

        Not `is_parallel`: calls behind the first one are dropped.
        """
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
        return pieces

    def flush(self) -> list[Piece]:
        """The text ends here."""
        pieces: list[Piece] = []
        reasoning, answer = self._reasoning.flush()
        if reasoning:
            pieces.append(Reasoning(reasoning))
        pieces += self._read(self._calls.push(answer))
        pieces += self._read(self._calls.flush())
        return pieces

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
