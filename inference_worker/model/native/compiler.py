"""Runs the C compiler on the source beside this file."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

_FOLDER: Final = Path(__file__).parent
_SOURCES: Final = (_FOLDER / "decoder.c", _FOLDER / "scans.c")
_FLAGS: Final = (
    "-O3",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fPIC",
    "-shared",
    "-pthread",
)
# of the weights; what each is called is torch's
_DEFINES: Final[dict[str, tuple[str, ...]]] = {"float32": (), "bfloat16": ("-DBFLOAT16",)}
DTYPES: Final = tuple(_DEFINES)
_SECONDS: Final = 120  # it takes about two


class CannotCompile(Exception):
    """There is no compiler, or it refuses; the message is one line."""


def find_compiler() -> list[str]:
    """The command that `CC` names, or the system's. Raises: CannotCompile."""
    named = os.environ.get("CC")
    try:
        command = shlex.split(named) if named else []
    except ValueError as error:
        raise CannotCompile(f"CC: {error}") from error
    found = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not command and found is None:
        raise CannotCompile("there is no C compiler (cc) here")
    return command or [str(found)]


def fingerprint(dtype: str, *parts: str) -> str:
    """Of the source, the flags, the dtype and what else decides what comes out."""
    digest = hashlib.sha256()
    for path in sorted(_FOLDER.glob("*.[ch]")):
        digest.update(path.read_bytes())
    digest.update("\0".join((*_FLAGS, dtype, *parts)).encode())
    return digest.hexdigest()[:24]


def compile_library(compiler: Sequence[str], dtype: str, flags: Sequence[str], path: Path) -> None:
    """Compile the source to a file that is there whole or not at all, whoever else compiles the same at this moment.

    Raises: CannotCompile; OSError if the folder cannot be written to.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        output = Path(folder, path.name)
        sources = map(str, _SOURCES)
        _run([*compiler, *_FLAGS, *flags, *_DEFINES[dtype], "-o", str(output), *sources, "-lm"])
        with output.open("rb+") as file:
            os.fsync(file.fileno())
        output.replace(path)


def _run(command: list[str]) -> None:
    try:
        # of a session of its own, to be ended with what it starts itself
        process = subprocess.Popen(  # noqa: S603
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise CannotCompile(f"{command[0]}: {error.strerror}") from error
    with process:
        try:
            _, errors = process.communicate(timeout=_SECONDS)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise CannotCompile(f"{command[0]}: took longer than {_SECONDS} s") from error
            raise
    if process.returncode:
        lines = errors.strip().splitlines() or [f"exit status {process.returncode}"]
        line = next((line for line in lines if "error" in line), lines[0])
        raise CannotCompile(f"{command[0]}: {line.strip()}")
