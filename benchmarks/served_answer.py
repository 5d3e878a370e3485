"""One answer of a server as a reader saw it: when its text came, how many tokens it was, and whether it was whole."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from benchmarks.sse_client import Answer


@dataclass(frozen=True)
class Objective:
    """A latency that a reader is content with, in seconds."""

    first_token: float | None = None
    gap: float | None = None  # between tokens, on average over the answer


@dataclass(frozen=True)
class ServedAnswer:
    """A whole answer, or a failure."""

    began_at: float
    ended_at: float
    failure: str | None
    text_times: tuple[float, ...]  # of each event with text
    tokens: int
    is_counted: bool  # whether the server told the number of tokens; else it is the number of events with text
    prompt_tokens: int | None
    cached_tokens: int | None
    text: str

    @property
    def time_to_first_token(self) -> float:
        return self.text_times[0] - self.began_at

    @property
    def gaps(self) -> list[float]:
        """Seconds between events with text."""
        return [after - before for before, after in pairwise(self.text_times)]

    @property
    def seconds_per_token(self) -> float:
        """The average after the first token."""
        return (self.text_times[-1] - self.text_times[0]) / max(1, self.tokens - 1)

    def meets(self, objective: Objective) -> bool:
        """Whether its reader was content; nobody is with a failure."""
        if self.failure is not None:
            return False
        if objective.first_token is not None and self.time_to_first_token > objective.first_token:
            return False
        return objective.gap is None or self.seconds_per_token <= objective.gap


def read(answer: Answer) -> ServedAnswer:
    """Look at what came: an answer in several events, or in one body."""
    failure = answer.failure
    texts: list[tuple[float, str]] = []
    usage: dict[str, Any] = {}
    try:
        for moment, chunk in answer.chunks():
            if "error" in chunk:
                failure = failure or "error event"
            usage = chunk.get("usage") or usage
            if text := "".join(map(_text, chunk.get("choices") or ())):
                texts.append((moment, text))
    except (json.JSONDecodeError, AttributeError, TypeError):
        failure = failure or "no JSON"
    if not texts:
        failure = failure or "no text"
    counted = usage.get("completion_tokens")
    details = usage.get("prompt_tokens_details") or {}
    return ServedAnswer(
        began_at=answer.began_at,
        ended_at=answer.ended_at,
        failure=failure,
        text_times=tuple(moment for moment, _ in texts),
        tokens=len(texts) if counted is None else counted,
        is_counted=counted is not None,
        prompt_tokens=usage.get("prompt_tokens"),
        cached_tokens=details.get("cached_tokens"),
        text="".join(text for _, text in texts),
    )


def _text(choice: dict[str, Any]) -> str:
    """The text of a choice, of a chat or a completion, streamed or not; thoughts count as text."""
    message = choice.get("delta") or choice.get("message") or {}
    thought = message.get("reasoning_content") or message.get("reasoning") or ""
    return f"{thought}{message.get('content') or choice.get('text') or ''}"
