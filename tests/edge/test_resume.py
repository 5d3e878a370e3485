"""Reconnecting to the native dialect: what the edge asks of workers, and what it makes of their answers."""

from __future__ import annotations

import signal
from typing import Any

import grpc
import httpx
import pytest

from protos.sluice.v1 import generation_pb2 as pb
from tests.edge.edge_process import running_edge
from tests.edge.raw_http import RawClient, request_bytes, split_chunked
from tests.edge.scripted_worker import (
    Script,
    ScriptedCall,
    ScriptedWorker,
    error_info,
    failing,
    start_server,
)
from tests.edge.sse import parse
from tests.patience import PATIENCE

RESUME_ID = "rs_" + "0123456789abcdef" * 3
NOT_HERE = failing(grpc.StatusCode.NOT_FOUND, "no such stream", error_info("STREAM_NOT_FOUND"))


async def kept(call: ScriptedCall) -> None:
    """Two tokens of a stream that is kept; a resume gets what comes after its number."""
    resume = call.request.resume
    after = resume.after_sequence_number if call.request.HasField("resume") else -1
    if after < 0:
        await call.started(resume_id=RESUME_ID)
    for number, text in ((1, "a"), (2, "b")):
        call._sequence_number = number
        if after < number:
            await call.delta(text)
    call._sequence_number = 3
    await call.finished(completion_tokens=2)


async def reconnect(
    http: httpx.AsyncClient, last_event_id: str, method: str = "GET"
) -> httpx.Response:
    body = {"prompt": "x"} if method == "POST" else None
    return await http.request(
        method, "/v1/streams?prompt=x", json=body, headers={"last-event-id": last_event_id}
    )


@pytest.mark.parametrize(
    ("method", "given", "seconds"),
    [
        ("GET", None, 30.0),
        ("GET", 0, None),
        ("GET", 2.5, 2.5),
        ("POST", None, None),
        ("POST", 0, None),
        ("POST", 60, 60.0),
    ],
)
async def test_who_asks_for_a_window(
    http: httpx.AsyncClient,
    worker: ScriptedWorker,
    method: str,
    given: float | None,
    seconds: float | None,
) -> None:
    fields: dict[str, Any] = {"prompt": "x"}
    if given is not None:
        fields["resume_window"] = given
    query, body = (fields, None) if method == "GET" else (None, fields)
    await http.request(method, "/v1/streams", params=query, json=body)
    request = worker.call.request
    asked = request.resume_window.ToMilliseconds() / 1e3
    assert (asked if request.HasField("resume_window") else None) == seconds
    mode = pb.WHILE_UNREAD_PARK if method == "GET" else pb.WHILE_UNREAD_CONTINUE
    assert request.while_unread == (mode if seconds else 0)


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_what_becomes_of_it_unread_can_be_chosen(
    http: httpx.AsyncClient, worker: ScriptedWorker, method: str
) -> None:
    async def ask(**fields: Any) -> httpx.Response:
        fields |= {"prompt": "x"}
        query, body = (fields, None) if method == "GET" else (None, fields)
        return await http.request(method, "/v1/streams", params=query, json=body)

    for name, mode in (("park", pb.WHILE_UNREAD_PARK), ("continue", pb.WHILE_UNREAD_CONTINUE)):
        worker.calls.clear()
        await ask(resume_window=5, while_unread=name)
        assert worker.call.request.while_unread == mode
    for wrong in (
        {"resume_window": 5, "while_unread": "sleep"},
        {"resume_window": 0, "while_unread": "park"},
    ):
        response = await ask(**wrong)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "while_unread")


async def test_a_default_window_is_a_setting(target: str, worker: ScriptedWorker) -> None:
    async with (
        running_edge(target, resume_window_seconds=0) as edge,
        httpx.AsyncClient(base_url=edge.url, timeout=PATIENCE, trust_env=False) as http,
    ):
        await http.get("/v1/streams?prompt=x")
    assert not worker.call.request.HasField("resume_window")


@pytest.mark.parametrize("window", [-1, 86_401, "a"])
async def test_a_bad_window_is_named(http: httpx.AsyncClient, window: object) -> None:
    response = await http.post("/v1/streams", json={"prompt": "x", "resume_window": window})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "resume_window"


async def test_frames_ask_for_no_window_and_refuse_one(
    http: httpx.AsyncClient, worker: ScriptedWorker
) -> None:
    frames = {"accept": "application/octet-stream"}
    assert (await http.get("/v1/streams?prompt=x", headers=frames)).status_code == 200
    assert not worker.call.request.HasField("resume_window")
    refused = await http.get("/v1/streams?prompt=x&resume_window=5", headers=frames)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "resume_window")


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_reader_gets_what_it_has_not_seen(
    http: httpx.AsyncClient, worker: ScriptedWorker, method: str
) -> None:
    worker.script = kept
    whole = (await http.get("/v1/streams?prompt=x")).content
    events = parse(whole).events
    assert [event.last_event_id for event in events] == [
        f"{RESUME_ID}-0",
        f"{RESUME_ID}-1",
        f"{RESUME_ID}-2",
        f"{RESUME_ID}-3-end",
    ]
    for number in range(3):
        worker.calls.clear()
        rest = await reconnect(http, events[number].last_event_id, method)
        assert rest.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert parse(rest.content).events == events[number + 1 :]
        assert whole.endswith(rest.content), "byte for byte"
        resume = pb.Resume(resume_id=RESUME_ID, after_sequence_number=number)
        assert worker.call.request == pb.GenerateRequest(resume=resume)
    worker.calls.clear()
    assert (await reconnect(http, events[-1].last_event_id, method)).status_code == 204
    assert worker.calls == []


