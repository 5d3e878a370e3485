"""What kept streams hold on to: no more than is counted, whatever became of their generations."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from inference_worker.errors import InvalidField
from inference_worker.kept_stream import KeptStream
from inference_worker.kept_streams import KeptStreams, ReplayLimits
from inference_worker.parkable import Generate, Parkable
from inference_worker.registry import Registry
from inference_worker.resume_terms import read_terms
from inference_worker.settings import WorkerSettings
from protos.sluice.v1 import generation_pb2 as pb
from tests.patience import PATIENCE
from tests.worker.kept_calls import window
from tests.worker.served_worker import generate_request


def parkable_stream(generate: Generate, **limits: Any) -> tuple[KeptStream, KeptStreams]:
    """A stream that is parked while nobody reads, and where it is kept."""
    request = generate_request(resume_window=window(), while_unread=pb.WHILE_UNREAD_PARK)
    terms = read_terms(request)
    assert terms is not None
    streams = KeptStreams(ReplayLimits.of(WorkerSettings(port=0, **limits)))
    stream = streams.open(terms)
    assert stream is not None
    stream.start(Parkable(request, None, generate, Registry()))
    return stream, streams


class Part:
    """Stands for all that one part of a generation has at hand."""

    is_ending = False


async def test_of_a_part_that_was_left_or_failed_nothing_is_kept() -> None:
    parts = weakref.WeakSet[Part]()
    num_parts = 0

    async def generate(
        _request: pb.GenerateRequest, _deadline: float | None, whole: Parkable | None, /
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        nonlocal num_parts
        num_parts += 1
        part = Part()
        parts.add(part)
        assert whole is not None
        whole.run(part)
        yield pb.GenerateResponse(started=pb.Started(request_id="one", n=1))
        if num_parts == 1:
            await asyncio.Event().wait()
        raise InvalidField("constraint.regex", "takes too long") from ValueError(part)

    async def released() -> None:
        async with asyncio.timeout(PATIENCE):
            while parts:
                await asyncio.sleep(0.01)
                gc.collect()

    stream, streams = parkable_stream(generate)
    reading = stream.read()
    assert (await anext(reading)).HasField("started")
    await reading.aclose()
    assert stream.is_parked
    await released()
    depths = []
    for _ in range(3):
        resumed = stream.resume(0, is_snapshot=False, is_continuable=False)
        assert (await anext(resumed)).HasField("started")
        with pytest.raises(InvalidField, match="takes too long") as failure:
            await anext(resumed)
        depths.append(len(failure.traceback))
        del failure
    assert (stream.is_over, num_parts) == (True, 2)
    assert depths == depths[:1] * 3, "told again without growing"
    await released()
    streams.close()


async def test_the_tokens_that_it_goes_on_after_are_counted_while_they_are_kept() -> None:
    num_messages, num_tokens = 50, 100  # of each
    may_end = asyncio.Event()

    async def generate(*_given: object) -> AsyncGenerator[pb.GenerateResponse, None]:
        yield pb.GenerateResponse(started=pb.Started(request_id="one", n=1))
        for _ in range(num_messages):
            delta = pb.Delta(text="x", token_ids=range(num_tokens))
            yield pb.GenerateResponse(delta=delta)
        await may_end.wait()
        yield pb.GenerateResponse(finished=pb.Finished(usage=pb.Usage()))

    stream, streams = parkable_stream(generate, replay_messages=2)
    reading = stream.read()
    async with asyncio.timeout(PATIENCE):
        while streams.num_bytes < 4 * num_messages * num_tokens:
            await anext(reading)
        may_end.set()
        async for _ in reading:
            pass
    assert stream.is_over
    assert 0 < streams.num_bytes < 4 * num_messages * num_tokens, "two messages alone"
    streams.close()
    assert streams.num_bytes == 0
