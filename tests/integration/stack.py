"""A worker process and an edge process on the embedded model, talking over real sockets."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from protos.sluice.v1 import generation_pb2 as pb
from protos.sluice.v1.generation_pb2_grpc import GenerationServiceStub
from tests.patience import PATIENCE as PATIENCE

ROOT = Path(__file__).parents[2]


class LoggedProcess:
    """`python -m MODULE` whose stdout is a log of JSON lines."""

    def __init__(
        self,
        module: str,
        flags: Mapping[str, object],
        variables: Mapping[str, str] | None = None,  # of the environment, besides this process's
    ) -> None:
        arguments = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("SLUICE_")}
        environment.update(variables or {})
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.lines: list[dict[str, Any]] = []
        self._news: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def wait_for_line(self, **fields: object) -> dict[str, Any]:
        """The next log line with these fields."""
        deadline = time.monotonic() + PATIENCE
        while True:
            line = self._news.get(timeout=max(0.01, deadline - time.monotonic()))
            assert line is not None, f"the process ended before {fields}: {self.lines[-5:]}"
            if all(line.get(name) == value for name, value in fields.items()):
                return line

    def stop(self, signal_number: int = signal.SIGTERM) -> int:
        """Signal it and give its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal_number)
        return self.process.wait(timeout=PATIENCE)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for text in self.process.stdout:
            line = json.loads(text)
            self.lines.append(line)
            self._news.put(line)
        self._news.put(None)


@dataclass
class Stack:
    """Both processes, and a direct channel to the worker."""

    worker: LoggedProcess
    edge: LoggedProcess
    edge_port: int
    worker_address: str
    stub: GenerationServiceStub

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.edge_port}"

    def load(self) -> pb.GetLoadResponse:
        return self.stub.GetLoad(pb.GetLoadRequest(), timeout=PATIENCE)

    def wait_load(self, condition: Callable[[pb.GetLoadResponse], bool]) -> pb.GetLoadResponse:
        """Poll until the worker's load is so."""
        deadline = time.monotonic() + PATIENCE
        while not condition(load := self.load()):
            assert time.monotonic() < deadline, load
            time.sleep(0.002)
        return load

    def wait_idle(self) -> None:
        """Wait until nothing is inside and every block is free."""
        self.wait_load(
            lambda load: (
                not (load.running or load.waiting or load.requests)
                and load.free_blocks == load.total_blocks
            )
        )


@contextmanager
def running_stack(
    worker_flags: Mapping[str, object] | None = None,
    edge_flags: Mapping[str, object] | None = None,
    worker_module: str = "inference_worker",
) -> Iterator[Stack]:
    """Start both, wait until they serve; at the end nothing may be left inside and both must exit with 0."""
    # one thread: matrices this small gain nothing from a second, which would spin beside the other processes
    fixed = {"host": "127.0.0.1", "port": 0, "threads": 1}
    worker = LoggedProcess(worker_module, {**fixed, **(worker_flags or {})})
    edge = None
    try:
        address = worker.wait_for_line(event="ready")["address"]
        flags = {"host": "127.0.0.1", "port": 0, "worker": address, **(edge_flags or {})}
        edge = LoggedProcess("edge", flags)
        port = edge.wait_for_line(event="edge listening")["port"]
        with grpc.insecure_channel(address) as channel:
            stack = Stack(worker, edge, port, address, GenerationServiceStub(channel))
            yield stack
            edge = stack.edge  # a test may have replaced it
            if worker.process.poll() is None:
                stack.wait_idle()
        assert (edge.stop(), worker.stop()) == (0, 0)
    finally:
        for process in (edge, worker):
            if process is not None and process.process.poll() is None:
                process.process.kill()
                process.process.wait()
