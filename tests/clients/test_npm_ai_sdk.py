"""useChat and useCompletion of npm's @ai-sdk/react, rendered, with nothing but the api's address changed."""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from protos.sluice.v1 import generation_pb2 as pb
from tests.clients.contract import COUNT, COUNTED, ENDLESS, occupied, partly
from tests.clients.foreign_process import ForeignProcess
from tests.clients.node_clients import NodeClients
from tests.edge.edge_process import EdgeProcess
from tests.edge.scripted_worker import ScriptedWorker
from tests.integration.stack import PATIENCE, LoggedProcess, Stack

PATHS = {"data": "/api/chat", "text": "/api/text"}
PROTOCOLS = pytest.mark.parametrize("protocol", PATHS)
GREEDY = {"temperature": 0}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "Name of the city"}},
    "required": ["city"],
}
WEATHER = {"get_weather": {"description": "Tells the weather", "inputSchema": SCHEMA}}
RESULT = "18 degrees and sunny"
SCRIPT = "The quick brown fox jumps over the lazy dog. "  # what the slow stack says
TOLD = "The server failed to process the request."  # of any failure inside


@pytest.fixture(scope="module")
def hooks(node_clients: NodeClients) -> Iterator[ForeignProcess]:
    with node_clients.run("ai_sdk.mjs") as process:
        yield process


def said(page: dict[str, Any]) -> list[tuple[str, str]]:
    """Who said what, on a page."""
    return [
        (message["role"], "".join(part.get("text", "") for part in message["parts"]))
        for message in page["messages"]
    ]


def answer(stack: Stack, *said: str) -> str:
    """What the worker itself says next in a conversation."""
    roles = itertools.cycle(("user", "assistant"))
    messages = [pb.ChatMessage(role=next(roles), content=text) for text in said]
    request = pb.GenerateRequest(
        prompt=pb.Prompt(chat=pb.Chat(messages=messages)), sampling=pb.Sampling(temperature=0)
    )
    return "".join(message.delta.text for message in stack.stub.Generate(request, timeout=PATIENCE))


@PROTOCOLS
def test_a_conversation(hooks: ForeignProcess, stack: Stack, protocol: str) -> None:
    page = hooks.call(
        "chat",
        url=stack.url,
        path=PATHS[protocol],
        protocol=protocol,
        turns=[COUNT, COUNT],
        body={**GREEDY, "sessionId": "the application's own"},
    )
    again = answer(stack, COUNT, COUNTED, COUNT)
    assert again != COUNTED, "it would not show that the model was told what it had said"
    assert [text for _, text in said(page)] == [COUNT, COUNTED, COUNT, again]
    assert (page["status"], page["error"]) == ("ready", None)
    # a text stream cannot tell why it ended
    assert page["finish_reasons"] == [{"data": "stop", "text": None}[protocol]] * 2


def test_a_cut_answer_says_so_and_tells_its_usage(hooks: ForeignProcess, stack: Stack) -> None:
    page = hooks.call(
        "chat",
        url=stack.url,
        path="/api/chat",
        turns=[COUNT],
        body={**GREEDY, "maxOutputTokens": 3, "sendUsage": True},
    )
    assert COUNTED.startswith(said(page)[1][1])
    assert page["finish_reasons"] == ["length"]
    usage = page["messages"][1]["metadata"]["usage"]
    assert usage["outputTokens"] == 3
    assert usage["totalTokens"] == usage["inputTokens"] + 3


def test_an_answer_again(hooks: ForeignProcess, stack: Stack) -> None:
    given = {"url": stack.url, "path": "/api/chat", "turns": [COUNT], "body": GREEDY}
    pages = hooks.call("regenerate", **given)
    assert (
        said(pages["before"]) == said(pages["after"]) == [("user", COUNT), ("assistant", COUNTED)]
    )
    assert pages["before"]["messages"][1]["id"] != pages["after"]["messages"][1]["id"]


@pytest.mark.parametrize(("path", "protocol"), [("/api/completion", "data"), ("/api/text", "text")])
def test_a_completion(hooks: ForeignProcess, stack: Stack, path: str, protocol: str) -> None:
    given = {"url": stack.url, "path": path, "protocol": protocol, "body": GREEDY}
    completion = hooks.call("complete", prompt=COUNT, **given)
    assert completion == {"text": COUNTED, "returned": COUNTED, "finished": 1, "error": None}


def test_a_tool_that_the_page_runs(hooks: ForeignProcess, stack: Stack) -> None:
    page = hooks.call(
        "use_tool",
        url=stack.url,
        path="/api/chat",
        turn="What is the weather in Paris?",
        output=RESULT,
        body={**GREEDY, "tools": WEATHER},
    )
    assert page["error"] is None
    (question, answer) = page["messages"]
    assert question["role"] == "user"
    call, told = (part for part in answer["parts"] if part["type"] != "step-start")
    assert (call["type"], call["state"]) == ("tool-get_weather", "output-available")
    assert (call["input"], call["output"]) == ({"city": "Paris"}, RESULT)
    assert told["text"] == f"The weather in Paris: {RESULT}"
    assert page["finish_reasons"] == ["tool-calls", "stop"]


