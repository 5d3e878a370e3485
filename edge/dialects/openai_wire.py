"""What both OpenAI routes send alike: chunk frames, usage, finish reasons, errors."""

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from edge.dialects.dialect import sse_data
from edge.errors import EdgeError, from_finish, server_error
from edge.json_codec import encode
from protos.sluice.v1 import generation_pb2 as pb

DONE = b"data: [DONE]\n\n"
# Stands for the text in a template of an event.
TEXT_MARK = "\x00text\x00"
# JSON has no minus infinity; this is what OpenAI sends for it.
LOWEST_LOGPROB = -9999.0

FINISH_REASONS: dict[pb.FinishReason.ValueType, str] = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_STOP_SEQUENCE: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_TOOL_CALLS: "tool_calls",
}


def new_id(prefix: str) -> str:
    """An id that the worker takes and nobody guesses."""
    return f"{prefix}-{uuid.uuid4().hex}"


def finish_reason(finished: pb.Finished) -> str:
    """OpenAI's word for a successful end; raises for any other."""
    reason = FINISH_REASONS.get(finished.finish_reason)
    if reason is None:
        raise from_finish(finished.finish_reason) or server_error()
    return reason


def shown_bytes(token: bytes) -> str:
    """A token's bytes as text; those that make no character are shown as \\xNN."""
    return token.decode("utf-8", "backslashreplace")


def shown_logprob(candidate: pb.Candidate) -> float | None:
    """A log-probability that JSON can hold; None where nothing precedes the token."""
    if not candidate.HasField("logprob"):
        return None
    return max(candidate.logprob, LOWEST_LOGPROB)


@dataclass
class UsageCount:
    """Token counts of one answer, over all its prompts and choices."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    # Running counts of prompts whose final figures are not there yet.
    _running: dict[int, int] = field(default_factory=dict)
    _cached: dict[int, int] = field(default_factory=dict)

    def started(self, prompt: int, started: pb.Started) -> None:
        """Counts a prompt."""
        self.prompt_tokens += started.prompt_tokens
        self.cached_tokens += started.cached_tokens
        self._running[prompt] = 0
        self._cached[prompt] = started.cached_tokens

    def delta(self, prompt: int, delta: pb.Delta) -> None:
        """Counts the tokens of a delta."""
        if not delta.is_prompt:
            self._running[prompt] += delta.token_count
            self.completion_tokens += delta.token_count

    def finished(self, prompt: int, finished: pb.Finished) -> None:
        """Takes over the worker's final figures."""
        if finished.HasField("usage"):
            self.completion_tokens += finished.usage.completion_tokens - self._running[prompt]
            self._running[prompt] = finished.usage.completion_tokens
            self.cached_tokens += finished.usage.cached_tokens - self._cached.pop(prompt, 0)

    def as_json(self) -> dict[str, Any]:
        """OpenAI's usage object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass
class ChunkFrame:
    """The fields around the choices of every chunk of one stream."""

    generation_id: str
    object: str
    sends_usage: bool
    sends_running_usage: bool
    model: str = ""
    created: int = 0
    usage: UsageCount = field(default_factory=UsageCount)

    def started(self, prompt: int, started: pb.Started) -> None:
        """Takes what the worker said of the request."""
        self.model = started.model
        self.created = started.created_at.seconds
        self.usage.started(prompt, started)

    def chunk(self, choices: list[dict[str, Any]]) -> bytes:
        """One event."""
        chunk: dict[str, Any] = {
            "id": self.generation_id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }
        if self.sends_usage:
            shows = self.sends_running_usage or not choices
            chunk["usage"] = self.usage.as_json() if shows else None
        return sse_data(encode(chunk))

    def split_at_text(self, choice: dict[str, Any]) -> tuple[bytes, bytes]:
        """The event of a choice whose text is TEXT_MARK, before and after the JSON of that text.

        Nearly all events of a stream differ in their text alone; this way only the text is encoded for each.
        """
        before, _, after = self.chunk([choice]).rpartition(encode(TEXT_MARK))
        return before, after

    def end(self) -> bytes:
        """The usage chunk, if asked for, and the terminator."""
        return (self.chunk([]) if self.sends_usage else b"") + DONE

    @staticmethod
    def error(error: EdgeError) -> bytes:
        """The event of a failure; no terminator follows."""
        return sse_data(encode(error.body()))


def field_names(table: dict[str, str]) -> Callable[[str], str]:
    """Translates paths of the worker's contract: by the longest prefix in the table, else by the last part."""

    def name(path: str) -> str:
        prefix = path
        while prefix:
            if prefix in table:
                return table[prefix] + path[len(prefix) :]
            prefix = prefix[: max(prefix.rfind("."), prefix.rfind("["), 0)]
        return path.rsplit(".", 1)[-1]

    return name
