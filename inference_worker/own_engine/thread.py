"""Serves with an engine that a user brought: `EngineThread`'s counterpart for code that is not ours."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from inference_worker.engine.event import (
    EngineStopped,
    Event,
    Expired,
    Failed,
    Finished,
    FinishReason,
    Scheduled,
    Started,
)
from inference_worker.engine.event_stream import EventStream
from inference_worker.engine.fair_slots import FairSlots
from inference_worker.engine.live_request import LiveRequest
from inference_worker.engine.load import Load
from inference_worker.engine.observer import Observer, Phase
from inference_worker.engine.readers import Readers
from inference_worker.engine.request import Request
from inference_worker.own_engine.choice import Choice
from inference_worker.own_engine.loop_thread import LoopThread
from inference_worker.own_engine.protocol import EngineCard, EngineRequest, OwnEngine, Piece
from inference_worker.own_engine.running_request import RunningRequest
from inference_worker.request_log import get_logger

if TYPE_CHECKING:
    from inference_worker.tokenizer import Tokenizer

_SEED_BITS: Final = 63
# For the engine's code to end what it has, and then to close, at the shutdown.
_END_SECONDS: Final = 2.0
_CLOSE_SECONDS: Final = 6.0


class OwnEngineFailed(Exception):
    """The engine's code raised what is no Exception, or was cancelled without being asked to."""


@dataclass(frozen=True, slots=True)
class OpenEngine:
    """An initialized engine, and the thread that alone may touch it."""

    engine: OwnEngine
    card: EngineCard
    thread: LoopThread


