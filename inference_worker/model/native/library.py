"""Compiles the C source once for each processor and kind of number, and loads it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

import torch

_SOURCE: Final = Path(__file__).with_name("decoder.c")
_FLAGS: Final = (
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fPIC",
    "-shared",
)
_DEFINES: Final[dict[torch.dtype, tuple[str, ...]]] = {
    torch.float32: (),
    torch.bfloat16: ("-DBFLOAT16",),
}
_COMPILE_SECONDS: Final = 120


class CannotCompile(Exception):
    """There is no compiler, or it refuses; the message is one line."""


def load_library(dtype: torch.dtype) -> ctypes.CDLL:
    """The compiled source for weights of a dtype, from the cache where it is there already.

    Raises: CannotCompile.
    """
    if dtype not in _DEFINES:
        raise CannotCompile(f"weights of {dtype} are not known to it")
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise CannotCompile("there is no C compiler (cc) here")
    command = [compiler, *_FLAGS, *_DEFINES[dtype], str(_SOURCE), "-lm"]
    path = _cache() / f"decoder-{_fingerprint(command)}.so"
    if not path.exists():
        _compile(command, path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise CannotCompile(f"its library does not load ({error})") from error


def _compile(command: list[str], path: Path) -> None:
    # a file of its own first: another process may compile the same at this moment
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            output = Path(folder, path.name)
            subprocess.run(  # noqa: S603
                [*command, "-o", str(output)],
                check=True,
                capture_output=True,
                text=True,
                timeout=_COMPILE_SECONDS,
            )
            output.replace(path)
    except subprocess.CalledProcessError as error:
        line = (error.stderr.strip() or f"exit status {error.returncode}").splitlines()[0]
        raise CannotCompile(f"{command[0]}: {line}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotCompile(f"{command[0]}: {error}") from error


def _cache() -> Path:
    try:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:  # a user without HOME whom the system does not know
        raise CannotCompile(f"there is no place for its library: {error}") from error
    return Path(root, "sluice")


def _fingerprint(command: list[str]) -> str:
    """Of all that decides what comes out: the source, the command and the processor it is for."""
    digest = hashlib.sha256(_SOURCE.read_bytes())
    digest.update("\0".join([*command, platform.machine(), _processor()]).encode())
    return digest.hexdigest()[:24]


def _processor() -> str:
    """Its features, as far as the system tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(names)}))
