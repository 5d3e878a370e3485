"""What was delivered of a stream: enough for another worker to go on with it."""

from array import array
from dataclasses import dataclass, field

from protos.sluice.v1 import generation_pb2 as pb


@dataclass
class _Choice:
    """The sum of one choice's deltas."""

    token_ids: "array[int]" = field(default_factory=lambda: array("I"))
    text_characters: int = 0
    reasoning_characters: int = 0
    tool_calls: int = 0
    argument_characters: int = 0
    echoed_tokens: int = 0
    completion_tokens: int | None = None  # once it is over

    def take(self, delta: pb.Delta) -> None:
        if delta.is_prompt:
            self.echoed_tokens += delta.token_count
            return
        self.token_ids.extend(delta.token_ids)
        self.text_characters += len(delta.text)
        self.reasoning_characters += len(delta.reasoning)
        for call in delta.tool_calls:
            self.tool_calls += call.HasField("name")
            self.argument_characters += len(call.arguments)

    def message(self, index: int) -> pb.DeliveredChoice:
        if self.completion_tokens is not None:
            return pb.DeliveredChoice(choice_index=index, completion_tokens=self.completion_tokens)
        return pb.DeliveredChoice(
            choice_index=index,
            token_ids=self.token_ids,
            text_characters=self.text_characters,
            echoed_tokens=self.echoed_tokens,
            reasoning_characters=self.reasoning_characters,
            tool_calls=self.tool_calls,
            argument_characters=self.argument_characters,
        )


class Delivered:
    """The messages of one stream that have been read, whichever workers they came from.

    Remembers at most `max_tokens`; of a longer stream nothing, and there is no going on with it.
    """

    def __init__(self, started: pb.Started, max_tokens: int) -> None:
        self._started = started
        self._max_tokens = max_tokens
        self.sequence_number = 0  # of the last message
        self._num_tokens = 0
        self._choices: dict[int, _Choice] = {}
        self.is_whole = False  # the last message has been read

    @property
    def is_too_long(self) -> bool:
        return self._num_tokens > self._max_tokens

    def take(self, message: pb.GenerateResponse) -> None:
        """Adds a message that follows the header."""
        self.sequence_number = message.sequence_number
        if message.HasField("delta"):
            if not message.delta.is_prompt:
                self._num_tokens += len(message.delta.token_ids)
            if self.is_too_long:
                self._choices.clear()
                return
            self._choice(message.delta.choice_index).take(message.delta)
        elif message.HasField("finished"):
            finished = message.finished
            self._choices[finished.choice_index] = _Choice(
                completion_tokens=finished.completion_tokens
            )
            self.is_whole = finished.HasField("usage")

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
        for index, choice in self._choices.items():
            rest.continuation.choices.append(choice.message(index))
        rest.continuation.sequence_number = self.sequence_number
        if request.HasField("resume_window") and started.HasField("resume_id"):
            rest.continuation.resume_id = started.resume_id
        return rest

    def _choice(self, index: int) -> _Choice:
        return self._choices.setdefault(index, _Choice())
