"""Engine tests run on both kinds of runner, and lose no block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from inference_worker.engine.engine import Engine
from inference_worker.engine.event import FinishReason
from tests.worker.engine.hash_runner import HashRunner


@pytest.fixture(params=[False, True], ids=["step by step", "running ahead"])
def runs_ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether every HashRunner of this test keeps a step in flight while the host goes on."""
    monkeypatch.setattr(HashRunner, "runs_ahead", request.param)
    return bool(request.param)


@pytest.fixture(autouse=True)
def _no_block_is_lost(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """After every test, every engine that it made has all its blocks back once its requests have ended."""
    engines: list[Engine] = []
    make = Engine.__init__

    def make_and_note(engine: Engine, *arguments: Any, **options: Any) -> None:
        make(engine, *arguments, **options)
        engines.append(engine)

    monkeypatch.setattr(Engine, "__init__", make_and_note)
    yield
    for engine in engines:
        engine.check()
        engine.cancel_all(FinishReason.SHUTDOWN)
        engine.check()
        assert engine._pool.num_free == engine._pool.num_blocks
        assert not engine._live
