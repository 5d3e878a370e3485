"""What the events of a stream say together."""

from __future__ import annotations

from typing import Any

from tests.edge.sse import Event


def read_native(events: list[Event]) -> dict[str, Any]:
    """What the events say together; how many there are depends on the reader's pace."""
    *_, last = events
    assert last.type == "finished", last
    deltas = [event.json() for event in events if event.type == "delta"]
    numbers = [number_of(event) for event in events]
    assert numbers == sorted(set(numbers))  # heartbeats of the worker have numbers too
    assert [event.type for event in events].count("started") == 1
    assert not any("token_ids" in delta for delta in deltas)
    return {
        "text": "".join(delta["text"] for delta in deltas),
        "tokens": sum(delta["token_count"] for delta in deltas),
        "reason": last.json()["finish_reason"],
        "completion_tokens": last.json()["usage"]["completion_tokens"],
    }


def number_of(event: Event) -> int:
    return int(event.last_event_id.removesuffix("-end").rpartition("-")[2])
