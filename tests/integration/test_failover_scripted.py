"""Streams that lose their worker, whatever their dialect: read again, stored, too costly or too long to be moved."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from tests.edge.sse import parse
from tests.integration.several_workers import (
    running_cluster,
    wait_until,
)
from tests.integration.stack import PATIENCE
from tests.integration.stream_parts import number_of, read_native

SCRIPTED = "inference_worker.scripted_model"


def test_a_reader_who_comes_back_after_a_failover_misses_nothing() -> None:
    body = {"prompt": "go", "max_tokens": 1000, "resume_window": 60}
    with (
        running_cluster(2, {"step_milliseconds": 5}, worker_module=SCRIPTED) as cluster,
        httpx.Client(base_url=cluster.url, timeout=PATIENCE, trust_env=False) as http,
    ):
        uncut = read_native(parse(http.post("/v1/streams", json=body).content).events)
        with http.stream("POST", "/v1/streams", json=body) as response:
            pieces = response.iter_bytes()
            data = b""
            while b"event: delta" not in data:
                data += next(pieces)
            (worker,) = (worker for worker in cluster.workers if worker.load().running)
            worker.send(signal.SIGKILL)
            wait_until(lambda: bool(cluster.lines("stream lost its worker")))
            (loss,) = cluster.lines("stream lost its worker")
            assert loss["outcome"] == "continued"
            while number_of(parse(data).events[-1]) <= loss["sequence_number"]:
                data += next(pieces)
        events = parse(data).events  # and then the connection broke
        assert events[-1].type == "delta"
        headers = {"last-event-id": events[-1].last_event_id}
        rest = http.post("/v1/streams", json=body, headers=headers)
        assert rest.status_code == 200
        assert read_native([*events, *parse(rest.content).events]) == uncut


def test_a_stored_response_that_moved_can_be_ended_though_its_beginning_is_lost() -> None:
    body = {"model": "default", "input": "go", "max_output_tokens": 4000, "stream": True}
    flags = {"step_milliseconds": 5}
    with (
        running_cluster(2, flags, worker_module=SCRIPTED) as cluster,
        httpx.Client(base_url=cluster.url, timeout=PATIENCE, trust_env=False) as http,
        http.stream("POST", "/v1/responses", json=body) as response,
    ):
        data = b""
        pieces = response.iter_bytes()
        while b"output_text.delta" not in data:
            data += next(pieces)
        path = f"/v1/responses/{parse(data).events[0].json()['response']['id']}"
        (worker,) = (worker for worker in cluster.workers if worker.load().running)
        worker.send(signal.SIGKILL)
        wait_until(lambda: bool(cluster.lines("stream lost its worker")))
        for query in ("", "?stream=true"):
            lost = http.get(path + query)
            assert lost.status_code == 404
            assert "beginning" in lost.json()["error"]["message"]
        assert http.post(f"{path}/cancel").json()["status"] == "cancelled"
        with pytest.raises(httpx.RemoteProtocolError):
            list(pieces)
        assert http.delete(path).json()["deleted"]
        assert http.delete(path).status_code == 404


def test_responses_and_chats_that_are_read_again_outlive_their_worker_too() -> None:
    parts = [{"type": "text", "text": "go"}]
    messages = [{"id": "m1", "role": "user", "parts": parts}]
    # four seconds of tokens, for all that is to come before the first of these streams ends
    asked = {"model": "default", "input": "go", "max_output_tokens": 400, "stream": True}
    with (
        running_cluster(2, {"step_milliseconds": 10}, worker_module=SCRIPTED) as cluster,
        httpx.Client(base_url=cluster.url, timeout=PATIENCE, trust_env=False) as http,
        ExitStack() as stack,
    ):
        unread = []  # one that is not referred to would be closed

        def begin(method: str, path: str, body: Any = None) -> tuple[bytes, Iterator[bytes]]:
            response = stack.enter_context(http.stream(method, path, json=body))
            assert response.status_code == 200
            pieces, data = response.iter_bytes(), b""
            unread.append(pieces)
            while b"delta" not in data:
                data += next(pieces)
            return data, pieces

        paths = []
        for _ in range(2):  # one of each on either worker
            data, _ = begin("POST", "/v1/responses", asked)
            response_id = parse(data).events[0].json()["response"]["id"]
            paths.append(f"/v1/responses/{response_id}?stream=true&starting_after=0")
        for number in range(2):
            chat = {"id": f"c{number}", "messages": messages, "maxOutputTokens": 400}
            begin("POST", "/api/chat", chat)
            paths.append(f"/api/chat/c{number}/stream")
        again = [begin("GET", path) for path in paths]
        assert [worker.load().requests for worker in cluster.workers] == [2, 2]
        cluster.workers[0].send(signal.SIGKILL)
        texts = set()
        for data, pieces in again:
            events = parse(data + b"".join(pieces)).events
            told = [event.json() for event in events if event.data != "[DONE]"]
            assert told[-1]["type"] in ("response.completed", "response.incomplete", "finish")
            texts.add("".join(one["delta"] for one in told if one["type"].endswith("delta")))
        assert len(texts) == 1  # those that moved are like those that did not
        moves = cluster.lines("stream lost its worker")
        assert [line["outcome"] for line in moves] == ["continued"] * 2


def stream_until_text(http: httpx.Client, body: dict[str, Any]) -> Iterator[str]:
    """The lines of a stream of completions; what is read first is text."""
    body = {"model": "default", "prompt": "go", "stream": True, **body}
    with http.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        try:
            yield from filter(None, response.iter_lines())
        except httpx.RemoteProtocolError:  # how a stream ends that failed
            return


def test_a_request_that_kills_workers_is_not_tried_for_ever() -> None:
    flags = {"crashing_seed": 13, "step_milliseconds": 1}
    with (
        running_cluster(3, flags, {"failover_attempts": 1}, SCRIPTED) as cluster,
        httpx.Client(base_url=cluster.url, timeout=PATIENCE, trust_env=False) as http,
    ):
        *_, last = stream_until_text(http, {"max_tokens": 9, "seed": 13})
        assert json.loads(last.removeprefix("data: "))["error"]["type"] == "unavailable"

        def ended() -> list[int | None]:
            codes = [worker.log.process.poll() for worker in cluster.workers]
            return [code for code in codes if code is not None]

        wait_until(lambda: len(ended()) == 2)
        assert ended() == [1, 1]
        *_, last = stream_until_text(http, {"max_tokens": 9, "seed": 14})
        assert last == "data: [DONE]"  # the third one is there for others
        assert len(ended()) == 2


def test_where_failover_is_off_the_client_is_told() -> None:
    with (
        running_cluster(2, {"step_milliseconds": 5}, {"failover_attempts": 0}, SCRIPTED) as cluster,
        httpx.Client(base_url=cluster.url, timeout=PATIENCE, trust_env=False) as http,
    ):
        lines = stream_until_text(http, {"max_tokens": 3000})
        next(lines)
        for worker in cluster.workers:
            if worker.load().running:
                worker.send(signal.SIGKILL)
        *_, last = lines
        assert json.loads(last.removeprefix("data: "))["error"]["type"] == "unavailable"


def test_a_stream_longer_than_is_remembered_is_not_continued() -> None:
    flags = {"failover_tokens": 5}
    with (
        running_cluster(2, {"step_milliseconds": 5}, flags, SCRIPTED) as cluster,
        httpx.Client(base_url=cluster.url, timeout=PATIENCE, trust_env=False) as http,
    ):
        lines = stream_until_text(http, {"max_tokens": 3000})
        text = ""
        while len(text) < 200:  # more than five tokens
            text += json.loads(next(lines).removeprefix("data: "))["choices"][0]["text"]
        for worker in cluster.workers:
            if worker.load().running:
                worker.send(signal.SIGKILL)
        *_, last = lines
        assert json.loads(last.removeprefix("data: "))["error"]["type"] == "unavailable"
        wait_until(lambda: bool(cluster.lines("stream lost its worker")))
        (loss,) = cluster.lines("stream lost its worker")
        assert loss["outcome"] == "failed"
