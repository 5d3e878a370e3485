"""Installs a client's packages once, however many test processes ask, and again when its list of packages changes."""

from __future__ import annotations

import fcntl
import hashlib
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

INSTALL_SECONDS = 240.0
_UNREACHABLE = re.compile(
    r"ENOTFOUND|ECONNREFUSED|ECONNRESET|ETIMEDOUT|EAI_AGAIN|ENETUNREACH|FETCH_ERROR"
    r"|NewConnectionError|ConnectTimeoutError|ReadTimeoutError|NameResolutionError"
)


def install_once(
    packages: Path,
    target: Path,
    commands: Sequence[Sequence[str | Path]],
    environment: Mapping[str, str] | None = None,
) -> None:
    """Runs the commands beside `packages`, the list of what they put into `target`, unless that has been done.

    Skips the test where no registry is reached, or it takes too long; any other failure is one.
    """
    stamp = target / ".installed-from"
    wanted = hashlib.sha256(packages.read_bytes()).hexdigest()
    with (packages.parent / ".install.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if stamp.exists() and stamp.read_text() == wanted:
            return
        for command in commands:
            _run(command, packages.parent, environment)
        stamp.write_text(wanted)


def _run(
    command: Sequence[str | Path], folder: Path, environment: Mapping[str, str] | None
) -> None:
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,  # nothing may ask
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=INSTALL_SECONDS,
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"{command[0]} installed nothing within {INSTALL_SECONDS:.0f} s")
    if done.returncode and _UNREACHABLE.search(done.stdout):
        pytest.skip(f"{command[0]} reaches no registry: {done.stdout[-300:]}")
    assert done.returncode == 0, done.stdout
