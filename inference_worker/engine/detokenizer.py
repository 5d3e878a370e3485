"""Token ids to text, one token at a time, never a part of a character.

A detokenizer is made anew for each choice. For all ids of a choice, the pushed texts and the flushed rest, joined, are
the decoded whole.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"


class Detokenizer(Protocol):
    """Incremental decoding of one choice."""

    @property
    def is_pending(self) -> bool:
        """Whether bytes of an unfinished character are held back."""
        ...

    def push(self, token_id: int) -> str:
        """Text that this token completes; empty while a character is unfinished."""
        ...

    def flush(self) -> str:
        """The rest. Bytes that make no character become U+FFFD. Nothing is pushed after it."""
        ...


class NewDetokenizer(Protocol):
    """Makes a detokenizer for one choice; `at_start` if its first token begins a text."""

    def __call__(self, *, at_start: bool = ...) -> Detokenizer: ...


class ByteDetokenizer:
    """For tokenizers whose every token is a fixed run of bytes (byte-level BPE, SentencePiece with byte fallback).

    Holds back at most three bytes and costs one table look-up a token. Malformed bytes become U+FFFD by maximal
    subparts (Unicode 16, section 3.9), the same for any split into tokens.
    """

    def __init__(self, token_bytes: Sequence[bytes], *, strip_first_space: bool = False) -> None:
        """`token_bytes[id]` are the bytes a token shows; ids beyond it show nothing."""
        self._token_bytes = token_bytes
        self._strip_first_space = strip_first_space
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def is_pending(self) -> bool:
        return bool(self._decoder.getstate()[0])

    def push(self, token_id: int) -> str:
        if token_id >= len(self._token_bytes):
            return ""
        text = self._decoder.decode(self._token_bytes[token_id])
        if self._strip_first_space and text:
            self._strip_first_space = False
            return text.removeprefix(" ")
        return text

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For tokenizers whose text of a token depends on its neighbours: decodes a short window and takes what is new."""

    MAX_PENDING = 8  # tokens; no character of UTF-8 needs more than four

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._num_context = 0  # tokens at the window's start whose text was already given
        self._context_text = ""

    @property
    def is_pending(self) -> bool:
        return len(self._window) > self._num_context

    def push(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode(self._window)
        is_settled = len(text) > len(self._context_text) and not text.endswith(REPLACEMENT)
        if not is_settled and len(self._window) - self._num_context < self.MAX_PENDING:
            return ""
        return self._advance(text)

    def flush(self) -> str:
        return self._advance(self._decode(self._window)) if self.is_pending else ""

    def _advance(self, text: str) -> str:
        new = text[len(self._context_text) :]
        if (
            new
        ):  # tokens without text say nothing about their neighbours: the context stays what it was
            self._window = self._window[self._num_context :]
        else:
            self._window = self._window[: self._num_context]
        self._num_context = len(self._window)
        self._context_text = self._decode(self._window)
        return new
