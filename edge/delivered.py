"""What was delivered of a stream: enough for another worker to go on with it."""

from collections.abc import Iterable, Iterator
from typing import Self

from protos.sluice.v1 import generation_pb2 as pb


class Delivered:
    """The messages of one stream that have been read, whichever workers they came from.

    Remembers at most `max_tokens`; of a longer stream nothing, and there is no going on with it.
    """

    def __init__(
        self,
        started: pb.Started,
        max_tokens: int,
        choices: Iterable[pb.DeliveredChoice] = (),
        sequence_number: int | None = 0,
    ) -> None:
        """`choices` is the sum of all messages up to this number; None is before the header."""
        self._started = started
        self._max_tokens = max_tokens
        self._sequence_number = sequence_number
        self._choices = {choice.choice_index: choice for choice in choices}
        self._num_tokens = sum(len(choice.token_ids) for choice in self._choices.values())
        self.is_whole = False  # the last message has been read

    @classmethod
    def before(cls, resume: pb.Resume, resumed: pb.Resumed, max_tokens: int) -> Self:
        """What who resumes a stream has of it."""
        number = resume.after_sequence_number if resume.HasField("after_sequence_number") else None
        return cls(resumed.started, max_tokens, resumed.choices, number)

    @property
    def sequence_number(self) -> int:
        """Of the last message."""
        return self._sequence_number or 0

    @property
    def is_begun(self) -> bool:
        """Whether the header has been read."""
        return self._sequence_number is not None

    @property
    def is_too_long(self) -> bool:
        """Whether it is more than is remembered."""
        return self._num_tokens > self._max_tokens

    def take(self, message: pb.GenerateResponse) -> None:
        """Adds the next message."""
        self._sequence_number = message.sequence_number
        if message.HasField("delta"):
            self._take_delta(message.delta)
        elif message.HasField("finished"):
            finished = message.finished
            self._choices[finished.choice_index] = pb.DeliveredChoice(
                choice_index=finished.choice_index, completion_tokens=finished.completion_tokens
            )
            self.is_whole = finished.HasField("usage")

    @property
    def has_tokens(self) -> bool:
        """Whether any token has been read, and what was read is still known."""
        return not self.is_too_long and any(
            choice.token_ids or choice.HasField("completion_tokens")
            for choice in self._choices.values()
        )

    def footers(self, reason: pb.FinishReason.ValueType) -> Iterator[pb.GenerateResponse]:
        """The last messages of a stream that nobody goes on with."""
        indexes = range(self._started.n)
        choices = [self._choices.get(index) or pb.DeliveredChoice() for index in indexes]
        num_tokens = [choice.completion_tokens or len(choice.token_ids) for choice in choices]
        running = [i for i in indexes if not choices[i].HasField("completion_tokens")]
        for index in running:
            message = pb.GenerateResponse(sequence_number=self.sequence_number + 1)
            finished = message.finished
            finished.choice_index = index
            finished.finish_reason = reason
            finished.completion_tokens = num_tokens[index]
            if index == running[-1]:
                finished.usage.prompt_tokens = self._started.prompt_tokens
                finished.usage.cached_tokens = self._started.cached_tokens
                finished.usage.completion_tokens = sum(num_tokens)
            self.take(message)
            yield message

    def header(self, annotation: bytes) -> pb.GenerateResponse:
        """The header, for who has not read it."""
        self._sequence_number = 0
        message = pb.GenerateResponse(started=self._started)
        if annotation:
            message.started.annotation = annotation
        return message

    def rest_of(self, request: pb.GenerateRequest) -> pb.GenerateRequest:
        """The request for what is missing, made from the one that began the stream."""
        started = self._started
        rest = pb.GenerateRequest()
        rest.CopyFrom(request)
        rest.request_id = started.request_id
        rest.sampling.CopyFrom(started.sampling)
        rest.stopping.max_tokens = started.max_tokens
        rest.n = started.n
        rest.continuation.SetInParent()
        rest.continuation.choices.extend(self._choices.values())
        rest.continuation.sequence_number = self.sequence_number
        if request.HasField("resume_window") and started.HasField("resume_id"):
            rest.continuation.resume_id = started.resume_id
        return rest

    def _take_delta(self, delta: pb.Delta) -> None:
        if not delta.is_prompt:
            self._num_tokens += len(delta.token_ids)
        if self.is_too_long:
            self._choices.clear()
            return
        choice = self._choices.get(delta.choice_index)
        if choice is None:
            choice = pb.DeliveredChoice(choice_index=delta.choice_index)
            self._choices[delta.choice_index] = choice
        if delta.is_prompt:
            choice.echoed_tokens += delta.token_count
            return
        choice.token_ids.extend(delta.token_ids)
        choice.text_characters += len(delta.text)
        choice.reasoning_characters += len(delta.reasoning)
        for call in delta.tool_calls:
            choice.tool_calls += call.HasField("name")
            choice.argument_characters += len(call.arguments)
