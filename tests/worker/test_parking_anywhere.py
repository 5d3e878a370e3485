"""A stream whose reader leaves now and then is the uncut one, with real models."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from protos.sluice.v1 import generation_pb2 as pb
from tests.worker.drawn_requests import Stops, requests, stops
from tests.worker.kept_calls import numbers, resume, window
from tests.worker.parked_calls import scrape
from tests.worker.same_streams import assert_same
from tests.worker.served_models import MODELS, serve_embedded, serve_random, tiny_llama
from tests.worker.served_worker import (
    ServedWorker,
    read_rest,
    serve,
)
from tests.worker.stream_record import StreamRecord


class Loop:
    """A worker with a real model, whose steps take long enough for readers to leave between them."""

    def __init__(self, name: str, runner: asyncio.Runner) -> None:
        options = {"max_running": 4, "max_batch_tokens": 256}
        if name == "random":
            served, worker_settings = serve_random(tiny_llama(), **options)
        else:
            served, worker_settings = serve_embedded(**options)
        launch = served.runner.launch

        def launch_slowly(rows: Any) -> Any:
            time.sleep(0.001)
            return launch(rows)

        served.runner.launch = launch_slowly  # type: ignore[method-assign]
        self.run = runner.run
        self.serving = serve(served, worker_settings)
        self.worker = self.run(self.serving.__aenter__())


@pytest.fixture(scope="module", params=MODELS)
def loop(request: pytest.FixtureRequest) -> Iterator[Loop]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with asyncio.Runner() as runner:
        loop = Loop(request.param, runner)
        yield loop
        loop.run(loop.serving.__aexit__(None, None, None))
    torch.set_num_threads(threads)


async def read_in_parts(
    worker: ServedWorker, request: pb.GenerateRequest, rng: random.Random
) -> list[pb.GenerateResponse]:
    """A stream whose reader leaves now and then, for a while or for no time at all."""
    call, read = worker.stub.Generate(request), list[pb.GenerateResponse]()
    while isinstance(message := await call.read(), pb.GenerateResponse):
        read.append(message)
        if rng.random() < 0.3:
            call.cancel()
            if rng.random() < 0.5:
                await worker.wait_idle()
            call = resume(worker, read[0].started.resume_id, message.sequence_number)
    return read


CONSTRAINTS = [None, None, pb.Constraint(regex="(ab|c)*[0-9]{9}"), pb.Constraint(regex="[^x]+")]


def test_a_stream_that_is_left_anywhere_is_the_uncut_one(loop: Loop) -> None:
    worker = loop.worker

    @settings(max_examples=8, deadline=None)
    @given(
        request=requests,
        stop=stops,
        constraint=st.sampled_from(CONSTRAINTS),
        others=st.lists(requests, max_size=1),
        rng=st.randoms(use_true_random=False),
    )
    def check(
        request: pb.GenerateRequest,
        stop: Stops,
        constraint: pb.Constraint | None,
        others: list[pb.GenerateRequest],
        rng: random.Random,
    ) -> None:
        async def run() -> None:
            request.ClearField("is_continuable")  # whoever reads need not be able to
            request.stopping.max_tokens *= 3
            request.constraint.CopyFrom(constraint or pb.Constraint())
            if constraint is None:
                request.ClearField("constraint")
            whole = [message async for message in worker.stub.Generate(request)]
            stop.add_to(request, StreamRecord().add(whole))
            uncut = [message async for message in worker.stub.Generate(request)]
            request.resume_window.CopyFrom(window())
            request.while_unread = pb.WHILE_UNREAD_PARK
            crowd = [read_rest(worker.stub.Generate(other)) for other in others]
            read, *_ = await asyncio.gather(read_in_parts(worker, request, rng), *crowd)
            assert numbers(read) == list(range(len(read)))
            assert_same(StreamRecord().add(read), StreamRecord().add(uncut))
            await worker.wait_idle()

        loop.run(run())

    check()
    metrics = scrape(worker)
    assert metrics("sluice_resumes_total", outcome="resumed") > 0
    assert metrics.total("sluice_cancel_seconds_count") > 0, "none was parked before its end"
