"""What an orchestrator asks over HTTP, where the worker's TLS or a lack of gRPC keeps it from grpc.health.v1."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Final

# A loop that is busy for longer than this cannot serve; orchestrators themselves wait for some seconds at most.
_ANSWER_SECONDS: Final = 5.0


class Probes:
    """Asks the event loop, for threads other than its own: a loop that hangs is neither alive nor ready."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        is_serving: Callable[[], bool],
        seconds: float = _ANSWER_SECONDS,
    ) -> None:
        """`is_serving` is called on the loop, which has so many seconds to answer."""
        self._loop = loop
        self._is_serving = is_serving
        self._seconds = seconds

    def is_alive(self) -> bool:
        """Whether the process gets on, be it with loading or with draining."""
        return self._ask(lambda: True)

    def is_ready(self) -> bool:
        """Whether it takes requests: the same as its grpc.health.v1 says."""
        return self._ask(self._is_serving)

    def _ask(self, question: Callable[[], bool]) -> bool:
        answers: list[bool] = []
        answered = threading.Event()

        def answer() -> None:
            answers.append(question())
            answered.set()

        try:
            self._loop.call_soon_threadsafe(answer)
        except RuntimeError:  # closed
            return False
        return answered.wait(self._seconds) and answers[0]
