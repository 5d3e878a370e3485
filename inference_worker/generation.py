"""One generation from its place in admission to its last message. Knows nothing of the transport."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from inference_worker.admission import Ticket
from inference_worker.engine.event import (
    Delta,
    EngineStopped,
    Event,
    Expired,
    Failed,
    Finished,
    FinishReason,
    Scheduled,
    Started,
)
from inference_worker.engine.event import Interrupted as RequestInterrupted
from inference_worker.engine.event_stream import EventStream, is_last
from inference_worker.engine.grammar import Grammar, GrammarFailed, GrammarState
from inference_worker.engine.request import Request
from inference_worker.engine.serving import ServingEngine
from inference_worker.errors import (
    DeadlinePassed,
    EngineLost,
    InternalError,
    Interrupted,
    InvalidField,
)
from inference_worker.generate_request import Limits, Reading
from inference_worker.generate_response import StreamWriter, unstarted_endings
from inference_worker.grammar.compiler import GrammarCompiler
from inference_worker.grammar.source import GrammarSource
from inference_worker.metrics import WorkerMetrics
from inference_worker.prompt import PromptReader
from inference_worker.registry import Registry
from inference_worker.request_log import RequestRecord, get_logger
from inference_worker.served_model import Served
from inference_worker.watchdog import Watchdog
from protos.sluice.v1 import generation_pb2 as pb

_Grammars = tuple[Grammar, dict[int, GrammarState]]


@dataclass(frozen=True, slots=True)
class Backend:
    """What generations run on; one for the whole worker."""

    served: Served
    limits: Limits
    prompts: PromptReader
    grammars: GrammarCompiler
    engine: ServingEngine
    registry: Registry
    heartbeat_seconds: float
    metrics: WorkerMetrics


class Generation:
    """Tokenizes a request's prompt, hands it to the engine, and turns the engine's events into messages."""

    def __init__(
        self,
        backend: Backend,
        reading: Reading,
        ticket: Ticket,
        record: RequestRecord,
        deadline: float | None = None,
    ) -> None:
        """`deadline`, in time.monotonic's seconds, ends it with what it has."""
        self._backend = backend
        self._reading = reading
        self._ticket = ticket
        self._record = record
        self._writer = StreamWriter(reading, backend.served.info, backend.served.tokenizer)
        self._admitted_at = time.monotonic()
        self._preparing: list[asyncio.Future[Any]] = []  # on other threads, until the engine has it
        self._request: Request | None = None  # set once the engine has it
        self._end_reason: FinishReason | None = None
        self._deadline = deadline
        self._completion_tokens = 0  # that its key was charged for
        self._is_started = False
        self._is_over = False  # for the engine; its reader may still have to read
        self.is_ending = False  # it was told to, and its last messages are about to come

    def end(self, reason: FinishReason) -> bool:
        """End it now, wherever it is; its reader gets a `finished` with the reason for each choice.

        False, and nothing happens, if the engine has ended it already and only the reader has not read all.
        """
        if self._is_over:
            return False
        self.is_ending = True
        if self._request is not None:
            self._backend.engine.cancel(self._request, reason)
            return True
        self._end_reason = reason
        self._stop_preparing()
        return True

    async def messages(self) -> AsyncGenerator[pb.GenerateResponse, None]:
        """The stream. Leaving it early takes the request out of the engine before its next step.

        Raises: SluiceError.
        """
        try:
            request = await self._prepare()
            if request is None:
                for message in self._unstarted(self._end_reason or FinishReason.CANCELLED):
                    yield message
                return
            stream = self._submit(request)
            with Watchdog(self._backend.heartbeat_seconds, stream.wake) as silence:
                silence.begin()
                is_read = False
                while not is_read:
                    events = await stream.next()
                    is_read = bool(events) and is_last(events[-1])
                    for message in self._write(events):
                        silence.end()  # a write that takes long is no silence of ours
                        yield message
                        silence.begin()
        finally:
            # No await here: this also runs while the caller's task is being cancelled.
            self._stop_preparing()
            if self._request is not None and not self._is_over:
                self._backend.engine.cancel(self._request)

    async def _prepare(self) -> Request | None:
        """The request with its prompt tokenized and its grammar compiled, or None if it was ended meanwhile.

        Raises: DeadlinePassed; InvalidField.
        """
        tokenizing = self._backend.prompts.read(
            self._reading.prompt,
            self._complete,
            num_more_tokens=self._reading.delivered.num_tokens,
            max_bytes=self._backend.limits.max_prompt_bytes,
        )
        compiling: asyncio.Task[_Grammars] | None = None
        self._preparing = [tokenizing]
        if (constraint := self._reading.constraint) is not None:
            compiling = asyncio.create_task(self._compile(constraint))
            self._preparing.append(compiling)
        # Not `await tokenizing`: end() cancels it, and that must not look like the caller's going away.
        left = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
        done, pending = await asyncio.wait(
            self._preparing, timeout=left, return_when=asyncio.FIRST_EXCEPTION
        )
        # all are looked at, so that asyncio does not complain of a lost one
        errors = [error for one in done if not one.cancelled() and (error := one.exception())]
        if self._end_reason is not None:
            return None
        if errors:
            raise errors[0]
        if pending:
            raise DeadlinePassed
        request = tokenizing.result()
        return request if compiling is None else request.with_grammar(*compiling.result())

    async def _compile(self, constraint: GrammarSource) -> _Grammars:
        """The grammar, and the states of the choices that are continued."""
        grammars, reading = self._backend.grammars, self._reading
        grammar = await grammars.compile(constraint, reading.share)
        states = await grammars.replay(
            grammar, reading.stop_token_ids, reading.delivered, reading.share
        )
        return grammar, states

    def _stop_preparing(self) -> None:
        for future in self._preparing:
            future.cancel()

    def _complete(self, prompt: list[int]) -> Request:
        """The request with its prompt. Runs on a tokenizer's thread."""
        new_detokenizer = self._backend.served.tokenizer.new_detokenizer
        return self._reading.to_engine(
            prompt, self._backend.limits, new_detokenizer, self._admitted_at, self._deadline
        )

    def _submit(self, request: Request) -> EventStream:
        self._ticket.set_prompt_tokens(len(request.prompt) + self._reading.delivered.num_tokens)
        try:
            stream = self._backend.engine.submit(request, self._account)
        except EngineStopped as error:
            raise EngineLost from error
        self._request = request
        return stream

    def _account(self, event: Event) -> None:
        """Bring the books up to date as the engine goes, however late the reader hears of it."""
        self._record.note(event)
        match event:
            case Started():
                self._is_started = True
            case Scheduled():
                self._ticket.serve(event.num_uncached)
            case Delta() if not event.is_prompt:
                self._use(len(event.tokens))
            case Finished():
                self._ticket.finish_sequence()
                if event.usage is not None:  # tokens that ended a choice came in no delta
                    delivered = self._reading.delivered.num_tokens_in_usage
                    total = event.usage.completion_tokens - delivered
                    self._use(total - self._completion_tokens)
            case _:
                pass
        if is_last(event):
            self._is_over = True
            self._ticket.leave_queue()  # also if it never ran
            self._ticket.finish_sequences()

    def _use(self, completion_tokens: int) -> None:
        self._completion_tokens += completion_tokens
        self._ticket.use(completion_tokens)

    def _write(self, events: Sequence[Event]) -> Iterator[pb.GenerateResponse]:
        if not events and self._is_started:  # the header is always first
            self._backend.metrics.heartbeats.inc()
            yield self._writer.heartbeat()
        for event in events:
            match event:
                case Started():
                    yield self._writer.started(
                        self._request, event.cached_tokens, event.queue_position
                    )
                case Delta():
                    yield from self._writer.delta(event)
                case Finished():
                    yield from self._writer.finished(event)
                case Failed():
                    self._fail(event.error)
                case _:
                    pass

    def _fail(self, error: Exception) -> None:
        request_id = self._reading.request_id
        constraint = self._reading.constraint
        if isinstance(error, Expired):
            raise DeadlinePassed from error
        if isinstance(error, RequestInterrupted):
            raise Interrupted from error
        if isinstance(error, EngineStopped):
            raise EngineLost from error
        if isinstance(error, GrammarFailed) and constraint is not None:
            raise InvalidField(constraint.field, str(error)) from error
        get_logger().error("request failed", request_id=request_id, exc_info=error)
        raise InternalError(request_id) from error

    def _unstarted(self, reason: FinishReason) -> Iterator[pb.GenerateResponse]:
        if reason is FinishReason.SHUTDOWN and self._reading.is_continuable:
            raise Interrupted
        yield self._writer.started(None, cached_tokens=0, queue_position=0)
        for finished in unstarted_endings(self._reading.delivered, self._reading.n, reason):
            self._record.note(finished)
            yield from self._writer.finished(finished)
