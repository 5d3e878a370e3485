"""The output items of /v1/responses: reasoning, messages and calls of functions, and the events that tell of them."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, TypeAlias

from edge.dialects.openai_wire import token_logprobs
from protos.sluice.v1 import generation_pb2 as pb

# All fields of an event but its sequence number.
Event: TypeAlias = dict[str, Any]
# A token with its log-probability and candidates.
Logprob: TypeAlias = dict[str, Any]

IN_PROGRESS, COMPLETED, INCOMPLETE = "in_progress", "completed", "incomplete"


class Item(ABC):
    """One item, as far as it is known.

    Its id follows from the response's and its place, so that whoever reads the same messages again finds the same ids.
    """

    prefix: ClassVar[str]
    delta_type: ClassVar[str]

    def __init__(self, response_id: str, index: int) -> None:
        self._pieces: list[str] = []
        self._status = IN_PROGRESS
        self._id = f"{self.prefix}_{response_id.rpartition('_')[2]}_{index}"
        self._place: dict[str, Any] = {"item_id": self._id, "output_index": index}

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join(self._pieces)

    def add(self, text: str, logprobs: Sequence[Logprob] = ()) -> Event:  # noqa: ARG002
        """Takes more text. Only the answer's has log-probabilities, if they were asked for."""
        self._pieces.append(text)
        return {"type": self.delta_type, **self._place, "delta": text}

    def open(self) -> Iterator[Event]:
        """The events before the first text."""
        yield self._item_event("added")

    def end(self, status: str) -> None:
        """No more text comes."""
        self._status = status

    def close(self) -> Iterator[Event]:
        """The events after the last text of an item that has ended."""
        yield self._item_event("done")

    @abstractmethod
    def as_json(self) -> dict[str, Any]:
        """The item."""

    @abstractmethod
    def add_to(self, message: pb.ChatMessage) -> None:
        """Adds it to an assistant's message."""

    def _item_event(self, what: str) -> Event:
        index = self._place["output_index"]
        return {
            "type": f"response.output_item.{what}",
            "output_index": index,
            "item": self.as_json(),
        }


class PartItem(Item):
    """An item whose text is in its one content part."""

    done_type: ClassVar[str]
    part: ClassVar[dict[str, Any]]

    def __init__(self, response_id: str, index: int) -> None:
        super().__init__(response_id, index)
        self._place["content_index"] = 0

    def open(self) -> Iterator[Event]:
        """The events before the first text."""
        yield from super().open()
        yield {"type": "response.content_part.added", **self._place, "part": self._part("")}

    def close(self) -> Iterator[Event]:
        """The events after the last text."""
        text = self.text
        yield {"type": self.done_type, **self._place, "text": text, **self._more_of_text()}
        yield {"type": "response.content_part.done", **self._place, "part": self._part(text)}
        yield from super().close()

    def _part(self, text: str) -> dict[str, Any]:
        return self.part | self._more_of_text() | {"text": text}

    def _more_of_text(self) -> dict[str, Any]:
        """What stands beside its text so far."""
        return {}

    def _content(self) -> list[dict[str, Any]]:
        return [] if self._status == IN_PROGRESS else [self._part(self.text)]


class MessageItem(PartItem):
    """Text of the answer."""

    prefix = "msg"
    delta_type, done_type = "response.output_text.delta", "response.output_text.done"
    part: ClassVar[dict[str, Any]] = {"type": "output_text", "annotations": []}

    def __init__(self, response_id: str, index: int) -> None:
        super().__init__(response_id, index)
        self._logprobs: list[Logprob] = []

    def add(self, text: str, logprobs: Sequence[Logprob] = ()) -> Event:
        """Takes more text with its log-probabilities."""
        self._logprobs += logprobs
        return super().add(text) | {"logprobs": [*logprobs]}

    def as_json(self) -> dict[str, Any]:
        """The item."""
        return {
            "id": self._id,
            "type": "message",
            "status": self._status,
            "role": "assistant",
            "content": self._content(),
        }

    def add_to(self, message: pb.ChatMessage) -> None:
        """Adds it to an assistant's message."""
        message.content += self.text

    def _more_of_text(self) -> dict[str, Any]:
        return {"logprobs": self._logprobs.copy()}


