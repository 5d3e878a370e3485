"""Streams of a pool whose workers are lost, as scripts of whichever worker has them."""

import contextlib
from typing import Any

import grpc
import httpx

from protos.sluice.v1 import generation_pb2 as pb
from tests.edge.pool import Pool
from tests.edge.scripted_worker import (
    ScriptedCall,
    error_info,
    failing,
    retry_in,
)
from tests.edge.sse import Event, parse

Code = grpc.StatusCode
STREAM = {"prompt": "go", "max_tokens": 16}


async def begin(call: ScriptedCall) -> None:
    await call.started(is_continuable=True)
    await call.delta("Hé", token_ids=[1, 2], token_count=2)


async def end(call: ScriptedCall) -> None:
    await call.started(is_continuable=call.request.is_continuable)
    await call.delta("llo", token_ids=[3])
    await call.finished(completion_tokens=3)


def set_scripts(pool: Pool, first: Any, then: Any) -> None:
    """Whichever worker begins the stream, and whichever continues it."""

    async def script(call: ScriptedCall) -> None:
        await (then if call.request.HasField("continuation") else first)(call)

    for worker in pool.workers:
        worker.script = script


def lost_after(script: Any, code: grpc.StatusCode = Code.UNAVAILABLE, *details: Any) -> Any:
    async def lost(call: ScriptedCall) -> None:
        await script(call)
        await call.fail(code, "gone", *details)

    return lost


def calls(pool: Pool) -> list[ScriptedCall]:
    return [call for worker in pool.workers for call in worker.calls]


def continuations(pool: Pool) -> list[pb.GenerateRequest]:
    return [call.request for call in calls(pool) if call.request.HasField("continuation")]


async def stream(pool: Pool, **fields: Any) -> list[Event]:
    data = b""
    async with pool.http.stream("POST", "/v1/streams", json=STREAM | fields) as response:
        assert response.status_code == 200
        with contextlib.suppress(httpx.RemoteProtocolError):  # how one ends that failed
            async for piece in response.aiter_bytes():
                data += piece
    return parse(data).events


def text_of(events: list[Event]) -> str:
    return "".join(event.json()["text"] for event in events if event.type == "delta")


def is_continuation(call: ScriptedCall) -> bool:
    return call.request.HasField("continuation")


FULL = failing(Code.RESOURCE_EXHAUSTED, "full", error_info("QUEUE_FULL"), retry_in(1))


RESUME_ID = "rs_" + "0123456789abcdef" * 3