@pytest.mark.parametrize(
    ("script", "status", "code"),
    [
        (NOT_HERE, 410, "stream_gone"),
        (failing(grpc.StatusCode.OUT_OF_RANGE, "m", error_info("STREAM_GONE")), 410, "stream_gone"),
        (failing(grpc.StatusCode.INTERNAL), 500, None),
    ],
)
async def test_what_cannot_be_resumed_is_said(
    http: httpx.AsyncClient, worker: ScriptedWorker, script: Script, status: int, code: str | None
) -> None:
    worker.script = script
    response = await reconnect(http, f"{RESUME_ID}-1")
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


@pytest.mark.parametrize(
    "last_event_id", ["x", "rs_-1", f"{RESUME_ID}-", f"{RESUME_ID}-{'9' * 20}", "é", "a b-1"]
)
async def test_what_is_no_id_asks_nobody(
    http: httpx.AsyncClient, worker: ScriptedWorker, last_event_id: str
) -> None:
    response = await http.get(
        "/v1/streams?prompt=x", headers={b"last-event-id": last_event_id.encode("latin-1")}
    )
    assert response.status_code == 410
    assert worker.calls == []


async def test_an_older_reader_is_told_that_another_took_over(
    http: httpx.AsyncClient, worker: ScriptedWorker
) -> None:
    async def script(call: ScriptedCall) -> None:
        await call.started(resume_id=RESUME_ID)
        await call.fail(grpc.StatusCode.ABORTED, "resumed elsewhere", error_info("TAKEN_OVER"))

    worker.script = script
    with pytest.raises(httpx.RemoteProtocolError):
        await http.get("/v1/streams?prompt=x")  # never closed properly
    async with RawClient(int(http.base_url.port or 0)) as client:
        await client.send(request_bytes("/v1/streams?prompt=x", method="GET"))
        _, stream, is_complete = split_chunked(await client.read_to_end())
    last = parse(stream).events[-1]
    assert not is_complete
    assert (last.type, last.json()["error"]["code"]) == ("failed", "taken_over")
    assert last.last_event_id.endswith("-end"), "it must not fight for the stream"


async def test_a_resumed_stream_that_breaks_off_is_a_failure(
    http: httpx.AsyncClient, worker: ScriptedWorker
) -> None:
    async def script(call: ScriptedCall) -> None:
        call._sequence_number = 2
        await call.delta("b")

    worker.script = script
    async with RawClient(int(http.base_url.port or 0)) as client:
        place = f"{RESUME_ID}-1"
        await client.send(request_bytes("/v1/streams?prompt=x", method="GET", last_event_id=place))
        _, stream, is_complete = split_chunked(await client.read_to_end())
    assert not is_complete
    assert [event.type for event in parse(stream).events] == ["delta", "failed"]


async def test_all_workers_are_asked(worker: ScriptedWorker, target: str) -> None:
    other = ScriptedWorker()
    other.script = kept
    worker.script = NOT_HERE
    server, port = await start_server(other, "127.0.0.1:0")
    lost = "127.0.0.1:1"
    try:
        async with (
            running_edge(f"{target},127.0.0.1:{port},{lost}") as edge,
            httpx.AsyncClient(base_url=edge.url, timeout=PATIENCE, trust_env=False) as http,
        ):
            response = await reconnect(http, f"{RESUME_ID}-1")
            assert [event.type for event in parse(response.content).events] == ["delta", "finished"]
            other.script = NOT_HERE
            gone = await reconnect(http, f"{RESUME_ID}-1")
            assert (gone.status_code, gone.json()["error"]["code"]) == (410, "stream_gone")
    finally:
        await server.stop(0)


async def test_a_worker_that_drains_is_asked_too(worker: ScriptedWorker, target: str) -> None:
    worker.script = kept
    async with (
        running_edge(target) as edge,
        httpx.AsyncClient(base_url=edge.url, timeout=PATIENCE, trust_env=False) as http,
    ):
        await worker.set_serving(False)
        try:
            response = await reconnect(http, f"{RESUME_ID}-1")
        finally:
            await worker.set_serving(True)
    assert [event.type for event in parse(response.content).events] == ["delta", "finished"]


@pytest.mark.parametrize("is_kept", [True, False])
async def test_a_stopping_edge_leaves_a_kept_stream_to_be_resumed_elsewhere(
    worker: ScriptedWorker, target: str, is_kept: bool
) -> None:
    async def script(call: ScriptedCall) -> None:
        await call.started(resume_id=RESUME_ID if is_kept else None)
        await call.delta("a")
        await call.hang()

    worker.script = script
    async with (
        running_edge(target, drain_seconds=0) as edge,
        RawClient(edge.port) as client,
    ):
        await client.send(request_bytes("/v1/streams?prompt=x", method="GET"))
        await client.read_until(b'"text":"a"')
        edge.process.send_signal(signal.SIGTERM)
        _, stream, is_complete = split_chunked(await client.read_to_end())
        assert await edge.wait() == 0
    assert not is_complete
    kinds = [event.type for event in parse(stream).events]
    assert kinds == ["started", "delta", *([] if is_kept else ["failed"])]
