"""Where the C code's library comes from: made once, never another user's, and never in the way of a start."""

from __future__ import annotations

import os
import platform
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from inference_worker.model.native import compiler, library, prebuilt
from inference_worker.model.native.compiler import CannotCompile, compile_library, find_compiler
from inference_worker.model.native.library import NotSuited, load_library
from tests.patience import PATIENCE

pytestmark = pytest.mark.usefixtures("native_library")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes out is not run here."""
    flags = ["-O0" if flag == "-O3" else flag for flag in compiler._FLAGS]
    monkeypatch.setattr(compiler, "_FLAGS", flags)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The libraries that are compiled, as they are."""
    paths: list[Path] = []

    def note(command: list[str], dtype: str, flags: tuple[str, ...], path: Path) -> None:
        compile_library(command, dtype, flags, path)
        paths.append(path)

    monkeypatch.setattr(library, "compile_library", note)
    return paths


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "sluice"


def test_compiled_once_and_for_this_user_alone(cache: Path, compiled: list[Path]) -> None:
    load_library("float32")
    assert list(cache.iterdir()) == compiled
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    load_library("float32")
    assert len(compiled) == 1


@pytest.mark.parametrize("whose", ["another user's", "open to others", "under an open one"])
def test_a_folder_of_others_is_not_trusted(
    whose: str, cache: Path, compiled: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies there is not loaded, whatever its name, and nothing is put there."""
    load_library("float32")
    [planted] = compiled
    planted.unlink()  # not written over: it is mapped into this process
    planted.write_bytes(b"not what this user compiled")
    if whose == "another user's":
        user = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    else:
        (cache if whose == "open to others" else cache.parent).chmod(0o777)
    load_library("float32")
    assert len(compiled) == 2
    assert compiled[1].parent != cache
    assert not compiled[1].exists()  # of this start alone
    assert planted.read_bytes() == b"not what this user compiled"


def test_a_link_is_judged_by_where_it_leads(cache: Path, compiled: list[Path]) -> None:
    target = cache.parent / "target"
    target.mkdir()
    target.chmod(0o777)
    cache.symlink_to(target)
    load_library("float32")
    assert not list(target.iterdir())
    assert len(compiled) == 1


def start() -> subprocess.Popen[bytes]:
    """A process of its own that loads the library."""
    script = (
        "from inference_worker.model.native import compiler, library;"
        f"compiler._FLAGS = {compiler._FLAGS!r}; library.load_library('float32')"
    )
    return subprocess.Popen([sys.executable, "-c", script])


def test_a_damaged_library_is_compiled_again(cache: Path) -> None:
    assert start().wait() == 0
    [path] = cache.iterdir()
    size = path.stat().st_size
    path.write_bytes(b"")
    assert start().wait() == 0
    assert path.stat().st_size == size


@pytest.mark.parametrize("home", ["/nonexistent", "", "relative"])
def test_without_a_place_to_keep_it_a_start_compiles_for_itself(
    home: str, compiled: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(file) if home == "/nonexistent" else home)
    monkeypatch.setattr(Path, "home", no_home)
    load_library("float32")
    assert len(compiled) == 1
    assert not compiled[0].exists()


def test_starts_at_the_same_time(cache: Path) -> None:
    starts = [start() for _ in range(2)]
    assert [process.wait() for process in starts] == [0, 0]
    assert len(list(cache.iterdir())) == 1


def test_a_compiler_that_hangs_is_ended_with_its_children(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "cc"
    script.write_text(f"#!/bin/sh\nsleep 600 & echo $! > {tmp_path}/child\nwait\n")
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    monkeypatch.setattr(compiler, "_SECONDS", 1)
    with pytest.raises(CannotCompile, match="took longer than 1 s"):
        load_library("float32")
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + PATIENCE
    while _is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_running(child)
    assert not list(cache.iterdir())


def _is_running(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def test_the_compiler_may_have_arguments(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", f"{find_compiler()[0]} -DANYTHING")
    load_library("float32")
    assert len(list(cache.iterdir())) == 1


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder of libraries that were compiled before, and no compiler any more."""
    folder = tmp_path / "built"
    monkeypatch.setattr(prebuilt, "_FOLDER", folder)
    monkeypatch.setattr(prebuilt, "DTYPES", ("float32",))
    assert prebuilt.main() == 0
    monkeypatch.setenv("CC", "false")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def test_prebuilt_libraries_need_no_compiler(
    built: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    chosen = prebuilt.find_prebuilt("float32")
    assert chosen is not None
    assert chosen.parent == built
    load_library("float32")
    assert not (tmp_path / "cache").exists()
    for path in built.iterdir():  # another source's are not used
        path.rename(path.with_name("float32-of-yesterday.so"))
    with pytest.raises(CannotCompile):
        load_library("float32")


@pytest.mark.parametrize(
    ("machine", "features", "expected"),
    [
        ("x86_64", prebuilt._LEVEL_4 | {"avx512_bf16"}, "x86-64-v4-bf16"),
        ("x86_64", prebuilt._LEVEL_4 | {"avx512_bf16", "amx_bf16"}, "x86-64-v4-bf16"),
        ("x86_64", prebuilt._LEVEL_4, "x86-64-v4"),
        ("x86_64", prebuilt._LEVEL_4 - {"avx512vl"}, "x86-64-v3"),
        ("x86_64", prebuilt._LEVEL_3 - {"fma"}, None),
        ("aarch64", prebuilt._LEVEL_4, None),
        ("riscv64", prebuilt._LEVEL_4, None),
    ],
)
def test_a_prebuilt_library_suits_the_processor(
    machine: str,
    features: frozenset[str],
    expected: str | None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(prebuilt, "_FOLDER", tmp_path)
    for build in prebuilt._BUILDS:
        build.path("float32").touch()
    info = tmp_path / "cpuinfo"
    info.write_text(f"flags\t\t: fpu {' '.join(features)}\nbugs: none\n")
    monkeypatch.setattr(prebuilt, "_CPU_INFO", info)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    path = prebuilt.find_prebuilt("float32")
    assert (path and path.name.partition("-float32-")[0]) == expected
    assert prebuilt.is_suited() == (expected is not None)
    assert prebuilt.has_tiles() == ("amx_bf16" in features)
    if expected is None:
        with pytest.raises(NotSuited):
            load_library("float32")
