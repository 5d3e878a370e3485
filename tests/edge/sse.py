"""Server-sent events, read by the letter of the HTML standard."""

import json
import re
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Event:
    """One dispatched event."""

    type: str = "message"
    data: str = ""
    last_event_id: str = ""

    def json(self) -> Any:
        """The data as JSON."""
        return json.loads(self.data)


@dataclass
class Parsed:
    """A whole stream."""

    events: list[Event] = field(default_factory=list)
    comments: list[str] = field(default_factory=list)


def parse(stream: bytes) -> Parsed:
    """Reads a stream as an EventSource does."""
    parsed = Parsed()
    kind, last_event_id = "", ""
    data: list[str] = []
    lines = re.split("\r\n|\n|\r", stream.decode("utf-8"))
    for line in lines[:-1]:
        if not line:
            if data:
                parsed.events.append(Event(kind or "message", "\n".join(data), last_event_id))
            kind, data = "", []
        elif line.startswith(":"):
            parsed.comments.append(line[1:].strip())
        else:
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if name == "event":
                kind = value
            elif name == "data":
                data.append(value)
            elif name == "id" and "\0" not in value:
                last_event_id = value
    return parsed


def openai_chunks(stream: bytes) -> list[dict[str, Any]]:
    """The chunks of an OpenAI stream, whose terminator must be last."""
    events = parse(stream).events
    assert events[-1].data == "[DONE]"
    assert stream.endswith(b"data: [DONE]\n\n")
    return [event.json() for event in events[:-1]]
