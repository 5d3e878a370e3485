"""eventsource and @microsoft/fetch-event-source of npm, unchanged: typed streams, lost connections, refusals."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, ClassVar
from urllib.parse import urlencode

import pytest

from tests.clients.contract import ENDLESS, occupied, partly
from tests.clients.cutting_proxy import cutting
from tests.clients.foreign_process import ForeignError, ForeignProcess
from tests.clients.node_clients import NodeClients
from tests.edge.edge_process import EdgeProcess
from tests.edge.scripted_worker import ScriptedWorker
from tests.integration.stack import Stack

# Log-probabilities make it long, however few deltas carry it: the connections are cut before its end.
STORY = {
    "prompt": "Tell me a story",
    "temperature": 0,
    "max_tokens": 300,
    "ignore_eos": "true",
    "logprobs": 1,
}
LIMITS = (6000, 5000)  # bytes


class EventSource:
    """A stream by GET, whose refusals are statuses; after its end a 204 closes it."""

    parking: ClassVar[dict[str, str]] = {}  # as it is

    def __init__(self, process: ForeignProcess) -> None:
        self._process = process

    def read(self, url: str, **fields: Any) -> dict[str, Any]:
        given: dict[str, Any] = self._process.call("read", url=self._url(url, fields))
        return given

    def leave(self, url: str, **fields: Any) -> str:
        text: str = self._process.call("leave", url=self._url(url, fields))
        return text

    def refusal(self, url: str, **fields: Any) -> int:
        given = self.read(url, **fields)
        assert (given["events"], given["opened"]) == ([], 0)
        status: int = given["code"]
        return status

    def _url(self, url: str, fields: dict[str, Any]) -> str:
        return f"{url}/v1/streams?{urlencode({'prompt': 'x', **fields})}"


class FetchEventSource:
    """A stream by POST, which asks for a resume window."""

    parking: ClassVar[dict[str, str]] = {"while_unread": "park"}

    def __init__(self, process: ForeignProcess) -> None:
        self._process = process

    def read(self, url: str, **fields: Any) -> dict[str, Any]:
        body = self._body(fields)
        given: dict[str, Any] = self._process.call("read", url=f"{url}/v1/streams", body=body)
        return given

    def leave(self, url: str, **fields: Any) -> str:
        body = self._body(fields)
        text: str = self._process.call("leave", url=f"{url}/v1/streams", body=body)
        return text

    def refusal(self, url: str, **fields: Any) -> int:
        with pytest.raises(ForeignError) as refused:
            self.read(url, **fields)
        assert refused.value.name == "Refused"
        assert refused.value.status is not None
        return refused.value.status

    def _body(self, fields: dict[str, Any]) -> dict[str, Any]:
        body = {"prompt": "x", "resume_window": 30, **fields}
        return body | ({"ignore_eos": True} if "ignore_eos" in body else {})


Source = EventSource | FetchEventSource
SOURCES: dict[str, type[EventSource] | type[FetchEventSource]] = {
    "event_source.mjs": EventSource,
    "fetch_event_source.mjs": FetchEventSource,
}


@pytest.fixture(scope="module", params=SOURCES)
def source(request: pytest.FixtureRequest, node_clients: NodeClients) -> Iterator[Source]:
    with node_clients.run(request.param) as process:
        yield SOURCES[request.param](process)


def text_of(events: list[dict[str, Any]]) -> str:
    return "".join(event["data"]["text"] for event in events if event["kind"] == "delta")


def test_a_lost_connection_loses_nothing(source: Source, stack: Stack) -> None:
    uncut = source.read(stack.url, **STORY)["events"]
    with cutting(stack.edge_port, LIMITS) as proxy:
        cut = source.read(proxy.url, **STORY)
    assert proxy.cuts == 2
    assert cut["opened"] == 3
    first, *again = [
        request for request in proxy.requests if "post " in request or "get " in request
    ]
    assert "last-event-id" not in first
    assert all("last-event-id: " in request for request in again)
    assert text_of(cut["events"]) == text_of(uncut)
    kinds = [event["kind"] for event in cut["events"]]
    assert (kinds[0], kinds[-1]) == ("started", "finished")
    assert kinds.count("started") == kinds.count("finished") == 1
    footers = [events[-1]["data"] for events in (cut["events"], uncut)]
    assert footers[0]["finish_reason"] == footers[1]["finish_reason"] == "length"
    assert footers[0]["usage"]["completion_tokens"] == 300
    ids = [event["id"] for event in cut["events"]]
    assert len(set(ids)) == len(ids)


def test_refusals(source: Source, stack: Stack, slow_stack: Stack, locked_url: str) -> None:
    assert source.refusal(stack.url, temperature=200) == 400
    assert source.refusal(stack.url, model="gpt-99") == 404
    assert source.refusal(locked_url) == 401
    with occupied(slow_stack):
        assert source.refusal(slow_stack.url) == 429


def test_leaving_frees_the_sequence(source: Source, slow_stack: Stack) -> None:
    before = slow_stack.load().generated_tokens
    # longer than anybody waits: whatever is freed before is not freed by the window's end
    window = {"resume_window": 300, **source.parking}
    assert source.leave(slow_stack.url, max_tokens=ENDLESS, **window)
    slow_stack.wait_idle()
    assert slow_stack.load().generated_tokens - before < ENDLESS, "it ended by itself"


async def test_a_failure_midway_is_told(
    source: Source, edge: EdgeProcess, worker: ScriptedWorker
) -> None:
    worker.script = partly
    if isinstance(source, EventSource):
        given = await asyncio.to_thread(source.read, edge.url)
        assert [event["kind"] for event in given["events"]] == ["started", "delta", "failed"]
        assert given["events"][-1]["data"]["error"]["type"] == "server_error"
        assert given["code"] == 204, "and it is not asked for again"
    else:
        assert await asyncio.to_thread(source.refusal, edge.url) == 200
    assert len(worker.calls) == 1
