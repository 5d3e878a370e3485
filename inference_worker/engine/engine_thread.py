"""The thread that owns the engine. Everyone else posts commands and receives events."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable

from inference_worker.engine.engine import Engine
from inference_worker.engine.event import EngineStopped, Event, FinishReason
from inference_worker.engine.event_stream import EventStream
from inference_worker.engine.load import Load
from inference_worker.engine.observer import NoObserver, Observer
from inference_worker.engine.readers import Readers
from inference_worker.engine.request import Request

Command = Callable[[Engine], None]

# Reasons of a cancel that a caller brings about: it went away, or it aborted.
_GIVEN_UP = (None, FinishReason.CANCELLED)


class EngineThread:
    """Runs the engine on a thread of its own: drain commands, step, hand the events over, again.

    Commands take effect before the next step. The events of a step reach the event loop with one call, so that the
    loop wakes once a step however many requests there are. All methods are for the loop's thread.
    """

    def __init__(
        self,
        engine: Engine,
        on_crash: Callable[[BaseException], None],
        observer: Observer | None = None,
    ) -> None:
        """`on_crash` is called on the loop, once, if the engine itself fails; every stream has got Failed then."""
        self._engine = engine
        self._readers = Readers(on_crash)
        self._observer: Observer = observer or NoObserver()
        self._load = engine.load()
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._turn = 0
        self._is_idle = True
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def load(self) -> Load:
        """The state after the latest step."""
        return self._load

    def start(self) -> None:
        """Begin; events are delivered on the running event loop."""
        self._readers.start()
        self._thread.start()

    def submit(
        self, request: Request, on_event: Callable[[Event], None] | None = None
    ) -> EventStream:
        """Hand a request over. `on_event` hears of its events on the loop, before any reader takes them.

        Raises: EngineStopped, if the thread has ended.
        """
        if not self._thread.is_alive():
            raise EngineStopped
        stream = self._readers.open(request, on_event)
        self._commands.put(lambda engine: engine.add(request))
        return stream

    def cancel(self, request: Request, reason: FinishReason | None = None) -> None:
        """End a request before the next step, and free its memory.

        With a reason its reader is told by a Finished for each choice that had none. Without one the reader is gone:
        its stream gets nothing more. Ended requests are ignored.
        """
        if reason is None:
            self._readers.drop(request)
        if reason in _GIVEN_UP:
            came_at, drawn = time.monotonic(), self._engine.count_drawn(request)
            self._commands.put(
                lambda engine: self._give_up(engine, request, reason, came_at, drawn)
            )
        else:
            self._commands.put(lambda engine: engine.cancel(request, reason))

    def progress(self) -> int | None:
        """The number of the turn it is in; None while it waits for commands."""
        return None if self._is_idle or not self._thread.is_alive() else self._turn

    @property
    def thread_id(self) -> int | None:
        """The engine's thread."""
        return self._thread.ident

    def fail(self) -> None:
        """Give the engine up: every stream gets Failed with EngineStopped, and nothing more."""
        self._readers.fail()

    async def stop(self) -> None:
        """End every request with SHUTDOWN, then the thread."""
        if self._thread.is_alive():
            self._commands.put(None)
            await asyncio.to_thread(self._thread.join)
            await asyncio.sleep(0)  # what the thread handed over last is delivered

    def _run(self) -> None:
        try:
            while self._drain():
                self._hand_over()  # a header must not wait for the step that it precedes
                if self._engine.has_work:
                    began_at = time.monotonic()
                    self._engine.step()
                    self._observer.stepped(time.monotonic() - began_at)
                    self._hand_over()
            self._engine.cancel_all(FinishReason.SHUTDOWN)
            self._hand_over()
            self._engine.close()
        except BaseException as error:  # whatever it is, the loop must hear of it
            self._readers.crash(error)

    def _drain(self) -> bool:
        """Execute the commands posted so far, waiting for one if there is nothing else to do. False: stop."""
        is_idle = not self._engine.has_work
        self._turn += 1
        while True:
            try:
                self._is_idle = is_idle
                command = self._commands.get(block=is_idle)
            except queue.Empty:
                return True
            self._is_idle = False
            if command is None:
                return False
            command(self._engine)
            is_idle = False

    def _give_up(
        self,
        engine: Engine,
        request: Request,
        reason: FinishReason | None,
        came_at: float,
        drawn: int,
    ) -> None:
        """Cancel for a caller who went away or aborted, `drawn` tokens after the beginning."""
        if (phase := engine.phase_of(request)) is None:
            return
        wasted = engine.count_drawn(request) + engine.count_pending(request) - drawn
        engine.cancel(request, reason)
        self._observer.cancelled(phase, time.monotonic() - came_at, wasted)

    def _hand_over(self) -> None:
        self._load = self._engine.load()
        if events := self._engine.take_events():
            self._readers.deliver(events)
