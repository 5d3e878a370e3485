"""A command on a terminal of its own."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Mapping, Sequence

from tests.integration.stack import ROOT

# Makes the terminal the one whose Ctrl-C reaches the command, also where whoever runs the tests is deaf to that: in the
# new process, but not by forking this one, which has threads: a fork of such a one that goes on in Python may fail.
_TAKE_IT = (
    "import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
    "signal.signal(signal.SIGINT, signal.SIG_DFL); os.execvp(sys.argv[1], sys.argv[1:])"
)


def start_on_terminal(
    command: Sequence[str], environment: Mapping[str, str] | None = None
) -> tuple[subprocess.Popen[bytes], int]:
    """The process, in the project's folder, and the descriptor of what a person would type into and read from."""
    person, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", _TAKE_IT, *command],
        cwd=ROOT,
        env=environment,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    return process, person
