"""The worker without its transport: what each call of the contract does, in domain errors instead of statuses."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Final

from inference_worker.admission import Admission, AdmissionLimits
from inference_worker.caller import check_key_id, read_caller
from inference_worker.count_limits import CountLimits
from inference_worker.deadline import deadline_of
from inference_worker.engine.event import FinishReason
from inference_worker.errors import (
    InternalError,
    InvalidField,
    ModelNotFound,
    SluiceError,
    status_of,
)
from inference_worker.field_rules import refuse_unknown_fields
from inference_worker.generate_request import Limits, read_request
from inference_worker.generate_response import sampling_message
from inference_worker.generation import Backend, Generation
from inference_worker.grammar.compiler import CompilerLimits, GrammarCompiler
from inference_worker.kept_stream import KeptStream
from inference_worker.kept_streams import KeptStreams, ReplayLimits
from inference_worker.load_metrics import LoadMetrics
from inference_worker.metrics import WorkerMetrics
from inference_worker.origin import Origin
from inference_worker.parkable import Parkable
from inference_worker.prompt import PromptReader, check_prompt, check_size, estimate_tokens
from inference_worker.registry import Registry
from inference_worker.request_log import RequestRecord, get_logger
from inference_worker.request_metrics import RequestMetrics
from inference_worker.resume_terms import read_terms
from inference_worker.served_model import Served
from inference_worker.settings import WorkerSettings
from inference_worker.side_calls import SideCalls
from inference_worker.step_watchdog import EngineHangs, StepWatchdog
from protos.sluice.v1 import generation_pb2 as pb

# What counts for the length of a text to tokenize where no token has a greatest one.
_UNBOUNDED_TOKEN_BYTES: Final = 64
_SHUTDOWN_SECONDS: Final = 2.0  # for a reader to take its last message


class Worker:
    """Serves one model. Used from the event loop only; a transport calls it and writes what it yields."""

    def __init__(
        self,
        served: Served,
        settings: WorkerSettings,
        on_crash: Callable[[BaseException], None],
        metrics: WorkerMetrics | None = None,
    ) -> None:
        self._served = served
        self._settings = settings
        self._loaded_at = time.time_ns()
        self.context_length = served.context_length
        self.metrics = metrics or WorkerMetrics()
        self._engine = served.new_engine(settings, on_crash, self.metrics)
        self._registry = Registry()
        self._prompts = PromptReader(served.tokenizer, served.info.vocabulary_size)
        self._grammars = GrammarCompiler(
            served.tokenizer,
            served.info.vocabulary_size,
            CompilerLimits(
                settings.grammar_seconds, settings.grammar_cache, settings.grammar_token_ms / 1e3
            ),
            self.metrics.compiled,
        )
        self._kept = KeptStreams(ReplayLimits.of(settings))
        self.metrics.replay_streams.set_function(lambda: len(self._kept))
        self.metrics.parked_streams.set_function(lambda: self._kept.num_parked)
        self.metrics.replay_bytes.set_function(lambda: self._kept.num_bytes)
        self._max_tokenize_bytes = settings.max_tokenize_bytes or self.context_length * (
            served.tokenizer.max_token_bytes or _UNBOUNDED_TOKEN_BYTES
        )
        self._admission = Admission(AdmissionLimits.of(settings, self._engine.load))
        self._side_calls = SideCalls(settings.max_waiting, self._admission.retry_after)
        self.metrics.registry.register(
            LoadMetrics(
                served.info, self.context_length, self._admission, lambda: self._engine.load
            )
        )
        self._backend = Backend(
            served=served,
            limits=Limits(
                settings.max_choices,
                self.context_length,
                served.tokenizer.max_token_bytes,
                served.tokenizer.chat_format,
                settings.max_grammar_bytes,
                CountLimits.of(settings),
                served.takes_continuations,
            ),
            prompts=self._prompts,
            grammars=self._grammars,
            engine=self._engine,
            registry=self._registry,
            heartbeat_seconds=settings.heartbeat_seconds,
            metrics=self.metrics,
        )

    @property
    def num_kept(self) -> tuple[int, int]:
        """How many streams may be resumed, and the bytes that they take."""
        return len(self._kept), self._kept.num_bytes

    def start(self) -> None:
        """Begin to run requests."""
        self._engine.start()

    def stop_admitting(self) -> None:
        """Refuse new generations from now on."""
        self._admission.stop_admitting()

    async def drain(self, seconds: float) -> None:
        """Let the running generations finish; end those that take longer with SHUTDOWN."""
        if not await self._registry.wait_empty(seconds):
            get_logger().warning("drain time is over", requests=len(self._registry))
            self._registry.end_all(FinishReason.SHUTDOWN)
            await self._registry.wait_empty(_SHUTDOWN_SECONDS)
        await self._kept.wait_unread(_SHUTDOWN_SECONDS)

    def watch_engine(self, on_hang: Callable[[EngineHangs, str], None]) -> StepWatchdog:
        """Look after the engine, for the length of a block. `on_hang` gets the stack of its thread."""
        return StepWatchdog(self._engine, self._settings.step_timeout_seconds, on_hang)

    def give_up(self) -> None:
        """End every stream with EngineLost: the engine hangs."""
        self._engine.fail()

    async def close(self) -> None:
        """End the engine and release the model's memory."""
        self._kept.close()
        self._prompts.close()
        self._grammars.close()
        await self._engine.stop()

    def generate(
        self, message: pb.GenerateRequest, deadline: float | None = None
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Generate, or go on with a stream that was begun.

        `deadline` is when the call ends, in time.monotonic's seconds; the request ends a little before, also if its
        stream outlives the call. Raises, once iterated: SluiceError.
        """
        if message.HasField("resume"):
            return self._resume(message)
        stream = None if self._admission.is_draining else self._keep(message, deadline)
        if stream is None:
            return self._generate(message, deadline)
        if message.while_unread == pb.WHILE_UNREAD_PARK and self._served.takes_continuations:
            stream.start(Parkable(message, deadline, self._generate, self._registry))
        else:
            stream.start(self._generate(message, deadline))
        return stream.read()

    def _keep(self, message: pb.GenerateRequest, deadline: float | None) -> KeptStream | None:
        """A place for what the request generates, if it asks for one and there is one."""
        try:
            if (terms := read_terms(message)) is None:
                return None
            ends_at = deadline_of(message, deadline, time.monotonic())
        except SluiceError:  # who reads the request will say so
            return None
        is_continuable = message.is_continuable and self._served.takes_continuations
        return self._kept.open(terms, Origin(message, ends_at) if is_continuable else None)

    async def _resume(
        self, message: pb.GenerateRequest
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        request_id = None
        status = "CANCELLED"  # the reader went away
        outcome = "disconnected"  # before it had anything
        try:
            refuse_unknown_fields(message, "")
            read_caller(message)
            for field, _ in message.ListFields():
                if field.name not in ("resume", "caller"):
                    raise InvalidField(field.name, "not together with resume")
            resume = message.resume
            stream = self._kept.find(resume, message.caller.key_id)
            request_id = stream.request_id
            number = 0
            if resume.HasField("after_sequence_number"):
                number = resume.after_sequence_number + 1
            resumed = stream.resume(
                number, is_snapshot=resume.snapshot, is_continuable=resume.is_continuable
            )
            async with aclosing(resumed) as messages:
                async for response in messages:
                    if not response.HasField("resumed"):  # before a parked one has its place
                        outcome = "resumed"
                    yield response
            status, outcome = "OK", "resumed"
        except SluiceError as error:
            status = status_of(error).code.name
            if outcome != "resumed":  # else it is the stream that ended so
                outcome = status_of(error).reason.lower()
            raise
        finally:
            self.metrics.resumed(outcome)
            get_logger().info("resume", request_id=request_id, status=status)

    async def _generate(
        self,
        message: pb.GenerateRequest,
        deadline: float | None,
        parkable: Parkable | None = None,
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        record = RequestRecord(
            message, RequestMetrics(self.metrics), logs_prompts=self._settings.log_prompts
        )
        try:
            running = self._admit_and_run(message, record, deadline, parkable)
            async with aclosing(running) as messages:
                async for response in messages:
                    yield response
        except SluiceError as error:
            status = status_of(error)
            record.write(status.code.name, reason=status.reason, field=error.field)
            raise
        except Exception as error:
            get_logger().error("bug", request_id=record.request_id, exc_info=error)
            record.write("INTERNAL")
            raise InternalError(record.request_id) from error
        except BaseException:  # the caller went away: cancelled, or the generator was closed
            is_late = deadline is not None and time.monotonic() >= deadline
            record.write("DEADLINE_EXCEEDED" if is_late else "CANCELLED")
            raise
        else:
            record.write("OK")

    def log_refusal(self, request_id: str, error: SluiceError) -> None:
        """Write the line of a request that its transport could not read, and that never comes to `generate`."""
        message = pb.GenerateRequest(request_id=request_id)
        record = RequestRecord(message, RequestMetrics(self.metrics), logs_prompts=False)
        status = status_of(error)
        record.write(status.code.name, reason=status.reason, field=error.field)

    async def _admit_and_run(
        self,
        message: pb.GenerateRequest,
        record: RequestRecord,
        call_deadline: float | None,
        parkable: Parkable | None,
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        arrived_at = time.monotonic()
        if message.HasField("model"):
            self._check_model(message.model)
        reading = read_request(message, self._served.info, self._backend.limits)
        self._served.check_honoured(message)
        self._registry.check_free(reading.request_id, parkable)
        if parkable is not None:
            reading = replace(reading, tells_token_ids=True)
        deadline = deadline_of(message, call_deadline, arrived_at)
        is_continued = message.HasField("continuation")
        is_ours = parkable is not None and parkable.is_begun
        with self._admission.admit(
            reading.n - len(reading.delivered.finished),
            estimate_tokens(reading.prompt) + reading.delivered.num_tokens,
            reading.caller,
            reading.priority,
            None if deadline is None else deadline - time.monotonic(),
            is_continued=is_continued,
            is_ours=is_ours,
        ) as ticket:
            if is_continued and not is_ours:
                self.metrics.continuations.inc()
            generation = Generation(self._backend, reading, ticket, record, deadline)
            with self._registry.hold(reading.request_id, generation, reading.caller.key_id):
                if parkable is not None:
                    parkable.run(generation)
                record.admitted(reading.request_id, self._served.info.name)
                async with aclosing(generation.messages()) as messages:
                    async for response in messages:
                        yield response

    def abort(self, message: pb.AbortRequest) -> pb.AbortResponse:
        """End a generation. Raises: SluiceError."""
        refuse_unknown_fields(message, "")
        if bool(message.request_id) == bool(message.resume_id):
            raise InvalidField("request_id", "give either request_id or resume_id")
        if message.forget and not message.resume_id:
            raise InvalidField("forget", "only with resume_id")
        key_id = message.key_id if message.HasField("key_id") else None
        if key_id is not None:
            check_key_id("key_id", key_id)
        if not message.resume_id:
            return pb.AbortResponse(outcome=self._registry.abort(message.request_id, key_id))
        return pb.AbortResponse(outcome=self._abort_kept(message, key_id))

    def _abort_kept(
        self, message: pb.AbortRequest, key_id: str | None
    ) -> pb.AbortOutcome.ValueType:
        stream = self._kept.get(message.resume_id, key_id)
        if stream is None or stream.request_id is None:  # without one nobody was told its name
            return pb.ABORT_OUTCOME_UNKNOWN
        outcome = pb.ABORT_OUTCOME_ALREADY_FINISHED
        if not stream.is_over:  # another request may have its id since
            outcome = self._registry.abort(stream.request_id)
        if message.forget:
            stream.forget()
        return outcome

    def get_model(self, message: pb.GetModelRequest) -> pb.GetModelResponse:
        """Describe the model. Raises: SluiceError."""
        refuse_unknown_fields(message, "")
        if message.HasField("model"):
            self._check_model(message.model)
        info = self._served.info
        response = pb.GetModelResponse(
            model=info.name,
            aliases=self._settings.model_aliases,
            context_length=self.context_length,
            vocabulary_size=info.vocabulary_size,
            architecture=info.architecture,
            dtype=info.dtype,
            device=info.device,
            parameter_count=info.parameter_count,
            eos_token_ids=sorted(info.eos_token_ids),
            kv_cache_bytes=info.kv_cache_bytes,
            kv_bytes_per_token=info.kv_bytes_per_token,
            step_bytes=info.step_bytes,
            has_chat_template=self._served.tokenizer.has_chat_template,
            default_sampling=sampling_message(info.default_sampling, info),
        )
        response.loaded_at.FromNanoseconds(self._loaded_at)
        return response

    def get_load(self, message: pb.GetLoadRequest) -> pb.GetLoadResponse:
        """Tell how busy the worker is. Raises: SluiceError."""
        refuse_unknown_fields(message, "")
        load = self._engine.load
        limits = self._admission.limits
        return pb.GetLoadResponse(
            running=load.running,
            waiting=load.waiting,
            free_blocks=load.free_blocks,
            total_blocks=load.total_blocks,
            block_size=load.block_size,
            waiting_tokens=self._admission.waiting_tokens,
            max_running=limits.max_running,
            max_waiting=limits.max_waiting,
            max_waiting_tokens=limits.max_waiting_tokens,
            steps=load.steps,
            generated_tokens=load.generated_tokens,
            preemptions=load.preemptions,
            is_draining=self._admission.is_draining,
            requests=self._admission.requests,
            waiting_blocks=self._admission.waiting_blocks,
            max_waiting_blocks=limits.max_waiting_blocks,
        )

    async def tokenize(self, message: pb.TokenizeRequest) -> pb.TokenizeResponse:
        """Turn a prompt into token ids. Raises: SluiceError."""
        refuse_unknown_fields(message, "")
        if message.HasField("model"):
            self._check_model(message.model)
        check_prompt(
            message.prompt, self._served.tokenizer.chat_format, self._backend.limits.counts
        )
        if message.prompt.HasField("token_ids"):
            raise InvalidField("prompt.token_ids", "are token ids already")
        check_size(message.prompt, self._max_tokenize_bytes)
        with self._side_calls.enter(read_caller(message)):
            response = await self._prompts.tokenize(message.prompt)
        response.context_length = self.context_length
        return response

    async def detokenize(self, message: pb.DetokenizeRequest) -> pb.DetokenizeResponse:
        """Turn token ids into text. Raises: SluiceError."""
        refuse_unknown_fields(message, "")
        if message.HasField("model"):
            self._check_model(message.model)
        with self._side_calls.enter(read_caller(message)):
            text = await self._prompts.decode(
                message.token_ids,
                keep_special_tokens=message.keep_special_tokens,
                max_bytes=self._settings.max_message_bytes,
            )
        return pb.DetokenizeResponse(text=text)

    def _check_model(self, name: str) -> None:
        if name != self._served.info.name and name not in self._settings.model_aliases:
            raise ModelNotFound(name, self._served.info.name)
