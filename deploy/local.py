"""Runs a worker and an edge on this machine until Ctrl-C: what `make run` starts.

Settings of both are environment variables (`SLUICE_WORKER_*`, `SLUICE_EDGE_*`). Exit code 0 after Ctrl-C or SIGTERM,
1 if either process ends by itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from types import FrameType

READY_SECONDS = 600  # a large checkpoint takes minutes to load
POLL_SECONDS = 0.1
QUESTION = (
    '{"model": "default", "stream": true, "messages": [{"role": "user", "content": "Count to 10"}]}'
)

Process = subprocess.Popen[bytes]


class Stop(Exception):
    """The user asks to stop."""


def main() -> int:
    environment = complete(os.environ)
    if (problem := find_problem(environment)) is not None:
        code, line = problem
        print(line, file=sys.stderr)
        return code
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, raise_stop)
    scheme = "https" if "SLUICE_EDGE_TLS_CERT" in environment else "http"
    edge_host = reachable(environment["SLUICE_EDGE_HOST"])
    edge_url = f"{scheme}://{edge_host}:{environment['SLUICE_EDGE_PORT']}"
    processes: dict[str, Process] = {}
    with terminal_to_ourselves():
        try:
            print("Starting the worker and the edge ...", flush=True)
            processes["worker"] = start("inference_worker", environment)
            processes["edge"] = start("edge", environment)
            if not wait_until_ready(probe_url(environment, edge_url), processes):
                return 1
            print_invitation(edge_url, environment["SLUICE_EDGE_WORKER"])
            return wait_for_end(processes)
        except Stop:
            print("\nStopping (Ctrl-C again: at once) ...", flush=True)
            return 0
        finally:
            stop(processes)


def complete(environment: Mapping[str, str]) -> dict[str, str]:
    """The children's environment: as it is, with what makes them find each other. An empty variable is an unset one."""
    complete = {name: value for name, value in environment.items() if value}
    complete.setdefault("PYTHONUNBUFFERED", "1")
    for process, port in (("WORKER", "50051"), ("EDGE", "8000")):
        complete.setdefault(f"SLUICE_{process}_HOST", "127.0.0.1")
        complete.setdefault(f"SLUICE_{process}_PORT", port)
    if (path := complete.get("SLUICE_WORKER_UNIX_SOCKET")) is not None:
        worker = f"unix:{path}"
    else:
        worker = f"{reachable(complete['SLUICE_WORKER_HOST'])}:{complete['SLUICE_WORKER_PORT']}"
    complete.setdefault("SLUICE_EDGE_WORKER", worker)
    return complete


def probe_url(environment: Mapping[str, str], edge_url: str) -> str:
    """Where the edge says whether it is ready: on a port of its own, if there is one."""
    if (port := environment.get("SLUICE_EDGE_ADMIN_PORT")) is None:
        return edge_url
    return f"http://{reachable(environment.get('SLUICE_EDGE_ADMIN_HOST', '127.0.0.1'))}:{port}"


def reachable(host: str) -> str:
    """How to reach from here what listens on `host`."""
    return "localhost" if host in {"0.0.0.0", "::", "127.0.0.1"} else host  # noqa: S104


def find_problem(environment: Mapping[str, str]) -> tuple[int, str] | None:
    """Exit code and one line, if the ports cannot work."""
    ports = {name: environment[name] for name in ("SLUICE_EDGE_PORT", "SLUICE_WORKER_PORT")}
    for name, port in ports.items():
        if not (port.isdecimal() and 0 < int(port) < 65536):
            return 2, f"{name} is {port!r}; it must be a port, 1 to 65535."
        if not is_free(int(port)):
            return 1, f"Port {port} is taken; set {name} to another."
    if len(set(ports.values())) == 1:
        return 2, f"SLUICE_EDGE_PORT and SLUICE_WORKER_PORT are both {ports['SLUICE_EDGE_PORT']}."
    return None


def is_free(port: int) -> bool:
    """Whether the port can be listened on. Asked first: who holds it might well answer as if it were our edge."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def raise_stop(_signal: int, _frame: FrameType | None) -> None:
    raise Stop


@contextlib.contextmanager
def terminal_to_ourselves() -> Iterator[None]:
    """Take Ctrl-C for this process alone, as a shell does for a foreground job.

    Otherwise the terminal sends it to `make` too, which then reports failure however cleanly we stop.
    """
    if not is_foreground_job():
        yield
        return
    terminal, previous = sys.stdin.fileno(), os.tcgetpgrp(sys.stdin.fileno())
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # or the hand-over itself would stop us
    signal.signal(signal.SIGTSTP, signal.SIG_IGN)  # no shell would see us stopped
    os.setpgid(0, 0)
    os.tcsetpgrp(terminal, os.getpgrp())
    try:
        yield
    finally:
        os.tcsetpgrp(terminal, previous)


def is_foreground_job() -> bool:
    """Whether a shell gave the terminal to us and `make`: not in the background, not the session's own leader."""
    if not sys.stdin.isatty() or os.getsid(0) == os.getpid():
        return False
    return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()


def start(module: str, environment: Mapping[str, str]) -> Process:
    """Start one of our processes in a session of its own, so that we alone decide when it gets a signal."""
    return subprocess.Popen(  # noqa: S603 - our own interpreter and module
        [sys.executable, "-m", module], env=dict(environment), start_new_session=True
    )


def wait_until_ready(edge_url: str, processes: Mapping[str, Process]) -> bool:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if (ended := first_ended(processes)) is not None:
            print(f"The {ended} did not start; see the line above.", file=sys.stderr)
            return False
        if answers(f"{edge_url}/ready"):
            return True
        time.sleep(POLL_SECONDS)
    print(f"Not ready after {READY_SECONDS} s.", file=sys.stderr)
    return False


def answers(url: str) -> bool:
    # A proxy has no way to here, and a certificate is for those who come from elsewhere.
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    direct = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
    )
    try:
        with direct.open(url, timeout=5):
            return True
    except OSError:  # not listening yet, or 503: not ready yet
        return False


def first_ended(processes: Mapping[str, Process]) -> str | None:
    return next((name for name, process in processes.items() if process.poll() is not None), None)


def print_invitation(edge_url: str, worker: str) -> None:
    print(
        f"\nSluice is ready on {edge_url} (gRPC on {worker}). Try:\n\n"
        f"  curl -N {edge_url}/v1/chat/completions -H 'content-type: application/json' \\\n"
        f"    -d '{QUESTION}'\n\nCtrl-C stops it.",
        flush=True,
    )


def wait_for_end(processes: Mapping[str, Process]) -> int:
    while (ended := first_ended(processes)) is None:
        time.sleep(POLL_SECONDS)
    print(f"The {ended} ended with exit code {processes[ended].returncode}.", file=sys.stderr)
    return 1


def stop(processes: Mapping[str, Process]) -> None:
    """Drain the edge, then the worker that its streams run on; another Ctrl-C kills both."""
    try:
        for name in ("edge", "worker"):
            if (process := processes.get(name)) is not None and process.poll() is None:
                process.terminate()
                process.wait()
    except Stop:
        for process in processes.values():
            process.kill()
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
