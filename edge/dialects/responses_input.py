"""The input items of /v1/responses as a conversation of the contract."""

from collections.abc import Sequence

from edge.dialects.responses_schema import (
    ResponsesFunctionCall,
    ResponsesFunctionOutput,
    ResponsesItem,
    ResponsesMessage,
    ResponsesOutputText,
    ResponsesReasoningItem,
    ResponsesTextPart,
)
from protos.sluice.v1 import generation_pb2 as pb


class Conversation:
    """Messages made of items.

    An answer is several items (reasoning, then text, then calls) where a chat template knows one message that has all
    of them, so what fits together in that order becomes one message.
    """

    def __init__(
        self,
        instructions: str | None,
        items: str | Sequence[ResponsesItem],
        before: Sequence[pb.ChatMessage] = (),
    ) -> None:
        """`before` comes between the instructions and the items."""
        self.messages: list[pb.ChatMessage] = []
        # From the path of a message, or of a call in it, to the item's.
        self.names: dict[str, str] = {}
        self._answer: pb.ChatMessage | None = None
        if instructions is not None:
            self._add(pb.ChatMessage(role="system", content=instructions), "instructions")
        self._num_instructions = len(self.messages)
        for message in before:
            self._add(message, "previous_response_id")
        if isinstance(items, str):
            self._add(pb.ChatMessage(role="user", content=items), "input")
            return
        for index, item in enumerate(items):
            self._take(item, f"input[{index}]")

    @property
    def without_instructions(self) -> Sequence[pb.ChatMessage]:
        """The messages that a later response goes on with."""
        return self.messages[self._num_instructions :]

    def _take(self, item: ResponsesItem, path: str) -> None:
        match item:
            case ResponsesMessage(role="assistant"):
                answer = self._answer_without("content", "tool_calls", path=path)
                answer.content = _text(item.content)
            case ResponsesMessage():
                role = "system" if item.role == "developer" else item.role
                self._add(pb.ChatMessage(role=role, content=_text(item.content)), path)
            case ResponsesReasoningItem():
                answer = self._answer_without("reasoning", "content", "tool_calls", path=path)
                answer.reasoning = "".join(part.text for part in item.content or item.summary)
            case ResponsesFunctionCall():
                answer = self._answer_without(path=path)
                answer.tool_calls.add(id=item.call_id, name=item.name, arguments=item.arguments)
                call = len(answer.tool_calls) - 1
                self.names[f"{self._last_path()}.tool_calls[{call}]"] = path
            case ResponsesFunctionOutput():
                output = _text(item.output)
                self._add(
                    pb.ChatMessage(role="tool", content=output, tool_call_id=item.call_id), path
                )

    def _answer_without(self, *fields: str, path: str) -> pb.ChatMessage:
        """The assistant's message that the item before is in, unless it has one of the fields: then another one."""
        answer = self._answer
        if answer is None or any(getattr(answer, field) for field in fields):
            answer = pb.ChatMessage(role="assistant")
            self._add(answer, path)
            self._answer = answer
        return answer

    def _add(self, message: pb.ChatMessage, path: str) -> None:
        self._answer = None
        self.messages.append(message)
        self.names[self._last_path()] = path

    def _last_path(self) -> str:
        return f"prompt.chat.messages[{len(self.messages) - 1}]"


def _text(content: str | Sequence[ResponsesTextPart | ResponsesOutputText]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
