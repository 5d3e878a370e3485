"""What a caller knows of a stream from its messages alone, and the request that lets another worker go on with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from protos.sluice.v1 import generation_pb2 as pb


@dataclass
class ChoiceRecord:
    """One choice as it arrived."""

    text: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)  # name and arguments
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[pb.TokenLogprob] = field(default_factory=list)
    num_tokens: int = 0  # as the deltas count them
    echo: str = ""
    echoed_tokens: int = 0
    echo_logprobs: list[pb.TokenLogprob] = field(default_factory=list)
    finished: pb.Finished | None = None

    def add(self, delta: pb.Delta) -> None:
        assert self.finished is None, "a delta after the footer"
        if delta.is_prompt:
            self.echo += delta.text
            self.echoed_tokens += delta.token_count
            self.echo_logprobs += delta.logprobs
            return
        self.text += delta.text
        self.reasoning += delta.reasoning
        for call in delta.tool_calls:
            if call.HasField("name"):
                assert call.HasField("id")
                assert call.index == len(self.calls), "a call begins twice"
                self.calls.append((call.name, ""))
            name, arguments = self.calls[call.index]
            self.calls[call.index] = name, arguments + call.arguments
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.num_tokens += delta.token_count

    def finish(self, finished: pb.Finished) -> None:
        assert self.finished is None, "two footers"
        self.finished = finished


class StreamRecord:
    """The messages of a stream, and of the streams that went on with it."""

    def __init__(self) -> None:
        self.started: pb.Started | None = None
        self.choices: dict[int, ChoiceRecord] = {}
        self.usage: pb.Usage | None = None

    def add(self, messages: Sequence[pb.GenerateResponse]) -> StreamRecord:
        for message in messages:
            if message.HasField("started"):
                self.started = self.started or message.started
            elif message.HasField("delta"):
                self.choice(message.delta.choice_index).add(message.delta)
            elif message.HasField("finished"):
                assert self.usage is None, "a footer after the last"
                self.choice(message.finished.choice_index).finish(message.finished)
                if message.finished.HasField("usage"):
                    self.usage = message.finished.usage
        return self

    def choice(self, index: int) -> ChoiceRecord:
        return self.choices.setdefault(index, ChoiceRecord())

    def going_on(self, request: pb.GenerateRequest) -> pb.GenerateRequest:
        """The request for what is missing, made from the first one and what arrived since."""
        assert self.started is not None
        rest = pb.GenerateRequest()
        rest.CopyFrom(request)
        rest.sampling.CopyFrom(self.started.sampling)
        rest.stopping.max_tokens = self.started.max_tokens
        rest.n = self.started.n
        rest.continuation.SetInParent()
        for index, choice in self.choices.items():
            delivered = rest.continuation.choices.add(choice_index=index)
            if choice.finished is not None:
                delivered.completion_tokens = choice.finished.completion_tokens
                continue
            delivered.token_ids.extend(choice.token_ids)
            delivered.text_characters = len(choice.text)
            delivered.echoed_tokens = choice.echoed_tokens
            delivered.reasoning_characters = len(choice.reasoning)
            delivered.tool_calls = len(choice.calls)
            delivered.argument_characters = sum(len(arguments) for _, arguments in choice.calls)
        return rest
