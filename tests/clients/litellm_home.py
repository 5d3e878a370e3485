"""The environment that litellm is installed in."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.clients.installation import INSTALL_SECONDS, install_once

__all__ = ["HOME", "INSTALL_SECONDS", "installed"]

HOME = Path(__file__).parent / "litellm"


def installed() -> Path:
    """Its interpreter. Skips the test where it cannot be installed."""
    target = HOME / ".venv"
    python = target / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    install_once(
        HOME / "requirements.txt",
        target,
        [
            (sys.executable, "-m", "venv", "--clear", "--without-pip", target),
            # every package is named and each version: nothing is left to decide, or to compile
            (
                *pip,
                "install",
                "--no-deps",
                "--no-compile",
                "--only-binary=:all:",
                "-r",
                "requirements.txt",
            ),
        ],
    )
    return python
