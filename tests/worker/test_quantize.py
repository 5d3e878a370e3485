"""The quantize command: what it refuses, and in what words."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from inference_worker.default_model import CHECKPOINT
from inference_worker.quantize import main
from tests.worker.served_worker import environment

ROOT = Path(__file__).parents[2]
needs_autoawq = pytest.mark.skipif(
    importlib.util.find_spec("awq") is None, reason="autoawq is not installed"
)


def refusal(*arguments: object) -> str:
    """The one line that the command ends with, run in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-m", "inference_worker.quantize", *map(str, arguments)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert (result.returncode, result.stdout) == (2, "")
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    return lines[0]


def refusal_here(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The same in this process, for what is found out late: a process of its own would import torch once more."""
    assert main([str(argument) for argument in arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    lines: list[str] = output.err.strip().splitlines()
    assert len(lines) == 1, output.err
    return lines[0]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    assert "exists already, and nothing is overwritten" in refusal(CHECKPOINT, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    assert f"{tmp_path}/absent: no such directory" in refusal(tmp_path / "absent", tmp_path / "out")


def test_a_calibration_text_that_is_not_there(tmp_path: Path) -> None:
    line = refusal(CHECKPOINT, tmp_path / "out", f"--calibration={tmp_path}/absent.txt")
    assert "--calibration" in line
    assert "No such file" in line


def test_a_group_size_that_awq_does_not_have(tmp_path: Path) -> None:
    assert "--group-size" in refusal(CHECKPOINT, tmp_path / "out", "--group-size=48")


def test_without_autoawq_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "awq.models.auto", None)
    assert main([str(CHECKPOINT), str(tmp_path / "out")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "autoawq cannot be imported" in line
    assert "pip install '.[quantize]'" in line  # there may be a stranger's package of our name


@needs_autoawq
def test_what_a_killed_run_has_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out.partial").mkdir()
    line = refusal_here(capsys, CHECKPOINT, tmp_path / "out", "--group-size=64")
    assert f"{tmp_path}/out.partial exists" in line


@needs_autoawq
def test_a_tokenizer_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(CHECKPOINT, model)
    (model / "tokenizer.json").write_text("{")
    assert "no usable tokenizer" in refusal_here(capsys, model, tmp_path / "out", "--group-size=64")


@needs_autoawq
def test_groups_that_do_not_divide(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal_here(capsys, CHECKPOINT, tmp_path / "out")
    assert "groups of 128 do not divide the 192 inputs of self_attn.q_proj; 32 and 64 would" in line
    assert list(tmp_path.iterdir()) == []