class OwnEngineThread:
    """Gives each choice a turn of the engine's `generate`, and makes events of what it yields.

    The methods without underscore are for the event loop that serves, the others run on the engine's own. Every
    request ends with Failed or with one Finished for each choice, whatever the engine's code does, unless its reader
    gave it up or the engine's code never returns.
    """

    def __init__(
        self,
        opened: OpenEngine,
        tokenizer: Tokenizer,
        vocabulary_size: int,
        max_running: int,
        on_crash: Callable[[BaseException], None],
        observer: Observer,
    ) -> None:
        """`on_crash` is called on the serving loop, once, if the engine's loop ends by itself."""
        self._engine = opened.engine
        self._thread = opened.thread
        self._eos_token_ids = opened.card.eos_token_ids
        self._tokenizer = tokenizer
        self._vocabulary_size = vocabulary_size
        self._readers = Readers(on_crash)
        self._observer = observer
        # --- of the engine's own loop
        self._slots = FairSlots(max_running)
        self._inside: dict[int, RunningRequest] = {}  # by the request's key
        self._tasks: set[asyncio.Task[None]] = set()  # whatever is still under way
        self._events: list[tuple[Request, Event]] = []
        self._is_handing_over = False
        self._running = self._waiting = 0  # sequences
        self._num_pieces = self._num_tokens = self._num_prompt_tokens = 0
        self._load = self._measure()
        # --- of the serving loop: questions whether the engine's loop still turns, and its answers
        self._num_asked = self._num_answered = 0

    @property
    def load(self) -> Load:
        """How busy it is. There are no blocks, and a step is one piece."""
        return self._load

    def start(self) -> None:
        self._readers.start()
        self._thread.watch(self._on_end)

    def submit(
        self, request: Request, on_event: Callable[[Event], None] | None = None
    ) -> EventStream:
        if not self._thread.is_alive:
            raise EngineStopped
        stream = self._readers.open(request, on_event)
        self._thread.call(self._add, request)
        return stream

    def cancel(self, request: Request, reason: FinishReason | None = None) -> None:
        if reason is None:
            self._readers.drop(request)
        self._thread.call(self._cancel, request, reason, time.monotonic())

    def progress(self) -> int:
        """How often the engine's loop answered that it turns."""
        if self._num_asked == self._num_answered:
            self._num_asked += 1
            self._thread.call(self._answer)
        return self._num_answered

    @property
    def thread_id(self) -> int | None:
        return self._thread.id

    def fail(self) -> None:
        self._readers.fail()

    async def stop(self) -> None:
        """As the protocol has it, for as long as _END_SECONDS and _CLOSE_SECONDS, unless the engine's code blocks."""
        if self._thread.is_alive:
            await asyncio.wrap_future(self._thread.run(self._shut_down))
            await self._thread.stop()
            await asyncio.sleep(0)  # what the thread handed over last is delivered

    # --- on the engine's own loop

    def _answer(self) -> None:
        self._num_answered = self._num_asked

    def _add(self, request: Request) -> None:
        running = self._inside[request.key] = RunningRequest(LiveRequest(request))
        self._emit(running, Started(len(request.prompt), 0, self._slots.position(request.share)))
        if request.deadline is not None:
            seconds = max(0.0, request.deadline - time.monotonic())
            running.expiry = asyncio.get_running_loop().call_later(seconds, self._expire, running)
        for index in range(request.n):
            task = self._spawn(self._generate(running, index))
            running.tasks.add(task)
            task.add_done_callback(running.tasks.discard)

    def _cancel(
        self, request: Request, reason: FinishReason | None, came_at: float | None = None
    ) -> None:
        if (running := self._inside.get(request.key)) is None:
            return
        if came_at is not None and reason in (None, FinishReason.CANCELLED):
            self._spawn(self._observe_end(running, running.live.phase, came_at))
        if reason is None:
            self._forget(running)
        else:
            for index in range(request.n):
                self._finish(running, index, reason)
        self._give_up(running)

    def _expire(self, running: RunningRequest) -> None:
        """Its deadline has passed."""
        request = running.live.request
        if request.key not in self._inside:
            return
        if running.live.first_token_at is None:
            self._fail(running, Expired())
        else:
            self._cancel(request, FinishReason.DEADLINE)

    def _forget(self, running: RunningRequest) -> None:
        """It is over: nothing more is said of it."""
        del self._inside[running.live.request.key]
        if running.expiry is not None:
            running.expiry.cancel()

    async def _shut_down(self) -> None:
        for running in list(self._inside.values()):
            self._cancel(running.live.request, FinishReason.SHUTDOWN)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_END_SECONDS):
                while self._tasks:
                    await asyncio.wait(self._tasks)
        if self._tasks:
            get_logger().error("the engine's code does not end", tasks=len(self._tasks))
        self._hand_over()
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self._engine.close()
        except BaseException as error:  # SystemExit, or what cancelling its own tasks raises
            get_logger().error("the engine's close failed", exc_info=error)

    async def _generate(self, running: RunningRequest, index: int) -> None:
        """One choice, from the queue to its last piece."""
        async with self._slot(running):
            if running.is_late and not running.choices:  # its timer is a little late, too
                self._expire(running)
                return
            try:
                await self._run_choice(running, index)
            except BaseException as error:
                if running.live.request.key not in self._inside or index in running.ended:
                    self._report_late(running, error)
                    return
                failure = error if isinstance(error, Exception) else OwnEngineFailed(repr(error))
                self._fail(running, failure)

    @asynccontextmanager
    async def _slot(self, running: RunningRequest) -> AsyncGenerator[None, None]:
        self._waiting += 1
        self._wake()
        try:
            await self._slots.acquire(running.live.request.share)
        finally:
            self._waiting -= 1
            self._wake()
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            self._slots.release()
            self._wake()

    async def _run_choice(self, running: RunningRequest, index: int) -> None:
        live = running.live
        if live.scheduled_at is None:
            live.scheduled_at = time.monotonic()
            self._num_prompt_tokens += len(live.request.prompt)
            self._emit(running, Scheduled())
            self._slots.charge(live.request.share, len(live.request.prompt))
        choice = running.choices[index] = Choice(
            live, index, self._tokenizer, self._vocabulary_size
        )
        if live.request.output.echo:
            for delta in choice.output.echo(live.prompt_tokens()):
                self._emit(running, delta)
        if live.request.stopping.max_tokens == 0:
            self._finish(running, index, FinishReason.LENGTH)
            return
        async with _closing(self._engine.generate(self._request(live.request, index))) as pieces:
            async for piece in pieces:
                self._take(running, choice, piece)
                if index in running.ended or live.request.key not in self._inside:
                    return
                await asyncio.sleep(0)  # an engine that never waits must not hold up all others
            self._finish(running, index, FinishReason.STOP)

    def _take(self, running: RunningRequest, choice: Choice, piece: Piece) -> None:
        live = running.live
        if live.request.key not in self._inside:  # an engine that does not hear of its end
            return
        if live.first_token_at is None:
            live.first_token_at = time.monotonic()
        before = live.num_completion_tokens
        choice.push(piece)
        self._num_pieces += 1
        self._num_tokens += live.num_completion_tokens - before
        self._slots.charge(live.request.share, live.num_completion_tokens - before)
        if choice.reason is not None:
            self._finish(running, choice.index, choice.reason)
        elif (delta := choice.output.take()) is not None:
            self._emit(running, delta)

    def _request(self, request: Request, index: int) -> EngineRequest:
        seed = (
            (request.sampling.seed + index) % (1 << _SEED_BITS) if index else request.sampling.seed
        )
        return EngineRequest(
            request_id=request.request_id,
            choice_index=index,
            prompt_token_ids=request.prompt,
            max_tokens=request.stopping.max_tokens,
            sampling=replace(request.sampling, seed=seed),
            ignore_eos=not self._eos_token_ids <= request.stopping.stop_token_ids,
            logprobs=request.output.logprobs,
            decode=lambda ids: self._tokenizer.decode(ids, keep_special_tokens=True),
        )

    def _finish(self, running: RunningRequest, index: int, reason: FinishReason) -> None:
        """Send the end of a choice, if it was not sent: the rest of its text and its footer.

        Not of a request that is over: engines may take a cancellation for the end of their text.
        """
        if index in running.ended or running.live.request.key not in self._inside:
            return
        running.ended.add(index)
        if (choice := running.choices.get(index)) is None:
            footer = Finished(index, reason)
        else:
            rest, footer = choice.end(reason)
            if rest is not None:
                self._emit(running, rest)
        live = running.live
        live.num_choices_left -= 1
        if live.num_choices_left == 0:
            footer = replace(footer, usage=live.usage(), timings=live.timings())
            self._forget(running)
        self._emit(running, footer)

    def _fail(self, running: RunningRequest, error: Exception) -> None:
        self._forget(running)
        self._emit(running, Failed(error))
        self._give_up(running)

    def _give_up(self, running: RunningRequest) -> None:
        """End what the engine still does for a request."""
        for task in running.tasks:
            task.cancel()
        self._spawn(self._abort(running.live.request.request_id))

    async def _observe_end(self, running: RunningRequest, phase: Phase, came_at: float) -> None:
        """Tell how long the engine's code goes on for a request that its caller gave up."""
        drawn = running.live.num_completion_tokens
        if tasks := list(running.tasks):
            await asyncio.wait(tasks)
        wasted = running.live.num_completion_tokens - drawn
        self._observer.cancelled(phase, time.monotonic() - came_at, wasted)

    async def _abort(self, request_id: str) -> None:
        try:
            await self._engine.abort(request_id)
        except BaseException as error:  # SystemExit would end the loop, and with it all requests
            get_logger().error("the engine's abort failed", request_id=request_id, exc_info=error)

    def _report_late(self, running: RunningRequest, error: BaseException) -> None:
        """The request is over; what its cleaning up raises is nobody's but the log's."""
        if isinstance(error, Exception):
            request_id = running.live.request.request_id
            get_logger().error("the engine failed late", request_id=request_id, exc_info=error)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _emit(self, running: RunningRequest, event: Event) -> None:
        self._events.append((running.live.request, event))
        self._wake()

    def _wake(self) -> None:
        """Hand over what happens in this turn of the loop with one call."""
        if not self._is_handing_over:
            self._is_handing_over = True
            asyncio.get_running_loop().call_soon(self._hand_over)

    def _hand_over(self) -> None:
        self._is_handing_over = False
        self._load = self._measure()
        events, self._events = self._events, []
        if events:
            self._readers.deliver(events)

    def _measure(self) -> Load:
        return Load(
            running=self._running,
            waiting=self._waiting,
            free_blocks=0,
            total_blocks=0,
            block_size=0,
            steps=self._num_pieces,
            generated_tokens=self._num_tokens,
            preemptions=0,
            prompt_tokens=self._num_prompt_tokens,
        )

    def _on_end(self, error: BaseException | None) -> None:
        self._readers.crash(error or OwnEngineFailed("the engine stopped its event loop"))


@asynccontextmanager
async def _closing(pieces: AsyncIterator[Piece]) -> AsyncGenerator[AsyncIterator[Piece], None]:
    """Close the iterator at the end of the block, if it is of the kind that can be closed."""
    try:
        yield pieces
    finally:
        if (close := getattr(pieces, "aclose", None)) is not None:
            await close()
