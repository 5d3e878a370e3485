"""A thread with an event loop for code that is not ours: what it blocks is its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Final, TypeVar

T = TypeVar("T")

_NAME: Final = "own-engine"
_END_SECONDS: Final = 1.0


class LoopThread:
    """Runs coroutines for other threads, and tells when it ends without being asked to."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._on_end: Callable[[BaseException | None], None] | None = None
        self._is_stopping = False
        self._tasks: set[asyncio.Task[None]] = set()  # asyncio itself keeps none
        self._thread = threading.Thread(target=self._run, name=_NAME, daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def id(self) -> int | None:
        """Of the thread."""
        return self._thread.ident

    def watch(self, on_end: Callable[[BaseException | None], None]) -> None:
        """From now on `on_end` is called, on this thread, if the loop ends by itself."""
        self._on_end = on_end

    def call(self, callback: Callable[..., object], *arguments: object) -> None:
        """Call it on the loop. Does nothing once the loop has ended."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback, *arguments)

    def run(self, work: Callable[[], Coroutine[Any, Any, T]]) -> Future[T]:
        """Make a coroutine on the loop and run it. Whatever it raises, SystemExit too, is the future's."""
        future: Future[T] = Future()

        async def run() -> None:
            try:
                result = await work()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        def begin() -> None:
            task = self._loop.create_task(run())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        self.call(begin)
        return future

    async def stop(self) -> None:
        """End the loop and the thread; for another loop's thread."""
        self._is_stopping = True
        self.call(self._loop.stop)
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        error: BaseException | None = None
        try:
            self._loop.run_forever()
        except BaseException as caught:
            error = caught
        if not self._is_stopping and self._on_end is not None:
            self._on_end(error)
        self._end_tasks()
        self._loop.close()

    def _end_tasks(self) -> None:
        """End what is still under way, such as tasks that the code itself began; not for ever, though."""
        if tasks := asyncio.all_tasks(self._loop):
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.wait(tasks, timeout=_END_SECONDS))
