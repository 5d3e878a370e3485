"""The measured processes: started with a clean environment, awaited by their log, weighed by their CPU time."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import psutil

_START_SECONDS: Final = 60.0
_POLL_SECONDS: Final = 0.02


class StartFailed(Exception):
    """A process ended, or said nothing of being ready, before it could be measured."""


class Process:
    """A running Python module whose log goes to a file, so that nobody is busy reading it."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process = process
        self._log = log

    def cpu_seconds(self) -> float:
        """CPU time of all its threads since its start, user and system: the kernel's clock where it can be read."""
        if platform.system() == "Linux":
            # clock_getcpuclockid(3): nanoseconds, where /proc/<pid>/stat counts in hundredths of a second
            return time.clock_gettime((~self._process.pid << 3) | 2)
        times = psutil.Process(self._process.pid).cpu_times()
        return times.user + times.system

    def lines(self, event: str) -> list[dict[str, Any]]:
        """The log lines of this event so far."""
        found = []
        for line in self._log.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # the last one may not be whole
                if (fields := json.loads(line)).get("event") == event:
                    found.append(fields)
        return found

    def await_line(self, event: str, **wanted: object) -> dict[str, Any]:
        """The first log line of this event with these fields. Raises: StartFailed."""
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            for line in self._log.read_text().splitlines():
                with contextlib.suppress(json.JSONDecodeError):
                    fields: dict[str, Any] = json.loads(line)
                    if fields.items() >= {"event": event, **wanted}.items():
                        return fields
            time.sleep(_POLL_SECONDS)
        raise StartFailed(f"no line {event!r}; the log says:\n{self._log.read_text()[-2000:]}")

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    def end(self, number: signal.Signals) -> None:
        """Send it a signal that ends it, and wait until it has ended."""
        self._process.send_signal(number)
        self._process.wait()

    def stop(self) -> None:
        """End it at once: it holds nothing that must be kept."""
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def running(module: str, **settings: object) -> Iterator[Process]:
    """`python -m module` with these settings as flags."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLUICE_")}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        with log.open("wb") as output:
            process = Process(
                subprocess.Popen(
                    [sys.executable, "-m", module, *flags],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,  # Ctrl-C is for the benchmark, which then stops them
                ),
                log,
            )
        try:
            yield process
        finally:
            process.stop()


@contextlib.contextmanager
def running_worker(module: str, **settings: object) -> Iterator[tuple[Process, str]]:
    """A worker that is ready, and its gRPC address."""
    with running(module, host="127.0.0.1", port=0, **settings) as process:
        yield process, process.await_line("ready")["address"]


@contextlib.contextmanager
def running_edge(worker: str, **settings: object) -> Iterator[tuple[Process, int]]:
    """An edge that has found its worker, and its port."""
    with running("edge", host="127.0.0.1", port=0, worker=worker, **settings) as process:
        port = process.await_line("edge listening")["port"]
        process.await_line("worker health", serving=True)
        yield process, port
