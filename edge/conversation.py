"""What was said on one socket so far, so that a request need only bring what is new."""

from collections.abc import Iterable

from edge.errors import EdgeError
from protos.sluice.v1 import generation_pb2 as pb


class Conversation:
    """Messages, the oldest first, within a limit of bytes. Only a turn that was finished changes it."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._messages: list[pb.ChatMessage] = []

    def continued(self, message: pb.ChatMessage) -> list[pb.ChatMessage]:
        """All of it, and one message more. Raises a 413 where that is too much."""
        messages = [*self._messages, message]
        if sum(said.ByteSize() for said in messages) > self._max_bytes:
            raise EdgeError(
                413,
                "invalid_request_error",
                f"The conversation would be larger than {self._max_bytes} bytes; begin another with messages.",
                "conversation_too_large",
                "message",
            )
        return messages

    def keep(self, messages: Iterable[pb.ChatMessage], answer: pb.ChatMessage) -> None:
        """Makes these and the answer to them the conversation."""
        self._messages = [*messages, answer]


class Answer:
    """What the model says in one turn, piece by piece: its first choice."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[tuple[str, str, list[str]]] = []  # id, name, arguments

    def add(self, delta: pb.Delta) -> None:
        """Takes one piece, of any choice."""
        if delta.choice_index or delta.is_prompt:
            return
        self._text.append(delta.text)
        self._reasoning.append(delta.reasoning)
        for call in delta.tool_calls:
            if call.HasField("name"):
                self._calls.append((call.id, call.name, []))
            self._calls[call.index][2].append(call.arguments)

    def message(self) -> pb.ChatMessage:
        """The whole."""
        message = pb.ChatMessage(
            role="assistant",
            content="".join(self._text),
            reasoning="".join(self._reasoning) or None,
        )
        for call_id, name, pieces in self._calls:
            message.tool_calls.add(id=call_id, name=name, arguments="".join(pieces))
        return message
