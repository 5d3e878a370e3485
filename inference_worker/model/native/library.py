"""The compiled source: what came with the worker, what was compiled before on this machine, or compiled now."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import stat
import tempfile
from ctypes import c_char_p, c_int64, c_void_p
from pathlib import Path
from typing import Any, Final

from inference_worker.model.native.compiler import (
    DTYPES,
    CannotCompile,
    compile_library,
    find_compiler,
    fingerprint,
)
from inference_worker.model.native.prebuilt import find_prebuilt, is_suited

_log = logging.getLogger(__name__)
_FLAGS: Final = ("-march=native",)
_OTHERS_MAY_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH


class NativeLibrary:
    """The functions of decoder.c, pool.h and scans.c."""

    def __init__(self, path: Path) -> None:
        """Raises: OSError, if it does not load."""
        library = ctypes.CDLL(str(path))
        self.forward: Any = library.forward
        self.forward.argtypes, self.forward.restype = [c_void_p] * 5, c_char_p
        self.scratch_size: Any = library.scratch_size
        self.scratch_size.argtypes, self.scratch_size.restype = [c_void_p, *[c_int64] * 4], c_int64
        self.start_pool: Any = library.start_pool
        self.start_pool.argtypes, self.start_pool.restype = [c_int64], c_void_p
        self.stop_pool: Any = library.stop_pool
        self.stop_pool.argtypes, self.stop_pool.restype = [c_void_p], None
        self.survey: Any = library.survey
        self.survey.argtypes, self.survey.restype = [*[c_int64] * 3, *[c_void_p] * 13], c_int64
        self.draw_from_rows: Any = library.draw_from_rows
        self.draw_from_rows.argtypes = [c_int64, c_int64, *[c_void_p] * 12]
        self.draw_from_rows.restype = None


class _Unsafe(Exception):
    """A folder that is no place to load code from; the message is one line."""


class NotSuited(Exception):
    """The source is not written for this processor; the message is one line."""


def load_library(dtype: str) -> NativeLibrary:
    """The library for weights of a dtype.

    Raises: CannotCompile, NotSuited.
    """
    if not is_suited():
        raise NotSuited("this processor has no AVX2")
    if dtype not in DTYPES:
        raise CannotCompile(f"weights of {dtype} are not known to it")
    if (path := find_prebuilt(dtype)) is not None:
        try:
            return NativeLibrary(path)
        except OSError as error:  # made for another C library, perhaps
            _log.debug("%s does not load: %s", path, error)
    try:
        return _load_cached(dtype)
    except (_Unsafe, OSError) as reason:
        _log.info("the C code is compiled at every start: %s", reason)
    try:
        with tempfile.TemporaryDirectory() as folder:  # the loaded library outlives its file
            return _compile(dtype, Path(folder, "decoder.so"))
    except OSError as error:
        raise CannotCompile(f"its library cannot be written or loaded: {error}") from error


def _load_cached(dtype: str) -> NativeLibrary:
    path = _cache() / f"decoder-{fingerprint(dtype, *find_compiler(), *_FLAGS, _machine())}.so"
    if path.exists():
        try:
            return NativeLibrary(path)
        except OSError as error:
            _log.debug("%s does not load: %s", path, error)
    return _compile(dtype, path)


def _compile(dtype: str, path: Path) -> NativeLibrary:
    compile_library(find_compiler(), dtype, _FLAGS, path)
    return NativeLibrary(path)


def _cache() -> Path:
    """The user's folder of compiled code. Raises: _Unsafe; OSError."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or "")
    if not root.is_absolute():  # to be ignored, by the XDG base directory specification
        try:
            root = Path.home() / ".cache"
        except RuntimeError as error:
            raise _Unsafe("there is no home directory") from error
    folder = root / "sluice"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = folder.resolve()
    _check_safe(folder)
    return folder


def _check_safe(folder: Path) -> None:
    """Make sure that nobody but this user and root can put a file there, or another folder in its place.

    Raises: _Unsafe.
    """
    user = os.geteuid()
    for place in (folder, *folder.parents):
        status = place.stat()
        # in a sticky directory, such as /tmp, nobody can replace what is another's
        is_open = status.st_mode & _OTHERS_MAY_WRITE and not (
            place != folder and status.st_mode & stat.S_ISVTX
        )
        if status.st_uid not in ((user,) if place == folder else (user, 0)) or is_open:
            raise _Unsafe(f"others than this user could write to {place}")


def _machine() -> str:
    """The processor and the C library, as far as they tell apart what runs here: a home may be shared by machines."""
    names = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = sorted({line for line in lines if line.startswith(names)})
    except OSError:
        processor = [platform.processor(), platform.node()]
    return "\n".join([platform.system(), platform.machine(), *platform.libc_ver(), *processor])
