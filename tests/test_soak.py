"""A minute of the soak: whatever its clients do, and though a worker is killed, nothing is lost or left over."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# What each kind of client is told at least once, its text compared with the one known beforehand.
VERIFIED = (
    ("read", "whole and right"),
    ("resume", "whole and right"),
    ("abort", "aborted, and right so far"),
    ("messages", "whole and right"),
    ("constrain", "of its schema, and right"),
    ("talk by socket", "every turn whole and right"),
    ("chat", "whole and right"),
)


@pytest.mark.timeout(600)
@pytest.mark.flaky(reruns=0)  # what fails here once is a defect, and its text says which
def test_a_minute_of_everything_loses_nothing() -> None:
    command = [sys.executable, "-m", "benchmarks.soak", "--minutes=1", "--warm-up-minutes=0.2"]
    result = subprocess.run(
        [*command, "--kill-seconds=20"], cwd=ROOT, capture_output=True, text=True, timeout=540
    )
    assert result.returncode == 0, result.stdout + result.stderr
    found = re.search(
        r"(\d+) kills of a worker, ([\d,]+) requests, 0 failures, 0 leaked blocks", result.stdout
    )
    assert found is not None, result.stdout
    assert int(found[1]) >= 1
    for ending in ("whole and right", "left", "told 429", "told 4xx"):
        assert f"| {ending}" in result.stdout
    cells = [[cell.strip() for cell in row.split("|")[1:3]] for row in result.stdout.splitlines()]
    for verified in VERIFIED:
        assert list(verified) in cells, result.stdout
