"""Some worker processes behind edge processes, which come and go."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from protos.sluice.v1 import generation_pb2 as pb
from protos.sluice.v1.generation_pb2_grpc import GenerationServiceStub
from tests.free_port import free_port
from tests.integration.stack import PATIENCE, LoggedProcess


@dataclass
class RestartableProcess:
    """A worker or an edge on a port of its own, which it keeps over restarts."""

    module: str
    flags: dict[str, object]
    port: int = field(default_factory=free_port)
    log: LoggedProcess = field(init=False)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        self.log = LoggedProcess(self.module, {**self.flags, "port": self.port})

    def send(self, number: signal.Signals) -> None:
        self.log.process.send_signal(number)

    def wait(self) -> int:
        return self.log.process.wait(timeout=PATIENCE)

    def kill(self) -> None:
        """End it, if it runs."""
        if hasattr(self, "log") and self.log.process.poll() is None:
            self.log.process.kill()
            self.log.process.wait()


class WorkerProcess(RestartableProcess):
    """A worker."""

    def wait_ready(self) -> None:
        self.log.wait_for_line(event="ready")

    def load(self) -> pb.GetLoadResponse:
        with grpc.insecure_channel(self.address) as channel:
            stub = GenerationServiceStub(channel)
            return stub.GetLoad(pb.GetLoadRequest(), timeout=PATIENCE)


@dataclass
class Cluster:
    """The processes."""

    workers: list[WorkerProcess]
    edge: LoggedProcess
    url: str

    def lines(self, event: str) -> list[dict[str, Any]]:
        """What the edge logged so far."""
        return [line for line in self.edge.lines if line["event"] == event]

    def wait_serving(self, worker: WorkerProcess, is_serving: bool = True) -> None:
        """Wait until that is the latest the edge knows of the worker."""

        def last() -> object:
            lines = self.lines("worker health")
            known = [line["serving"] for line in lines if line["target"] == worker.address]
            return known[-1] if known else None

        wait_until(lambda: last() is is_serving)

    def restart(self, worker: WorkerProcess) -> None:
        """Start a worker that has ended, and wait until it gets work again."""
        self.wait_serving(worker, is_serving=False)
        worker.start()
        worker.wait_ready()
        self.wait_serving(worker)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def running_workers(
    flags: Sequence[Mapping[str, object]], module: str = "inference_worker"
) -> Iterator[list[WorkerProcess]]:
    """Start a worker for each of these flags, and wait until all are ready; at the end none is left."""
    fixed = {"host": "127.0.0.1", "threads": 1}
    workers = [WorkerProcess(module, {**fixed, **given}) for given in flags]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.wait_ready()
        yield workers
    finally:
        for worker in workers:
            worker.kill()


@contextmanager
def running_cluster(
    count: int,
    worker_flags: Mapping[str, object] | None = None,
    edge_flags: Mapping[str, object] | None = None,
    worker_module: str = "inference_worker",
) -> Iterator[Cluster]:
    """Start them, and wait until all serve; at the end none is left."""
    with running_workers([worker_flags or {}] * count, worker_module) as workers:
        targets = ",".join(worker.address for worker in workers)
        edge = LoggedProcess(
            "edge", {"host": "127.0.0.1", "port": 0, "worker": targets, **(edge_flags or {})}
        )
        try:
            port = edge.wait_for_line(event="edge listening")["port"]
            cluster = Cluster(workers, edge, f"http://127.0.0.1:{port}")
            for worker in workers:
                cluster.wait_serving(worker)
            yield cluster
            assert edge.stop() == 0
        finally:
            if edge.process.poll() is None:
                edge.process.kill()
                edge.process.wait()
