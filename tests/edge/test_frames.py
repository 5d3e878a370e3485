"""The native dialect as frames, read by the example's reader from the real edge before a scripted worker."""

import ast
import asyncio
import io
import json
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from edge.dialects.native_frames import are_wanted
from examples import typed_stream
from examples.typed_stream import Delta, Finished, Started, read_stream
from protos.sluice.v1 import generation_pb2 as pb
from tests.edge.edge_process import EdgeProcess, running_edge
from tests.edge.scripted_worker import ScriptedCall, ScriptedWorker, failing
from tests.edge.sse import parse
from tests.patience import PATIENCE

FRAMES = {"accept": "application/octet-stream"}
BODY = {"prompt": "x"}


def read_all(edge: EdgeProcess, frames: list[Any], **fields: Any) -> None:
    """What the example's main does; frames that came before a failure are in the list."""
    headers = {"content-type": "application/json", **FRAMES}
    data = json.dumps(BODY | fields).encode()
    request = urllib.request.Request(f"{edge.url}/v1/streams", data, headers)  # noqa: S310
    with urllib.request.urlopen(request, timeout=PATIENCE) as response:  # noqa: S310
        assert response.headers["content-type"] == "application/octet-stream"
        frames.extend(read_stream(response))


async def read(edge: EdgeProcess, **fields: Any) -> list[Any]:
    frames: list[Any] = []
    await asyncio.to_thread(read_all, edge, frames, **fields)
    return frames


async def test_header_items_and_footer(edge: EdgeProcess) -> None:
    frames = await read(edge)
    assert [type(frame) for frame in frames] == [Started, Delta, Delta, Delta, Finished]
    assert "".join(frame.text for frame in frames[1:4]) == "Hello wörld"
    assert (frames[0].model, frames[0].n) == ("org/tiny", 1)
    assert (frames[-1].finish_reason, frames[-1].usage["completion_tokens"]) == ("stop", 3)


async def test_there_is_a_footer_for_each_choice(edge: EdgeProcess) -> None:
    frames = await read(edge, n=3)
    footers = [frame for frame in frames if isinstance(frame, Finished)]
    assert [footer.choice_index for footer in footers] == [0, 1, 2]
    assert [footer.usage is not None for footer in footers] == [False, False, True]


@pytest.mark.parametrize("method", ["POST", "GET"])
async def test_a_frame_holds_what_the_event_holds(http: httpx.AsyncClient, method: str) -> None:
    asked: dict[str, Any] = {"json": BODY} if method == "POST" else {"params": BODY}
    events = parse((await http.request(method, "/v1/streams", **asked)).content).events
    answer = await http.request(method, "/v1/streams", headers=FRAMES, **asked)
    source, frames = io.BytesIO(answer.content), []
    while head := source.read(5):
        frames.append((head[0], json.loads(source.read(int.from_bytes(head[1:], "big")))))
    tags = {"started": 2, "delta": 3, "finished": 4}
    expected = [(tags[event.type], event.json()) for event in events]
    for _, data in (frames[0], expected[0]):
        data.pop("request_id")
    assert frames == expected


async def test_every_cut_is_told_from_a_whole_stream(http: httpx.AsyncClient) -> None:
    whole = (await http.post("/v1/streams", json=BODY, headers=FRAMES)).content
    assert len(list(read_stream(io.BytesIO(whole)))) == 5
    for size in range(len(whole)):
        with pytest.raises(EOFError):
            list(read_stream(io.BytesIO(whole[:size])))


async def test_an_edge_that_is_killed_cuts_the_stream(worker: ScriptedWorker, target: str) -> None:
    async def script(call: ScriptedCall) -> None:
        await call.started()
        await call.delta("partly")
        await call.hang()

    worker.script = script
    async with running_edge(target) as edge:
        frames: list[Any] = []
        reading = asyncio.create_task(asyncio.to_thread(read_all, edge, frames))
        async with asyncio.timeout(PATIENCE):
            while len(frames) < 2:
                await asyncio.sleep(0.01)
        edge.process.kill()
        with pytest.raises(EOFError):
            await asyncio.wait_for(reading, PATIENCE)


@pytest.mark.parametrize("is_frame", [True, False])
async def test_a_failure_midway_is_a_frame_of_its_own_and_a_cut(
    edge: EdgeProcess, http: httpx.AsyncClient, worker: ScriptedWorker, is_frame: bool
) -> None:
    async def script(call: ScriptedCall) -> None:
        await call.started()
        await call.delta("partly")
        await call.fail(grpc.StatusCode.INTERNAL)

    worker.script = script
    if is_frame:
        frames: list[Any] = []
        with pytest.raises(RuntimeError, match="failed to process"):
            await asyncio.to_thread(read_all, edge, frames)
        assert [type(frame) for frame in frames] == [Started, Delta]
    else:
        with pytest.raises(httpx.RemoteProtocolError):
            await http.post("/v1/streams", json=BODY, headers=FRAMES)


async def test_a_refusal_is_a_status_with_json(
    http: httpx.AsyncClient, worker: ScriptedWorker
) -> None:
    worker.script = failing(grpc.StatusCode.RESOURCE_EXHAUSTED)
    answer = await http.post("/v1/streams", json=BODY, headers=FRAMES)
    assert answer.status_code == 429
    assert answer.json()["error"]["type"] == "overloaded"


async def test_a_stream_that_stays_silent_has_no_pings(worker: ScriptedWorker, target: str) -> None:
    async def script(call: ScriptedCall) -> None:
        await asyncio.sleep(1.5)
        await call.started()
        await asyncio.sleep(1)
        await call.send(heartbeat=pb.Heartbeat())
        await call.delta("late")
        await call.finished()

    worker.script = script
    async with running_edge(target, first_message_seconds=0.3, heartbeat_seconds=0.2) as edge:
        assert [type(frame) for frame in await read(edge)] == [Started, Delta, Finished]


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("application/octet-stream", True),
        ("Application/Octet-Stream;q=0.5, */*;q=0.1", True),
        ("text/event-stream, application/octet-stream", False),
        ("application/octet-stream;q=0, */*", False),
        ("application/octet-stream; q=0.0", False),
        ("*/*", False),
        ("text/event-stream", False),
        ("", False),
    ],
)
def test_who_gets_frames(accept: str, expected: bool) -> None:
    assert are_wanted(accept) is expected


def test_the_reader_needs_pydantic_alone() -> None:
    tree = ast.parse(Path(typed_stream.__file__).read_text())
    roots = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    standard = {"json", "struct", "sys", "urllib", "collections", "http", "typing"}
    assert roots == standard | {"pydantic"}
