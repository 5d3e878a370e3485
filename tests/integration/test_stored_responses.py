"""Responses that are kept for the resume window: in progress, taken over, cancelled, abandoned, expired."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.edge.sse import parse
from tests.integration.stack import PATIENCE, LoggedProcess, Stack, running_stack

HOUR = 3600
WORDS = "It was a dark and stormy night. "


@pytest.fixture(scope="module")
def slow() -> Iterator[Stack]:
    """A worker that writes for as long as it is let, and windows that no test waits for."""
    worker = {"text": WORDS, "step_milliseconds": 10, "max_resume_seconds": HOUR}
    edge = {"resume_window_seconds": HOUR}
    with running_stack(worker, edge, "inference_worker.scripted_model") as stack:
        yield stack


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "default", "input": "Tell me", "max_output_tokens": 3000} | fields


def call(stack: Stack, method: str, path: str, **fields: Any) -> httpx.Response:
    return httpx.request(method, f"{stack.url}/v1/responses{path}", timeout=PATIENCE, **fields)


def begin(response: httpx.Response) -> tuple[str, Iterator[str]]:
    """The id of a response whose first text has come, and the lines that follow."""
    lines = response.iter_lines()
    for line in lines:
        if line.startswith("data: ") and "output_text.delta" in line:
            break
        if line.startswith("data: ") and '"response.created"' in line:
            created = json.loads(line.removeprefix("data: "))
    return created["response"]["id"], lines


def test_in_progress_taken_over_and_cancelled(slow: Stack) -> None:
    url = f"{slow.url}/v1/responses"
    with httpx.stream("POST", url, json=body(stream=True), timeout=PATIENCE) as first:
        response_id, lines = begin(first)
        now = call(slow, "GET", f"/{response_id}").json()
        assert (now["id"], now["status"], now["store"]) == (response_id, "in_progress", True)
        assert now["max_output_tokens"] == 3000  # of the request, which no edge remembers
        assert next(lines) == ""  # looking at it takes it from nobody
        early = call(slow, "POST", "", json=body(previous_response_id=response_id))
        assert (early.status_code, early.json()["error"]["code"]) == (400, "in_progress")

        with httpx.stream("GET", f"{url}/{response_id}?stream=true", timeout=PATIENCE) as second:
            again, rest = begin(second)
            assert again == response_id
            older: list[str] = []
            with pytest.raises(httpx.RemoteProtocolError):
                older.extend(lines)  # it is not closed properly
            kinds = [line.removeprefix("event: ") for line in older if line.startswith("event: ")]
            assert kinds[-1] == "error"
            assert "response.failed" not in kinds, "it goes on"
            told = [json.loads(line[6:]) for line in older if line.startswith("data: ")][-1]
            assert told["code"] == "taken_over"

            cancelled = call(slow, "POST", f"/{response_id}/cancel")
            assert cancelled.json()["status"] == "cancelled"
            with pytest.raises(httpx.RemoteProtocolError):
                list(rest)
    slow.wait_idle()
    ended = call(slow, "GET", f"/{response_id}").json()
    assert ended["status"] == "cancelled"
    text = ended["output"][0]["content"][0]["text"]
    assert (WORDS * 1000).startswith(text)
    assert call(slow, "POST", f"/{response_id}/cancel").status_code == 400


def test_a_reader_who_leaves_may_come_back_through_another_edge(slow: Stack) -> None:
    url = f"{slow.url}/v1/responses"
    asked = body(stream=True, max_output_tokens=60)
    with httpx.stream("POST", url, json=asked, timeout=PATIENCE) as first:
        response_id, _ = begin(first)
    flags = {"host": "127.0.0.1", "port": 0, "worker": slow.worker_address}
    edge = LoggedProcess("edge", flags)
    port = edge.wait_for_line(event="edge listening")["port"]
    again = f"http://127.0.0.1:{port}/v1/responses/{response_id}?stream=true"
    whole = httpx.get(again, timeout=PATIENCE).content
    events = parse(whole).events
    assert events[-1].type == "response.incomplete"
    assert [event.json()["sequence_number"] for event in events] == list(range(len(events)))
    assert events[-1].json()["response"] == call(slow, "GET", f"/{response_id}").json()
    for number in (0, 4, len(events) - 2):
        rest = httpx.get(f"{again}&starting_after={number}", timeout=PATIENCE).content
        assert parse(rest).events == events[number + 1 :]
    assert edge.stop() == 0


def test_a_deleted_response_is_ended_and_gone(slow: Stack) -> None:
    with httpx.stream(
        "POST", f"{slow.url}/v1/responses", json=body(stream=True), timeout=PATIENCE
    ) as running:
        response_id, lines = begin(running)
        deleted = call(slow, "DELETE", f"/{response_id}")
        assert deleted.json() == {"id": response_id, "object": "response", "deleted": True}
        assert call(slow, "GET", f"/{response_id}").status_code == 404
        with pytest.raises(httpx.RemoteProtocolError):
            list(lines)
    slow.wait_idle()
    ended = call(slow, "POST", "", json=body(max_output_tokens=2)).json()["id"]
    assert call(slow, "DELETE", f"/{ended}").json()["deleted"]
    for name in (ended, response_id, "resp_1", f"resp_{'0' * 32}"):
        gone = call(slow, "DELETE", f"/{name}")
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "response_not_found")


def test_an_answer_in_one_piece_that_nobody_waits_for_ends_at_once(slow: Stack) -> None:
    """Nobody has heard its id, so nobody can come back for it."""
    payload = json.dumps(body()).encode()
    head = f"POST /v1/responses HTTP/1.1\r\nhost: edge\r\ncontent-length: {len(payload)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", slow.edge_port), timeout=PATIENCE) as connection:
        connection.sendall(head.encode() + payload)
        slow.wait_load(lambda load: load.running == 1)
        num_lines = len(slow.worker.lines)
    slow.wait_idle()
    deadline = time.monotonic() + PATIENCE
    while not (
        ended := [line for line in slow.worker.lines[num_lines:] if "finish_reasons" in line]
    ):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert ended[0]["finish_reasons"] == ["CANCELLED"], "it did not run to its end"


@pytest.mark.parametrize(
    ("path", "status", "param"),
    [
        ("/resp_1", 404, "response_id"),
        (f"/resp_{'0' * 32}", 404, "response_id"),
        (f"/resp_rs_{'0' * 48}", 404, "response_id"),
        (f"/resp_rs_{'0' * 48}?stream=true", 404, "response_id"),
        ("/resp_1?stream=true", 404, "response_id"),
        ("/resp_1?starting_after=1", 400, "starting_after"),
        ("/resp_1?stream=true&starting_after=-1", 400, "starting_after"),
        ("/resp_1?nonsense=1", 400, "nonsense"),
    ],
)
def test_what_is_not_there_is_said_as_openai_does(
    slow: Stack, path: str, status: int, param: str
) -> None:
    response = call(slow, "GET", path)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param)
    if status == 404:
        assert (error["type"], error["code"]) == ("not_found_error", "response_not_found")


def test_what_is_too_large_to_keep_is_not_stored_and_says_so(slow: Stack) -> None:
    large = body(metadata={"note": "x" * 1024 * 1024}, max_output_tokens=2)
    answer = call(slow, "POST", "", json=large).json()
    assert (answer["status"], answer["store"]) == ("incomplete", False)
    assert call(slow, "GET", f"/{answer['id']}").status_code == 404


def test_a_window_that_passes_ends_it(slow: Stack) -> None:
    flags = {"host": "127.0.0.1", "port": 0, "worker": slow.worker_address}
    edge = LoggedProcess("edge", flags | {"resume_window_seconds": 0.1})
    url = f"http://127.0.0.1:{edge.wait_for_line(event='edge listening')['port']}/v1/responses"
    with httpx.stream("POST", url, json=body(stream=True), timeout=PATIENCE) as response:
        response_id, _ = begin(response)
    slow.wait_idle()
    assert httpx.get(f"{url}/{response_id}", timeout=PATIENCE).status_code == 404
    later = body(previous_response_id=response_id)
    gone = httpx.post(url, json=later, timeout=PATIENCE)
    assert (gone.status_code, gone.json()["error"]["param"]) == (404, "previous_response_id")
    assert edge.stop() == 0


def test_a_conversation_goes_on_without_its_earlier_instructions(slow: Stack) -> None:
    def count(**fields: Any) -> tuple[str, int]:
        answer = call(slow, "POST", "", json=body(max_output_tokens=5, **fields)).json()
        return answer["id"], answer["usage"]["input_tokens"]

    first, _ = count(instructions="Be brief. " * 50, input="One")
    second, short = count(previous_response_id=first, input="Two")
    _, longer = count(previous_response_id=second, input="Three")
    text = (WORDS * 3)[
        : len(call(slow, "GET", f"/{second}").json()["output"][0]["content"][0]["text"])
    ]
    said = [("user", "One"), ("assistant", text), ("user", "Two")]
    _, spelled = count(input=[{"role": role, "content": content} for role, content in said])
    assert short == spelled
    said += [("assistant", text), ("user", "Three")]
    _, spelled = count(input=[{"role": role, "content": content} for role, content in said])
    assert longer == spelled
