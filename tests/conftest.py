"""What holds for every test: how kernels run, how properties are searched, and what is told of a test that ran twice.

Triton reads its variable once, when it is first imported, which transformers does: so it is set before any test module.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

if not Path("/proc/driver/nvidia").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# No verdict depends on how fast the machine is, nor on what happens to be drawn: `make test` tries the same examples
# each time, `make test-all` others (--hypothesis-profile=random).
settings.register_profile("random", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("same", settings.get_profile("random"), derandomize=True)
settings.load_profile("same")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Shows why a test that was tried again had failed: by itself pytest names it and forgets the rest."""
    first_tries = terminalreporter.stats.get("rerun", [])
    if first_tries:
        terminalreporter.section("first tries that failed")
    for report in first_tries:
        terminalreporter.write_sep("_", report.nodeid)
        terminalreporter.write_line(report.longreprtext)
        for name, text in report.sections:
            terminalreporter.write_sep("-", name)
            terminalreporter.write_line(text)
