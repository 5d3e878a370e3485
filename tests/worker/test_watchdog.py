"""The watchdog: what takes too long is noticed once a time, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from inference_worker.watchdog import Watchdog


class Loop:
    """A loop with one timer and a clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.due_at: float | None = None
        self.timers = 0

    def time(self) -> float:
        return self.now

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Loop:
        return self.call_at(self.now + seconds, callback)

    def call_at(self, due_at: float, callback: Callable[[], None]) -> Loop:
        self.due_at, self.callback = due_at, callback
        self.timers += 1
        return self

    def cancel(self) -> None:
        self.due_at = None

    def pass_time(self, seconds: float) -> None:
        end = self.now + seconds
        while self.due_at is not None and self.due_at <= end:
            self.now = self.due_at
            self.callback()
        self.now = end


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Loop:
    loop = Loop()
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: loop)
    return loop


def test_what_takes_too_long_is_noticed_at_its_time_and_again(loop: Loop) -> None:
    noticed: list[float] = []
    with Watchdog(10, lambda: noticed.append(loop.now)) as watchdog:
        loop.pass_time(7)  # the timer looks while it is under way
        watchdog.begin()
        loop.pass_time(25)
        assert noticed == [1017, 1027]
        watchdog.end()
        loop.pass_time(100)
        watchdog.begin()
        loop.pass_time(10)
        assert len(noticed) == 3
    assert loop.due_at is None


def test_what_ends_in_time_is_never_noticed_and_arms_no_timer(loop: Loop) -> None:
    noticed: list[None] = []
    with Watchdog(10, lambda: noticed.append(None)) as watchdog:
        for _ in range(100):
            watchdog.begin()
            loop.pass_time(1)
        watchdog.end()
        loop.pass_time(900)
    assert not noticed
    assert loop.timers < 120  # one each 10 seconds or so, not one each beginning
