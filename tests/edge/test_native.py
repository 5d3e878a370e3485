"""The native dialect: typed events, EventSource, abort."""

from typing import Any

import httpx
import pytest

from protos.sluice.v1 import generation_pb2 as pb
from tests.edge.scripted_worker import CREATED, MODEL, ScriptedCall, ScriptedWorker, texts
from tests.edge.sse import parse


async def test_exact_bytes(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    worker.script = texts(["Hi\n", "ö\u2028"])
    response = await http.post("/v1/streams", json={"prompt": "x"})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    request_id = worker.call.request.request_id
    assert request_id.startswith("stream-")
    expected = (
        f'event: started\ndata: {{"request_id":"{request_id}",'
        f'"model":"{MODEL}","created":{CREATED},"prompt_tokens":7,"cached_tokens":2,'
        '"queue_position":0,"max_tokens":16,"n":1,"sampling":{"temperature":0.7,"seed":42}}\n'
        f"id: {request_id}-0\n\n"
        'event: delta\ndata: {"choice_index":0,"text":"Hi\\n","token_count":1}\n'
        f"id: {request_id}-1\n\n"
        'event: delta\ndata: {"choice_index":0,"text":"ö\\u2028","token_count":1}\n'
        f"id: {request_id}-2\n\n"
        'event: finished\ndata: {"choice_index":0,'
        '"finish_reason":"stop","usage":{"prompt_tokens":7,"completion_tokens":2,'
        '"cached_tokens":4},"timings":{"queued_seconds":1.5}}\n'
        f"id: {request_id}-3-end\n\n"
    )
    assert response.content == expected.encode()


async def test_only_the_last_finished_is_terminal(
    http: httpx.AsyncClient, worker: ScriptedWorker
) -> None:
    async def script(call: ScriptedCall) -> None:
        await call.started()
        await call.finished(
            pb.FINISH_REASON_STOP_SEQUENCE, 1, completion_tokens=None, stop_sequence="END"
        )
        await call.delta("x", 0, token_ids=[9])
        await call.finished(choice=0, stop_token_id=0)

    worker.script = script
    response = await http.post("/v1/streams", json={"prompt": "x", "n": 2})
    events = parse(response.content).events
    assert [event.type for event in events] == ["started", "finished", "delta", "finished"]
    assert [event.last_event_id.endswith("-end") for event in events] == [False, False, False, True]
    assert events[1].json() == {
        "choice_index": 1,
        "finish_reason": "stop_sequence",
        "stop_sequence": "END",
    }
    assert events[2].json()["token_ids"] == [9]
    assert events[3].json()["stop_token_id"] == 0


async def test_heartbeats_are_comments(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    async def script(call: ScriptedCall) -> None:
        await call.started()
        await call.send(heartbeat=pb.Heartbeat())
        await call.finished()

    worker.script = script
    parsed = parse((await http.post("/v1/streams", json={"prompt": "x"})).content)
    assert parsed.comments == ["ping"]
    assert [event.type for event in parsed.events] == ["started", "finished"]


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ({"prompt": ""}, "text"),
        ({"prompt": "x"}, "text"),
        ({"token_ids": [1, 2]}, "token_ids"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "chat"),
    ],
)
async def test_inputs(
    http: httpx.AsyncClient, worker: ScriptedWorker, body: dict[str, Any], kind: str
) -> None:
    assert (await http.post("/v1/streams", json=body)).status_code == 200
    assert worker.call.request.prompt.WhichOneof("input") == kind


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "x", "token_ids": [1]}, "token_ids"),
        ({"token_ids": []}, "token_ids"),
        ({"messages": []}, "messages"),
        ({"prompt": "x", "stream": True}, "stream"),
        ({"prompt": "x", "max_tokens": "5"}, "max_tokens"),
    ],
)
async def test_bad_inputs(http: httpx.AsyncClient, body: dict[str, Any], param: str) -> None:
    response = await http.post("/v1/streams", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


async def test_get_is_the_same_stream(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    response = await http.get(
        "/v1/streams",
        params=[
            ("prompt", "grüß & co"),
            ("max_tokens", "5"),
            ("temperature", "0.5"),
            ("top_k", "-1"),
            ("seed", "7"),
            ("n", "1"),
            ("priority", "-5"),
            ("ignore_eos", "true"),
            ("stop", "a"),
            ("stop", "b"),
            ("stop_token_ids", "3"),
            ("model", "default"),
        ],
    )
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert [event.type for event in parse(response.content).events] == [
        "started",
        *["delta"] * 3,
        "finished",
    ]
    request = worker.call.request
    assert request.prompt.text == "grüß & co"
    assert request.priority == -5
    assert request.sampling == pb.Sampling(temperature=0.5, seed=7)
    assert request.stopping == pb.Stopping(
        max_tokens=5, stop_sequences=["a", "b"], stop_token_ids=[3], ignore_eos=True
    )


async def test_priority(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    await http.post("/v1/streams", json={"prompt": "x", "priority": 7})
    assert worker.call.request.priority == 7
    answer = await http.post("/v1/streams", json={"prompt": "x", "priority": 2**31})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "priority")


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("", "prompt"),
        ("prompt=x&nonsense=1", "nonsense"),
        ("prompt=x&max_tokens=five", "max_tokens"),
        ("prompt=x&max_tokens=-1", "max_tokens"),
        ("prompt=x&prompt=y", "prompt"),
        ("prompt=x&logit_bias=1", "logit_bias"),
    ],
)
async def test_bad_queries(http: httpx.AsyncClient, query: str, param: str) -> None:
    response = await http.get(f"/v1/streams?{query}")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_reconnecting_after_the_end_is_a_204(
    http: httpx.AsyncClient, worker: ScriptedWorker, method: str
) -> None:
    async def again(last_event_id: str) -> httpx.Response:
        return await http.request(
            method,
            "/v1/streams?prompt=x",
            json={"prompt": "x"} if method == "POST" else None,
            headers={"last-event-id": last_event_id},
        )

    events = parse((await http.get("/v1/streams?prompt=x")).content).events
    worker.calls.clear()
    ended = await again(events[-1].last_event_id)
    assert (ended.status_code, ended.content) == (204, b"")
    for unfinished in (events[0].last_event_id, events[-2].last_event_id, "made-up"):
        gone = await again(unfinished)
        assert gone.status_code == 410
        assert gone.json()["error"]["code"] == "resume_not_supported"
        assert gone.headers["x-should-retry"] == "false"
    assert worker.calls == [], "nothing may be generated anew behind the reader's back"
    assert (await again("")).status_code == 200