class ReasoningItem(PartItem):
    """What the model thought before it answered."""

    prefix = "rs"
    delta_type, done_type = "response.reasoning_text.delta", "response.reasoning_text.done"
    part: ClassVar[dict[str, Any]] = {"type": "reasoning_text"}

    def as_json(self) -> dict[str, Any]:
        """The item."""
        return {
            "id": self._id,
            "type": "reasoning",
            "status": self._status,
            "summary": [],
            "content": self._content(),
        }

    def add_to(self, message: pb.ChatMessage) -> None:
        """Adds it to an assistant's message."""
        message.reasoning += self.text


class CallItem(Item):
    """A call of a function."""

    prefix = "fc"
    delta_type = "response.function_call_arguments.delta"

    def __init__(self, response_id: str, index: int, call: pb.ToolCallDelta) -> None:
        super().__init__(response_id, index)
        self._call_id, self._name = call.id, call.name

    def close(self) -> Iterator[Event]:
        """The events after the last text."""
        done = {"name": self._name, "arguments": self.text}
        yield {"type": "response.function_call_arguments.done", **self._place, **done}
        yield from super().close()

    def as_json(self) -> dict[str, Any]:
        """The item."""
        return {
            "id": self._id,
            "type": "function_call",
            "status": self._status,
            "call_id": self._call_id,
            "name": self._name,
            "arguments": self.text,
        }

    def add_to(self, message: pb.ChatMessage) -> None:
        """Adds it to an assistant's message."""
        message.tool_calls.add(id=self._call_id, name=self._name, arguments=self.text)


class Output:
    """All items of one response. One is open at a time: what comes goes into it or closes it."""

    def __init__(self, response_id: str) -> None:
        self._id = response_id
        self._items: list[Item] = []
        self._open: Item | None = None
        # Log-probabilities of tokens whose text is still to come: parts of a character, or of a stop sequence.
        self._logprobs: list[Logprob] = []
        self._tokens = 0
        # The contract counts no tokens of reasoning, so these are the tokens up to its last piece. Where one delta has
        # both the end of the reasoning and the beginning of the answer, all of it counts, and all of its
        # log-probabilities are the answer's.
        self.reasoning_tokens = 0

    def take(self, delta: pb.Delta) -> list[Event]:
        """The events of a delta."""
        events: list[Event] = []
        self._tokens += delta.token_count
        if delta.reasoning:
            self.reasoning_tokens = self._tokens
            events += self._more(ReasoningItem, delta.reasoning)
        self._logprobs += token_logprobs(delta)
        if delta.text:
            events += self._more(MessageItem, delta.text, self._logprobs)
        if delta.text or delta.reasoning or delta.tool_calls:
            self._logprobs = []
        for call in delta.tool_calls:
            if call.HasField("name"):
                events += self._enter(CallItem(self._id, len(self._items), call))
            if call.arguments and isinstance(self._open, CallItem):
                events.append(self._open.add(call.arguments))
        return events

    def end(self, status: str) -> list[Event]:
        """The events of the end. The last item has the status, and there is one."""
        events = [] if self._items else self._enter(MessageItem(self._id, 0))
        if self._logprobs and isinstance(self._open, MessageItem):
            events.append(self._open.add("", self._logprobs))
        return [*events, *self._close(status)]

    def break_off(self) -> None:
        """The response failed: the open item stays a part of one."""
        if self._open is not None:
            self._open.end(INCOMPLETE)

    def as_json(self) -> list[dict[str, Any]]:
        """The items."""
        return [item.as_json() for item in self._items]

    def as_message(self) -> pb.ChatMessage:
        """The items as a conversation has them."""
        message = pb.ChatMessage(role="assistant")
        for item in self._items:
            item.add_to(message)
        return message

    def _more(
        self, kind: type[PartItem], text: str, logprobs: Sequence[Logprob] = ()
    ) -> Iterator[Event]:
        if not isinstance(self._open, kind):
            yield from self._enter(kind(self._id, len(self._items)))
        if self._open is not None:
            yield self._open.add(text, logprobs)

    def _enter(self, item: Item) -> list[Event]:
        events = [*self._close(COMPLETED), *item.open()]
        self._items.append(item)
        self._open = item
        return events

    def _close(self, status: str) -> list[Event]:
        item, self._open = self._open, None
        if item is None:
            return []
        item.end(status)
        return list(item.close())
