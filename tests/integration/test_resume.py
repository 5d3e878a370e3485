"""Whoever loses a connection, wherever it is cut: the events joined are those of the uncut stream."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from edge.api_keys import digest_of
from tests.edge.sse import Event, parse
from tests.integration.stack import PATIENCE, LoggedProcess, Stack, running_stack

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 120}
SAMPLED: dict[str, Any] = {"temperature": 1.5, "seed": 11, "n": 3, "max_tokens": 80, "logprobs": 2}
PROMPT = "Tell me a story. " * 3


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    # without the prefix cache, so that a prompt is computed alike each time
    with running_stack({"prefix_cache": False}) as stack:
        yield stack


def read(url: str, fields: dict[str, Any], last_event_id: str, limit: int | None) -> bytes:
    """What comes of a stream, or the first so many bytes of it."""
    body = {"prompt": PROMPT, "ignore_eos": True, "return_token_ids": True, "resume_window": 60}
    headers = {"last-event-id": last_event_id} if last_event_id else {}
    data = b""
    with httpx.stream(
        "POST", f"{url}/v1/streams", json=body | fields, headers=headers, timeout=PATIENCE
    ) as response:
        assert response.status_code in (200, 204), response.read()
        for chunk in response.iter_raw():
            data += chunk
            if limit is not None and len(data) >= limit:
                return data[:limit]
    return data


def whole_events(data: bytes) -> list[Event]:
    """Those that came whole, wherever the cut is."""
    return parse(data[: data.rfind(b"\n\n") + 2] if b"\n\n" in data else b"").events


def joined(events: list[Event]) -> dict[str, Any]:
    """What the events say together."""
    choices: dict[int, dict[str, Any]] = {}
    for event in events:
        data = event.json()
        if event.type == "started":
            continue
        choice = choices.setdefault(
            data["choice_index"], {"text": "", "token_ids": [], "logprobs": [], "tokens": 0}
        )
        if event.type == "delta":
            choice["text"] += data["text"]
            choice["token_ids"] += data["token_ids"]
            choice["logprobs"] += data.get("logprobs", [])
            choice["tokens"] += data["token_count"]
        else:
            choice["reason"] = data["finish_reason"]
    usage = events[-1].json()["usage"]
    return {"choices": dict(sorted(choices.items())), "usage": usage}


def numbers(events: list[Event]) -> list[int]:
    return [int(event.last_event_id.removesuffix("-end").rpartition("-")[2]) for event in events]


@pytest.mark.parametrize("fields", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("seed", range(3))
def test_cut_at_any_byte_any_number_of_times(
    stack: Stack, fields: dict[str, Any], seed: int
) -> None:
    uncut = parse(read(stack.url, fields, "", None)).events
    rng = random.Random(seed)
    events: list[Event] = []
    while not (events and events[-1].last_event_id.endswith("-end")):
        place = events[-1].last_event_id if events else ""
        limit = int(
            rng.lognormvariate(8, 2)
        )  # half of them below 3000 bytes; an event may have more
        events += whole_events(read(stack.url, fields, place, limit))
    assert [event.type for event in events].count("started") == 1
    assert numbers(events) == sorted(set(numbers(events)))
    assert joined(events) == joined(uncut)
    assert read(stack.url, fields, events[-1].last_event_id, None) == b""
    rest = parse(read(stack.url, fields, events[0].last_event_id, None)).events
    assert rest == events[1:], "once more, and the very same events"


def test_an_edge_is_killed_and_another_one_goes_on(stack: Stack) -> None:
    uncut = parse(read(stack.url, GREEDY, "", None)).events
    flags = {"host": "127.0.0.1", "port": 0, "worker": stack.worker_address}
    first = LoggedProcess("edge", flags)
    url = f"http://127.0.0.1:{first.wait_for_line(event='edge listening')['port']}"
    request = {"prompt": PROMPT, "ignore_eos": True, "return_token_ids": True, "resume_window": 60}
    with httpx.stream(
        "POST", f"{url}/v1/streams", json=request | GREEDY, timeout=PATIENCE
    ) as response:
        data = next(response.iter_raw())
        first.stop(signal.SIGKILL)
    events = whole_events(data)
    assert events
    second = LoggedProcess("edge", flags)
    url = f"http://127.0.0.1:{second.wait_for_line(event='edge listening')['port']}"
    events += parse(read(url, GREEDY, events[-1].last_event_id, None)).events
    assert joined(events) == joined(uncut)
    assert second.stop() == 0


def test_a_reader_who_does_not_come_back_frees_the_worker(stack: Stack) -> None:
    fields = {"max_tokens": 1200, "resume_window": 0.2}
    events = whole_events(read(stack.url, fields, "", 600))
    stack.wait_idle()
    # the window begins when the worker hears of it, or at the end if that came first
    while (again := reconnect(stack, events[0].last_event_id)).status_code == 200:
        pass
    assert (again.status_code, again.json()["error"]["code"]) == (410, "stream_gone")


def reconnect(stack: Stack, last_event_id: str) -> httpx.Response:
    headers = {"last-event-id": last_event_id}
    return httpx.get(f"{stack.url}/v1/streams?prompt=x", headers=headers, timeout=PATIENCE)


def test_another_key_finds_nothing(stack: Stack) -> None:
    keys = ";".join(f"{name}: sha256:{digest_of(name).hex()}" for name in ("alice", "bob"))
    flags = {"host": "127.0.0.1", "port": 0, "worker": stack.worker_address, "api_keys": keys}
    edge = LoggedProcess("edge", flags)
    url = f"http://127.0.0.1:{edge.wait_for_line(event='edge listening')['port']}/v1/streams"

    def ask(key: str, place: str = "") -> httpx.Response:
        headers = {"authorization": f"Bearer {key}"} | ({"last-event-id": place} if place else {})
        return httpx.get(f"{url}?prompt=x&max_tokens=4", headers=headers, timeout=PATIENCE)

    events = parse(ask("alice").content).events
    place = events[0].last_event_id
    assert ask("bob", place).status_code == 410
    assert reconnect(stack, place).status_code == 410  # without a key
    assert parse(ask("alice", place).content).events == events[1:]
    assert edge.stop() == 0


def test_an_event_source_needs_no_more_than_its_url(stack: Stack) -> None:
    url = f"{stack.url}/v1/streams?prompt=Hello&max_tokens=300&ignore_eos=true"
    with httpx.stream("GET", url, timeout=PATIENCE) as response:
        events = whole_events(next(response.iter_raw()))
    rest = parse(reconnect(stack, events[-1].last_event_id).content).events
    assert rest[-1].json()["usage"]["completion_tokens"] == 300
    assert reconnect(stack, rest[-1].last_event_id).status_code == 204