async def test_reconnecting_after_a_failure_is_a_204(
    http: httpx.AsyncClient, worker: ScriptedWorker
) -> None:
    response = await http.get(
        "/v1/streams?prompt=x", headers={"last-event-id": f"stream-{'0' * 32}-12-end"}
    )
    assert response.status_code == 204
    assert worker.calls == []


@pytest.mark.parametrize(
    ("outcome", "status", "word"),
    [
        (pb.ABORT_OUTCOME_ABORTED, 200, "aborted"),
        (pb.ABORT_OUTCOME_ALREADY_FINISHED, 200, "already_finished"),
        (pb.ABORT_OUTCOME_UNKNOWN, 404, None),
    ],
)
async def test_delete_says_what_it_did(
    http: httpx.AsyncClient,
    worker: ScriptedWorker,
    outcome: pb.AbortOutcome.ValueType,
    status: int,
    word: str | None,
) -> None:
    worker.abort_outcome = outcome
    response = await http.delete("/v1/streams/stream-1")
    assert response.status_code == status
    assert worker.aborted == ["stream-1"]
    if word is not None:
        assert response.json() == {"request_id": "stream-1", "outcome": word}
    else:
        assert response.json()["error"]["code"] == "request_not_found"


async def test_delete_refuses_what_is_no_id(
    http: httpx.AsyncClient, worker: ScriptedWorker
) -> None:
    assert (await http.delete("/v1/streams/a%20b")).status_code == 400
    assert (await http.delete("/v1/streams/" + "a" * 129)).status_code == 400
    assert worker.aborted == []


@pytest.mark.parametrize("value", [True, False, None])
async def test_special_tokens_are_asked_for_by_name(
    http: httpx.AsyncClient, worker: ScriptedWorker, value: bool | None
) -> None:
    field = {} if value is None else {"special_tokens": value}
    await http.post("/v1/streams", json={"prompt": "hi"} | field)
    query = {"prompt": "hi"} | ({} if value is None else {"special_tokens": str(value).lower()})
    await http.get("/v1/streams", params=query)
    for call in worker.calls:
        prompt = call.request.prompt
        assert (prompt.special_tokens if prompt.HasField("special_tokens") else None) is value
    assert len(worker.calls) == 2
