"""A request while an engine that a user brought works on it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from inference_worker.engine.live_request import LiveRequest
from inference_worker.own_engine.choice import Choice


@dataclass(eq=False, slots=True)
class RunningRequest:
    """Its choices, and what runs for them. Used on the engine's own loop."""

    live: LiveRequest
    choices: dict[int, Choice] = field(default_factory=dict)  # those begun, by index
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    ended: set[int] = field(default_factory=set)  # choices whose reader has had their Finished
    expiry: asyncio.TimerHandle | None = None  # at its deadline

    @property
    def is_late(self) -> bool:
        """Whether its deadline has passed."""
        deadline = self.live.request.deadline
        return deadline is not None and time.monotonic() >= deadline
