"""A trial: whether a grammar compiles within the limits, found out where it can do no harm."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

from inference_worker.grammar.limits import PARSER_LIMITS

_SCRIPT: Final = Path(__file__).with_name("trial_process.py")


class TooCostly(Exception):
    """The grammar takes too much time or memory to compile."""


class Trial:
    """A process that compiles one grammar after the other; a new one takes its place when one kills it.

    llguidance bounds most of its work, but not all: the emptiness of an intersection of twenty patterns was seen to
    take 27 s and 2.6 GB, and nothing but the end of its process stops it. For one thread at a time.
    """

    def __init__(self, seconds: float) -> None:
        """`seconds` is the processor time that one grammar may take."""
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, grammar: str) -> str:
        """What is wrong with a grammar in llguidance's form; empty if nothing is. Raises: TooCostly."""
        job = {"grammar": grammar, "limits": PARSER_LIMITS, "seconds": self._seconds}
        process = self._process
        if process is None or process.poll() is not None:
            process = self._process = _start()
        assert process.stdin is not None  # noqa: S101 - both are pipes
        assert process.stdout is not None  # noqa: S101
        answer = b""
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(job).encode() + b"\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        if not answer:
            self.close()
            raise TooCostly
        problem: str = json.loads(answer)
        return problem

    def close(self) -> None:
        """End the process, also while `run` waits for it."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(OSError):
                        pipe.close()


def _start() -> subprocess.Popen[bytes]:
    # -P: the modules beside the script are no top-level ones. A session of its own: Ctrl-C is not for it.
    return subprocess.Popen(  # noqa: S603
        [sys.executable, "-P", str(_SCRIPT)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
