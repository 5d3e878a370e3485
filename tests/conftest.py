"""What holds for all tests: threads and kernels, drawn examples, the order of files, one stack, what failed at first.

Triton reads its variable once, when it is first imported, which transformers does: so it is set before any test module.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from tests.integration.stack import Stack

# Processes run side by side here: threads of torch, of which each would have one a core, would spin beside one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Where a driver shows itself: in containers and under other kernels not always in the first place.
if not any(Path(p).exists() for p in ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/dxg")):
    os.environ.setdefault("TRITON_INTERPRET", "1")

# No verdict depends on how fast the machine is, nor on what happens to be drawn: `make test` tries the same examples
# each time, `make test-all` others (--hypothesis-profile=random).
settings.register_profile("random", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("same", settings.get_profile("random"), derandomize=True)
settings.load_profile("same")

_HERE = Path(__file__).parent


# Begun first, longest first: xdist gives out files, and beside a long one that is begun last a core would wait. So that
# they keep that order, the Makefile says --no-loadscope-reorder.
_LONGEST = (
    "test_soak.py",
    "integration/test_failover.py",
    "integration/test_failover_scripted.py",
    "integration/test_vanishing_clients.py",
    "integration/test_awq.py",
    "clients/test_lm_eval.py",
    "clients/test_schemathesis.py",
    "clients/test_litellm.py",
    "integration/test_rolling_restart.py",
    "clients/test_playground.py",
    "worker/test_step_watchdog.py",
    "worker/test_process.py",
    "integration/test_own_engine.py",
    "integration/test_overload.py",
    "integration/test_local.py",
    "integration/test_fuzzing.py",
    "integration/test_chat.py",
    "worker/test_continuation.py",
    "worker/model/test_sampler.py",
    "worker/model/test_awq.py",
    "worker/test_vllm_engine.py",
    "worker/test_default_model.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Orders the files; within a file nothing changes."""
    rank = {_HERE / name: number for number, name in enumerate(_LONGEST)}
    assert all(path.exists() for path in rank), rank
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


def pytest_collection_finish() -> None:
    """What the modules of all tests have imported stays: no collection of garbage looks through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """Worker and edge on the embedded model, one of each for all tests that only use them."""
    from tests.integration.stack import running_stack

    with running_stack() as running:
        yield running


@pytest.fixture(scope="session")
def slow_stack() -> Iterator[Stack]:
    """Room for one sequence, no queue, 50 tokens a second: what goes on has not ended by itself."""
    from tests.integration.stack import running_stack

    flags = {"step_milliseconds": 20, "max_running": 1, "max_waiting": 0}
    with running_stack(flags, worker_module="inference_worker.scripted_model") as running:
        yield running


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
