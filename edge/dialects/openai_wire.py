"""What both OpenAI routes send alike: chunk frames, usage, finish reasons, errors."""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from edge.dialects.common import shown_bytes, shown_logprob
from edge.dialects.dialect import StreamEncoder, sse_data
from edge.errors import EdgeError, from_finish, server_error
from edge.json_codec import encode
from protos.sluice.v1 import generation_pb2 as pb

DONE = b"data: [DONE]\n\n"
# Stands for the text in a template of an event.
TEXT_MARK = "\x00text\x00"

FINISH_REASONS: dict[pb.FinishReason.ValueType, str] = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_STOP_SEQUENCE: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_TOOL_CALLS: "tool_calls",
}


def finish_reason(finished: pb.Finished) -> str:
    """OpenAI's word for a successful end; raises for any other."""
    reason = FINISH_REASONS.get(finished.finish_reason)
    if reason is None:
        raise from_finish(finished.finish_reason) or server_error()
    return reason


def token_logprobs(delta: pb.Delta) -> list[dict[str, Any]]:
    """Log-probabilities of the tokens of a delta, as chats and responses show them."""
    return [
        _candidate(entry.token) | {"top_logprobs": [_candidate(one) for one in entry.top]}
        for entry in delta.logprobs
    ]


def _candidate(candidate: pb.Candidate) -> dict[str, Any]:
    return {
        "token": shown_bytes(candidate.token),
        "logprob": shown_logprob(candidate),
        "bytes": list(candidate.token),
    }


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


class ChunkEncoder(StreamEncoder):
    """Messages to the events of an OpenAI stream. Choice i of prompt p has index p*n + i."""

    object: ClassVar[str]

    def __init__(
        self,
        generation_id: str,
        sends_usage: bool,
        sends_running_usage: bool,
        has_logprobs: bool,
        prompts: int = 1,
    ) -> None:
        self._frame = ChunkFrame(generation_id, self.object, sends_usage, sends_running_usage)
        self._has_logprobs = has_logprobs
        self._prompts = prompts
        self._n = 1
        # Whether deltas differ in their text alone.
        self._is_plain = not (has_logprobs or sends_running_usage)
        self._templates: list[tuple[bytes, bytes]] = []

    def encode(self, prompt: int, message: pb.GenerateResponse) -> bytes:
        """The events of one message."""
        kind = message.WhichOneof("event")
        if kind == "delta":
            delta = message.delta
            index = prompt * self._n + delta.choice_index
            self._frame.usage.delta(prompt, delta)
            if delta.reasoning or delta.tool_calls:
                return self._told_apart(index, delta)
            if self._is_plain:
                before, after = self._templates[index]
                return before + encode(delta.text) + after
            logprobs = self._logprobs(index, delta) if self._has_logprobs else None
            return self._frame.chunk([self._choice(index, delta.text, logprobs)])
        if kind == "finished":
            finished = message.finished
            self._frame.usage.finished(prompt, finished)
            index = prompt * self._n + finished.choice_index
            choice = self._last_choice(index)
            if self._has_logprobs and (logprobs := self._last_logprobs(index, finished)):
                choice["logprobs"] = logprobs
            return self._frame.chunk([choice | {"finish_reason": finish_reason(finished)}])
        if kind == "started":
            return self._started(prompt, message.started)
        return b""

    def end(self) -> bytes:
        """Usage, if asked for, and the terminator."""
        return self._frame.end()

    def _told_apart(self, index: int, delta: pb.Delta) -> bytes:
        """The chunks of a delta that is not only text; the first has the log-probabilities of its tokens."""
        choices = list(self._other_choices(index, delta))
        if delta.text:
            # reasoning, text, calls
            choices.insert(bool(delta.reasoning), self._choice(index, delta.text, None))
        if self._has_logprobs and choices:
            choices[0]["logprobs"] = self._logprobs(index, delta)
        return b"".join(self._frame.chunk([choice]) for choice in choices)

    def _other_choices(self, index: int, delta: pb.Delta) -> Iterator[dict[str, Any]]:  # noqa: ARG002
        """A choice for each part of a delta that is no text; a chat's alone has such."""
        yield from ()

    def error(self, error: EdgeError) -> bytes:
        """The event of a failure."""
        return self._frame.error(error)

    def _started(self, prompt: int, started: pb.Started) -> bytes:
        self._frame.started(prompt, started)
        self._n = started.n
        indexes = range(prompt * self._n, (prompt + 1) * self._n)
        self._templates += [
            self._frame.split_at_text(self._choice(index, TEXT_MARK, None)) for index in indexes
        ]
        first = (self._first_choice(index, self._n * self._prompts) for index in indexes)
        return b"".join(self._frame.chunk([choice]) for choice in first if choice is not None)

    @abstractmethod
    def _choice(self, index: int, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        """A choice in the chunk of a delta."""

    @abstractmethod
    def _first_choice(self, index: int, choices: int) -> dict[str, Any] | None:
        """A choice as it is first seen, if that is before its first delta; `choices` is how many there are."""

    @abstractmethod
    def _last_choice(self, index: int) -> dict[str, Any]:
        """A choice in the chunk of its finish reason."""

    def _last_logprobs(self, index: int, finished: pb.Finished) -> dict[str, Any] | None:  # noqa: ARG002
        """Log-probabilities in the chunk of its finish reason; of legacy completions alone."""
        return None

    @abstractmethod
    def _logprobs(self, index: int, delta: pb.Delta) -> dict[str, Any]:
        """Log-probabilities of a delta."""
