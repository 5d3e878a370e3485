"""Tells a model's reasoning apart from its answer."""

from __future__ import annotations

from inference_worker.chat.format import THINK_END, THINK_START
from inference_worker.chat.marks import SPACES, held_length


class ReasoningReader:
    """`<think>` at the very beginning, or before it in the prompt, until `</think>`."""

    def __init__(self, *, is_reasoning: bool, may_begin: bool) -> None:
        self._is_open = is_reasoning
        self._may_begin = may_begin and not is_reasoning
        self._skips_spaces = is_reasoning
        self._held = ""

    def push(self, text: str) -> tuple[str, str]:
        """Reasoning and answer in a text."""
        if not (self._is_open or self._may_begin or self._skips_spaces):
            return "", text
        text, self._held = self._held + text, ""
        if self._may_begin:
            start = text.lstrip(SPACES)
            if THINK_START.startswith(start):
                self._held = text
                return "", ""
            self._may_begin = False
            if not start.startswith(THINK_START):
                return "", text
            self._is_open = self._skips_spaces = True
            text = start.removeprefix(THINK_START)
        if self._is_open:
            return self._push_open(text)
        return "", self._without_spaces(text)

    def flush(self) -> tuple[str, str]:
        """What was held, at the end."""
        held, self._held = self._held, ""
        return (held, "") if self._is_open else ("", held)

    def _push_open(self, text: str) -> tuple[str, str]:
        text = self._without_spaces(text)
        reasoning, mark, answer = text.partition(THINK_END)
        if not mark:
            # spaces before the mark belong to neither
            kept = len(text) - held_length(text, THINK_END)
            kept = len(text[:kept].rstrip(SPACES))
            self._held = text[kept:]
            return text[:kept], ""
        self._is_open = False
        self._skips_spaces = True
        return reasoning.rstrip(SPACES), self._without_spaces(answer)

    def _without_spaces(self, text: str) -> str:
        if self._skips_spaces:
            text = text.lstrip(SPACES)
            self._skips_spaces = not text
        return text
