"""The edge as a real process."""

import asyncio
import contextlib
import json
import os
import sys
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from tests.patience import PATIENCE as PATIENCE

ROOT = Path(__file__).parents[2]


def fresh_id(name: str) -> str:
    """An x-request-id that no other request has: not another test's, nor this one's first try."""
    return f"{name}-{uuid.uuid4().hex}"


class EdgeProcess:
    """`python -m edge` and its log."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[dict[str, Any]] = []
        self._news = asyncio.Event()
        self._reader = asyncio.create_task(self._read())
        self.port = 0
        # of the probes, if they have one
        self.admin_port = 0

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.lines.append(json.loads(line))
            self._news.set()
        self._news.set()

    async def line(
        self, wanted: Callable[[dict[str, Any]], bool], since: int = 0
    ) -> dict[str, Any]:
        """The first such log line from number `since` on, now or soon."""
        async with asyncio.timeout(PATIENCE):
            while True:
                for line in self.lines[since:]:
                    if wanted(line):
                        return line
                assert not self._reader.done(), self.lines
                self._news.clear()
                await self._news.wait()

    async def request_line(self, client_id: str) -> dict[str, Any]:
        """The line of the request with this x-request-id."""
        return await self.line(lambda line: line.get("client_request_id") == client_id)

    async def wait(self) -> int:
        """Its exit code."""
        async with asyncio.timeout(PATIENCE):
            code = await self.process.wait()
            await self._reader
        return code


@contextlib.asynccontextmanager
async def running_edge(
    worker: str, folder: Path | None = None, /, **settings: object
) -> AsyncIterator[EdgeProcess]:
    """An edge with these settings, from listening to gone. Its code is that of the folder, if there is one."""
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLUICE_")}
    if folder is not None:  # for what is not in it
        environment["PYTHONPATH"] = str(ROOT)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "edge", "--host=127.0.0.1", "--port=0", f"--worker={worker}"),
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        limit=1024 * 1024,
        env=environment,
        cwd=folder,
    )
    edge = EdgeProcess(process)
    try:
        line = await edge.line(lambda line: line["event"] == "edge listening")
        edge.port = line["port"]
        if "admin_port" in settings:
            line = await edge.line(lambda line: line["event"] == "edge admin listening")
            edge.admin_port = line["port"]
        yield edge
    finally:
        if process.returncode is None:
            process.kill()
        await edge.wait()
