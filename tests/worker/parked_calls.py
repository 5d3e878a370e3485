"""Calls whose generation is parked while nobody reads."""

from __future__ import annotations

from typing import Any

from prometheus_client import generate_latest

from protos.sluice.v1 import generation_pb2 as pb
from tests.metrics_text import Scrape
from tests.worker.kept_calls import window
from tests.worker.served_worker import (
    Call,
    ServedWorker,
    generate_request,
)

# Milliseconds of a step: what is to be left before its end takes seconds, and then `set_pace(0)` ends it at once.
LEISURELY = 50


def parking(seconds: float = 60, **fields: Any) -> pb.GenerateRequest:
    return generate_request(
        resume_window=window(seconds), while_unread=pb.WHILE_UNREAD_PARK, **fields
    )


def scrape(worker: ServedWorker) -> Scrape:
    return Scrape(generate_latest(worker.worker.metrics.registry).decode())


def num_parked(worker: ServedWorker) -> int:
    return int(scrape(worker)("sluice_parked_streams"))


async def parked(worker: ServedWorker, call: Call, count: int = 1) -> None:
    """Leave the call, and wait until its generation has left the engine: no slot, no block, no place."""
    call.cancel()
    await worker.wait_idle()
    assert num_parked(worker) == count
