"""How long a client lets its request take: by header or field, told to the worker, and never more than the setting."""

from typing import Any

import httpx
import pytest

from edge.worker_stream import GRACE_SECONDS
from protos.sluice.v1 import generation_pb2 as pb
from tests.edge.edge_process import PATIENCE, EdgeProcess, running_edge
from tests.edge.scripted_worker import ScriptedCall, ScriptedWorker
from tests.edge.sse import parse

MESSAGES = [{"role": "user", "content": "hi"}]
# Every dialect takes the header; these take the field as well.
WITH_FIELD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/completions": {"prompt": "hi"},
    "/v1/streams": {"prompt": "hi"},
}
HEADER_ALONE: dict[str, dict[str, Any]] = {
    "/v1/messages": {"model": "default", "max_tokens": 4, "messages": MESSAGES},
    "/v1/responses": {"input": "hi"},
    "/generate": {"inputs": "hi"},
    "/v2/models/default/generate": {"text_input": "hi"},
}


class Deadlines:
    """Notes what the worker was given."""

    def __init__(self, worker: ScriptedWorker) -> None:
        self.requested: list[float] = []
        self.left: list[float] = []
        self._script = worker.script
        worker.script = self._note

    async def _note(self, call: ScriptedCall) -> None:
        self.requested.append(call.request.timeout.ToNanoseconds() / 1e9)
        self.left.append(call.context.time_remaining())
        await self._script(call)


@pytest.mark.parametrize("path", [*WITH_FIELD, *HEADER_ALONE])
async def test_the_header(http: httpx.AsyncClient, worker: ScriptedWorker, path: str) -> None:
    deadlines = Deadlines(worker)
    body = (WITH_FIELD | HEADER_ALONE)[path]
    response = await http.post(path, json=body, headers={"X-Request-Timeout": "45.5"})
    assert response.status_code == 200
    ((requested,), (left,)) = deadlines.requested, deadlines.left
    # a request may have lost some of it on its way, and never gains any
    assert 20 < requested <= 45.5
    assert requested < left <= 45.5 + 2 * GRACE_SECONDS  # gRPC rounds up


@pytest.mark.parametrize("path", WITH_FIELD)
async def test_the_field_and_the_shorter_of_both(
    http: httpx.AsyncClient, worker: ScriptedWorker, path: str
) -> None:
    deadlines = Deadlines(worker)
    for field, header in ((40, None), (40, "100"), (100, "40"), (10**6, None)):
        headers = {} if header is None else {"X-Request-Timeout": header}
        body = WITH_FIELD[path] | {"timeout": field}
        assert (await http.post(path, json=body, headers=headers)).status_code == 200
    assert all(20 < seconds <= 40 for seconds in deadlines.requested[:3])
    assert 500 < deadlines.requested[3] <= 600  # the setting's default


async def test_an_event_source_has_no_headers_but_a_query(
    http: httpx.AsyncClient, worker: ScriptedWorker
) -> None:
    deadlines = Deadlines(worker)
    response = await http.get("/v1/streams", params={"prompt": "hi", "timeout": "33.5"})
    assert response.status_code == 200
    assert 10 < deadlines.requested[0] <= 33.5


@pytest.mark.parametrize("value", ["", "0", "0.0", "-1", "1e3", "nan", "inf", "1s", "9" * 10, "१"])
async def test_a_bad_header_is_a_400_that_names_it(
    http: httpx.AsyncClient, worker: ScriptedWorker, value: str
) -> None:
    headers = {b"X-Request-Timeout": value.encode()}
    response = await http.post("/v1/completions", json={"prompt": "hi"}, headers=headers)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "x-request-timeout")
    assert not worker.calls


@pytest.mark.parametrize("value", [0, -1, "1", True, 1e10])
@pytest.mark.parametrize("path", WITH_FIELD)
async def test_a_bad_field_is_a_400_that_names_it(
    http: httpx.AsyncClient, worker: ScriptedWorker, path: str, value: object
) -> None:
    response = await http.post(path, json=WITH_FIELD[path] | {"timeout": value})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "timeout")
    assert not worker.calls


async def test_tritons_own_timeout_is_another_field_and_refused(
    http: httpx.AsyncClient, worker: ScriptedWorker
) -> None:
    body = {"text_input": "hi", "parameters": {"timeout": 5}}  # microseconds, to Triton
    response = await http.post("/v2/models/default/generate", json=body)
    assert response.status_code == 400
    assert not worker.calls


async def test_a_generation_that_its_deadline_cut_is_told_as_such(
    http: httpx.AsyncClient, worker: ScriptedWorker
) -> None:
    async def cut(call: ScriptedCall) -> None:
        await call.started()
        await call.delta("Hel")
        await call.finished(pb.FINISH_REASON_DEADLINE)

    worker.script = cut
    for path in ("/v1/chat/completions", "/v1/completions"):
        assert (await http.post(path, json=WITH_FIELD[path])).status_code == 504
    events = parse((await http.post("/v1/streams", json={"prompt": "hi"})).content).events
    assert [event.type for event in events] == ["started", "delta", "finished"]
    assert events[-1].json()["finish_reason"] == "deadline"


async def test_a_prompt_to_tokenize_has_the_time_of_a_request(
    target: str, worker: ScriptedWorker
) -> None:
    """Not that of a call which only asks the worker something; and a large one is answered like a small one."""
    async with running_edge(
        target, connect_timeout_seconds=10, request_timeout_seconds=50_000
    ) as edge:
        for text in ("aé", "aé" * 40_000):
            answer = await post(edge, "/tokenize", {"inputs": text})
            tokens = [(token["text"], token["start"], token["stop"]) for token in answer.json()]
            assert tokens == [(shown, at, at + 1) for at, shown in enumerate(text)]
        chat = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
        assert (await post(edge, "/v1/messages/count_tokens", chat)).status_code == 200
    assert len(worker.tokenizations) == 3
    assert all(left > 40_000 for _, left in worker.tokenizations)


async def post(edge: EdgeProcess, path: str, body: dict[str, Any]) -> httpx.Response:
    async with httpx.AsyncClient(base_url=edge.url, timeout=PATIENCE, trust_env=False) as client:
        return await client.post(path, json=body)
