"""Libraries that were compiled before, for kinds of processors, to be used where there is no compiler.

`python -m inference_worker.model.native.prebuilt` compiles them for this machine's architecture and lays them beside
the source; the worker's image does so. A library is used only with the source that it was made of.
"""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from inference_worker.model.native.compiler import (
    DTYPES,
    CannotCompile,
    compile_library,
    find_compiler,
    fingerprint,
)

_FOLDER: Final = Path(__file__).with_name("built")
_CPU_INFO: Final = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True)
class Build:
    """A kind of processor."""

    name: str
    machine: str
    flags: tuple[str, ...]  # of the compiler
    features: frozenset[str] = frozenset()  # that Linux tells of such a processor

    def path(self, dtype: str) -> Path:
        """Where its library is."""
        return _FOLDER / f"{self.name}-{dtype}-{fingerprint(dtype, *self.flags)}.so"


# The third and the fourth level of the x86-64 psABI, as far as each adds to the one before.
_LEVEL_3: Final = frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"})
_LEVEL_4: Final = _LEVEL_3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_BUILDS: Final = (  # the fastest first
    Build(
        "x86-64-v4-bf16",
        "x86_64",
        ("-march=x86-64-v4", "-mavx512bf16"),
        _LEVEL_4 | {"avx512_bf16"},
    ),
    Build("x86-64-v4", "x86_64", ("-march=x86-64-v4",), _LEVEL_4),
    Build("x86-64-v3", "x86_64", ("-march=x86-64-v3",), _LEVEL_3),
)


def is_suited() -> bool:
    """Whether this processor has vectors that the source is written for."""
    return platform.machine() == "x86_64" and _features() >= _LEVEL_3


def has_tiles() -> bool:
    """Whether this processor multiplies tiles of bfloat16 (AMX), which the source does not use."""
    return "amx_bf16" in _features()


def find_prebuilt(dtype: str) -> Path | None:
    """The library made of this source that suits this processor best; None if there is none."""
    if not _FOLDER.is_dir():
        return None
    features = _features()
    for build in _BUILDS:
        if build.machine == platform.machine() and build.features <= features:
            path = build.path(dtype)
            if path.exists():
                return path
    return None


def _features() -> frozenset[str]:
    """What every core has."""
    lines = _CPU_INFO.read_text().splitlines() if _CPU_INFO.exists() else []
    found = [set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")]
    return frozenset(set.intersection(*found)) if found else frozenset()


def main() -> int:
    """Compile all, none on another architecture; the exit status."""
    builds = [build for build in _BUILDS if build.machine == platform.machine()]
    try:
        compiler = find_compiler()
        _FOLDER.mkdir(exist_ok=True)
        for build in builds:
            for dtype in DTYPES:
                compile_library(compiler, dtype, build.flags, build.path(dtype))
                print(build.path(dtype))
    except (CannotCompile, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