@PROTOCOLS
@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"temperature": 200}, 400, "temperature"),
        ({"model": "gpt-99"}, 404, "gpt-99"),
    ],
)
def test_a_refusal_in_words(
    hooks: ForeignProcess,
    stack: Stack,
    protocol: str,
    body: dict[str, Any],
    status: int,
    words: str,
) -> None:
    given = {"url": stack.url, "path": PATHS[protocol], "protocol": protocol, "body": body}
    page = hooks.call("chat", turns=[COUNT], **given)
    assert (page["status"], page["error"]["status"]) == ("error", status)
    assert words in page["error"]["message"]
    with pytest.raises(json.JSONDecodeError):  # words, and no object around them
        json.loads(page["error"]["message"])


@PROTOCOLS
def test_overload(hooks: ForeignProcess, slow_stack: Stack, protocol: str) -> None:
    with occupied(slow_stack):
        given = {"url": slow_stack.url, "path": PATHS[protocol], "protocol": protocol}
        page = hooks.call("chat", turns=[COUNT], **given)
    assert page["error"]["status"] == 429


# Longer than anybody waits: whatever is freed before is not freed by the window's end.
WINDOW = {"resumeWindow": 300}


@PROTOCOLS
def test_the_stop_button_frees_the_sequence(
    hooks: ForeignProcess, slow_stack: Stack, protocol: str
) -> None:
    before = slow_stack.load().generated_tokens
    page = hooks.call(
        "stop",
        url=slow_stack.url,
        path=PATHS[protocol],
        protocol=protocol,
        turn=COUNT,
        body={"maxOutputTokens": ENDLESS} | WINDOW,
    )
    assert page["status"] == "ready"
    slow_stack.wait_idle()
    assert slow_stack.load().generated_tokens - before < ENDLESS, "it ended by itself"


TOKENS = 100
BODY = {
    "maxOutputTokens": TOKENS,
    "sendUsage": True,
    "ignored": "by the application's own",
} | WINDOW


def assert_whole(page: dict[str, Any], before: dict[str, Any]) -> None:
    """The answer after a resume: that of the page before, and the rest of it, exactly."""
    assert page["error"] is None
    (asked, (role, text)), ((_, begun),) = said(page), said(before)[1:]
    assert (asked, role) == (("user", COUNT), "assistant")
    assert text.startswith(begun)
    assert len(begun) < len(text), "nothing was left to resume"
    assert (SCRIPT * TOKENS).startswith(text), "a token is lost or repeated"
    assert page["messages"][1]["id"] == before["messages"][1]["id"]
    assert page["messages"][1]["metadata"]["usage"]["outputTokens"] == TOKENS
    assert page["finish_reasons"] == ["length"]


def test_a_stopped_answer_goes_on_when_the_page_is_loaded_again(
    hooks: ForeignProcess, slow_stack: Stack
) -> None:
    given = {"url": slow_stack.url, "path": "/api/chat", "body": BODY}
    before = hooks.call("stop", turn=COUNT, **given)
    slow_stack.wait_idle()
    after = hooks.call("reload", id=before["id"], messages=before["messages"], **given)
    assert_whole(after, before)


def test_an_answer_outlives_a_killed_edge(hooks: ForeignProcess, slow_stack: Stack) -> None:
    flags = {"host": "127.0.0.1", "port": 0, "worker": slow_stack.worker_address}
    edge = LoggedProcess("edge", flags)
    given = {"path": "/api/chat", "body": BODY}
    url = f"http://127.0.0.1:{edge.wait_for_line(event='edge listening')['port']}"
    hooks.call("begin", url=url, turn=COUNT, **given)
    edge.stop(signal.SIGKILL)
    before = hooks.call("end")
    assert before["error"]
    slow_stack.wait_idle()
    chat = {"id": before["id"], "messages": before["messages"]}
    assert_whole(hooks.call("reload", url=slow_stack.url, **chat, **given), before)


def test_a_chat_with_nothing_to_resume_is_ready(hooks: ForeignProcess, stack: Stack) -> None:
    page = hooks.call("chat", url=stack.url, path="/api/chat", id="new", resume=True, turns=[])
    assert (page["status"], page["error"], page["messages"]) == ("ready", None, [])


@PROTOCOLS
async def test_a_failure_midway_is_no_success(
    hooks: ForeignProcess, edge: EdgeProcess, worker: ScriptedWorker, protocol: str
) -> None:
    worker.script = partly
    given = {"url": edge.url, "path": PATHS[protocol], "protocol": protocol}
    page = await asyncio.to_thread(hooks.call, "chat", turns=["x"], **given)
    assert page["status"] == "error"
    assert said(page)[-1] == ("assistant", "partly")
    if protocol == "data":  # what a text stream cannot tell
        assert page["error"]["message"] == TOLD


@pytest.mark.parametrize(("path", "protocol"), [("/api/completion", "data"), ("/api/text", "text")])
async def test_a_completion_that_fails_midway(
    hooks: ForeignProcess, edge: EdgeProcess, worker: ScriptedWorker, path: str, protocol: str
) -> None:
    worker.script = partly
    given = {"url": edge.url, "path": path, "protocol": protocol}
    completion = await asyncio.to_thread(hooks.call, "complete", prompt="x", **given)
    assert (completion["returned"], completion["finished"]) == (None, 0)
    assert completion["error"]
