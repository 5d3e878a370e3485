"""`make run` as a user types it: in a terminal, with Ctrl-C."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

import edge.terminal
import inference_worker.terminal
from tests.free_port import free_port
from tests.integration.stack import PATIENCE, ROOT
from tests.integration.terminal import start_on_terminal

# what is installed here is what is tested, wherever it is
MAKE = [
    *("make", "--no-print-directory", "--old-file=.venv/installed-serve"),
    f"BIN={Path(sys.executable).parent}",
    "run",
]


def environment(**settings: object) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLUICE_", "MAKE"))}
    return {**clean, **{name: str(value) for name, value in settings.items()}}


class Terminal:
    """A command with a terminal of its own."""

    def __init__(self, command: list[str], **settings: object) -> None:
        self.output = ""
        self.process, self.descriptor = start_on_terminal(command, environment(**settings))

    def read_until(self, text: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while text not in self.output:
            assert time.monotonic() < deadline, self.output
            if select.select([self.descriptor], [], [], 1)[0]:
                self.output += os.read(self.descriptor, 65536).decode(errors="replace")

    def type(self, keys: str) -> None:
        os.write(self.descriptor, keys.encode())

    def wait(self) -> int:
        """Exit code, once it has ended; its terminal is read to the end meanwhile."""
        while True:
            try:
                self.output += os.read(self.descriptor, 65536).decode(errors="replace")
            except OSError:  # nobody holds the other end any more
                break
        return self.process.wait()


def test_make_run_serves_and_stops_cleanly_on_ctrl_c() -> None:
    edge_port, worker_port = free_port(), free_port()
    ports = {"SLUICE_EDGE_PORT": edge_port, "SLUICE_WORKER_PORT": worker_port}
    terminal = Terminal(MAKE, **ports, http_proxy="http://127.0.0.1:9")  # which must not matter
    family: list[psutil.Process] = []
    try:
        terminal.read_until("Ctrl-C stops it.")
        assert f"curl -N http://localhost:{edge_port}/v1/chat/completions" in terminal.output
        body = {"model": "default", "prompt": "Once upon a time", "max_tokens": 3}
        url = f"http://localhost:{edge_port}/v1/completions"
        answer = httpx.post(url, json=body, timeout=PATIENCE, trust_env=False)
        assert answer.json()["usage"]["completion_tokens"] == 3
        family = psutil.Process(terminal.process.pid).children(recursive=True)
        assert len(family) >= 3  # the launcher, the worker, the edge
    finally:
        terminal.type("\x03")
    assert terminal.wait() == 0, terminal.output
    assert "Traceback" not in terminal.output
    assert [process for process in family if process.is_running()] == []


def start_in_background(*command: str) -> list[str]:
    return [
        "bash",
        "--norc",
        "--noprofile",
        "-i",
        "-c",
        f"{' '.join(command)} & wait; echo still-here",
    ]


def test_in_the_background_it_leaves_the_terminal_alone_and_ends_with_it() -> None:
    ports = {"SLUICE_EDGE_PORT": free_port(), "SLUICE_WORKER_PORT": free_port()}
    command = start_in_background(sys.executable, "deploy/local.py")
    terminal = Terminal(command, **ports, PS1="")
    terminal.read_until("Ctrl-C stops it.")
    family = psutil.Process(terminal.process.pid).children(recursive=True)
    assert len(family) >= 3
    (launcher,) = [p for p in family if "deploy/local.py" in p.cmdline()]
    launcher.send_signal(signal.SIGHUP)  # what the end of a terminal sends
    terminal.read_until("still-here")  # the shell was never robbed of its terminal
    terminal.wait()
    assert [process for process in family if process.is_running()] == []


@pytest.mark.parametrize(
    ("module", "ready"),
    [("edge", "edge listening"), ("inference_worker.scripted_model", '"ready"')],
)
def test_a_hangup_ends_a_process_with_its_terminal_and_never_else(module: str, ready: str) -> None:
    terminal = Terminal([sys.executable, "-m", module, "--port=0"])
    try:
        terminal.read_until(ready)
        terminal.process.send_signal(signal.SIGHUP)  # as to any server: read your files again
        terminal.read_until("nothing to reload")
        os.close(terminal.descriptor)
        status = terminal.process.wait(PATIENCE)  # it does not outlive its terminal
    finally:
        terminal.process.kill()
        terminal.process.wait()
    assert status >= 0, "it was not ended, but killed"


@pytest.mark.parametrize("module", [edge.terminal, inference_worker.terminal])
@pytest.mark.parametrize(("handler", "is_over"), [(signal.SIG_DFL, True), (signal.SIG_IGN, False)])
def test_nohup_outlives_its_terminal(
    module: Any, handler: signal.Handlers, is_over: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.signal(signal.SIGHUP, handler)
    try:
        monkeypatch.setattr(module, "_is_there", lambda: True)
        terminal = module.Terminal()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert not terminal.is_gone
    monkeypatch.setattr(module, "_is_there", lambda: False)
    assert terminal.is_gone is is_over


def test_one_port_for_both_is_one_clear_line() -> None:
    port = free_port()
    result = subprocess.run(
        [sys.executable, "deploy/local.py"],
        cwd=ROOT,
        env=environment(SLUICE_EDGE_PORT=port, SLUICE_WORKER_PORT=port),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize("variable", ["SLUICE_EDGE_PORT", "SLUICE_WORKER_PORT"])
def test_a_taken_port_is_one_clear_line(variable: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ports = {"SLUICE_EDGE_PORT": free_port(), "SLUICE_WORKER_PORT": free_port(), variable: port}
        result = subprocess.run(
            [sys.executable, "deploy/local.py"],
            cwd=ROOT,
            env=environment(**ports),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
    assert result.returncode == 1
    assert result.stderr == f"Port {port} is taken; set {variable} to another.\n"


def test_a_port_that_is_none_is_one_clear_line() -> None:
    result = subprocess.run(
        [sys.executable, "deploy/local.py"],
        cwd=ROOT,
        env=environment(SLUICE_EDGE_PORT="http"),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "SLUICE_EDGE_PORT" in result.stderr


def test_a_model_that_cannot_be_loaded_stops_everything() -> None:
    ports = {"SLUICE_EDGE_PORT": free_port(), "SLUICE_WORKER_PORT": free_port()}
    result = subprocess.run(
        [sys.executable, "deploy/local.py"],
        cwd=ROOT,
        env=environment(**ports, SLUICE_WORKER_MODEL="/nowhere"),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert result.returncode == 1
    assert "no such directory" in result.stderr
    assert "Traceback" not in result.stderr
