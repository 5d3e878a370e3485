"""A worker in a process of its own, with the scripted model behind it."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tests.worker.served_worker import environment

SCRIPTED = ("-m", "inference_worker.scripted_model")  # what Python runs, without flags


class WorkerProcess:
    """A started process; its log is read line by line."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[dict[str, Any]] = []
        self.address = ""

    async def read_until(self, event: str) -> dict[str, Any]:
        """Read the log up to this event."""
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            self.lines.append(json.loads(line))  # every line is JSON
            if self.lines[-1]["event"] == event:
                return self.lines[-1]
        raise AssertionError(f"the process ended before {event!r}: {self.lines}")

    async def wait(self) -> int:
        """Read the rest of the log and give the exit code."""
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.lines.append(json.loads(line))
        return await self.process.wait()

    def events(self) -> list[str]:
        return [line["event"] for line in self.lines]

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)


@asynccontextmanager
async def start_worker(
    *flags: str, program: tuple[str, ...] = SCRIPTED
) -> AsyncIterator[WorkerProcess]:
    """Start a worker on a free port; at the end of the block it is gone."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, *program, "--port", "0"),
        *flags,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment(),
    )
    worker = WorkerProcess(process)
    try:
        yield worker
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@asynccontextmanager
async def ready_worker(
    *flags: str, program: tuple[str, ...] = SCRIPTED
) -> AsyncIterator[WorkerProcess]:
    """Start a worker and wait until it is ready."""
    async with start_worker(*flags, program=program) as worker:
        worker.address = (await worker.read_until("ready"))["address"]
        yield worker
