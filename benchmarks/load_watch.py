"""Watches how busy a worker is, and times its steps."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from protos.sluice.v1 import generation_pb2 as pb
from protos.sluice.v1 import generation_pb2_grpc as pb_grpc

PATIENCE_SECONDS: Final = 30.0


@dataclass
class Measurement:
    """What a scenario's repetitions gave, in seconds."""

    durations: list[float] = field(default_factory=list)  # of each client
    resolutions: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)  # one after another, of each repetition

    @property
    def step(self) -> float:
        """Mean time of one step."""
        return sum(self.steps) / len(self.steps) if self.steps else 0.0


class LoadWatch:
    """Asks the worker how busy it is, again and again."""

    def __init__(self, stub: pb_grpc.GenerationServiceAsyncStub) -> None:
        self._stub = stub

    async def now(self) -> tuple[float, pb.GetLoadResponse]:
        """When the answer came, and the load."""
        load = await self._stub.GetLoad(pb.GetLoadRequest())
        return time.monotonic(), load

    async def until(self, wanted: Callable[[pb.GetLoadResponse], bool]) -> None:
        """Wait for a load. Raises: TimeoutError."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not wanted((await self.now())[1]):
                pass

    async def _next_step(self) -> tuple[float, pb.GetLoadResponse]:
        """The load after the step under way. Raises: TimeoutError."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            at, load = await self.now()
            steps = load.steps
            while load.steps == steps:
                at, load = await self.now()
            return at, load

    async def time_steps(
        self, measurement: Measurement, steps: float
    ) -> tuple[pb.GetLoadResponse, pb.GetLoadResponse]:
        """Time so many steps, from the end of one to the end of another; the load at the beginning and at the end."""
        last_at, first = await self._next_step()
        last = first
        while last.steps < first.steps + int(steps):
            at, load = await self._next_step()
            number = load.steps - last.steps  # more than one, if no answer came in between
            measurement.steps += [(at - last_at) / number] * number
            last_at, last = at, load
        await asyncio.sleep(
            measurement.step * (steps % 1)
        )  # to an arbitrary moment of the next step
        return first, (await self.now())[1]
