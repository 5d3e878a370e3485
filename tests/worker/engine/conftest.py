"""Engine tests run on both kinds of runner."""

from __future__ import annotations

import pytest

from tests.worker.engine.hash_runner import HashRunner


@pytest.fixture(params=[False, True], ids=["step by step", "running ahead"])
def runs_ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether every HashRunner of this test keeps a step in flight while the host goes on."""
    monkeypatch.setattr(HashRunner, "runs_ahead", request.param)
    return bool(request.param)
