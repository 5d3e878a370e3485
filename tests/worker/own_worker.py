"""A worker in the test's own process with an engine that a user brought."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from inference_worker.own_engine.loader import load_own_engine
from inference_worker.settings import WorkerSettings
from protos.sluice.v1 import generation_pb2 as pb
from tests.patience import PATIENCE
from tests.worker.own_engines import Obedient
from tests.worker.served_worker import (
    ServedWorker,
    serve,
)

MODULE = "tests.worker.own_engines"


class OwnWorker:
    """A served worker and the engine behind it."""

    def __init__(self, worker: ServedWorker, engine: Obedient) -> None:
        self.served = worker
        self.stub = worker.stub
        self.engine = engine

    async def say(self, text: str, **fields: Any) -> list[pb.GenerateResponse]:
        return await self.served.generate(text=text, **({"max_tokens": 100} | fields))

    async def wait_ended(self, *ended: tuple[str, int]) -> None:
        async with asyncio.timeout(PATIENCE):
            while sorted(self.engine.ended) != sorted(ended):
                await asyncio.sleep(0.002)


@asynccontextmanager
async def own_worker(**settings: Any) -> AsyncIterator[OwnWorker]:
    name = f"{MODULE}:Obedient"
    given: dict[str, Any] = {"port": 0, "engine": name} | settings
    chosen = WorkerSettings(**given)
    served = await asyncio.to_thread(load_own_engine, chosen, name)
    engine = served.opened.engine
    assert isinstance(engine, Obedient)
    async with serve(served, chosen) as worker:
        yield OwnWorker(worker, engine)
    assert engine.is_closed or worker.crashes
