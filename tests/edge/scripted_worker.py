"""A worker that does what a test tells it: the real contract over a real gRPC server, and no model."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from protos.sluice.v1 import generation_pb2 as pb
from protos.sluice.v1 import generation_pb2_grpc as pb_grpc

MODEL, ALIAS = "org/tiny", "default"
CREATED = 1_700_000_000
TEXT = ("Hel", "lo", " wörld")

Script = Callable[["ScriptedCall"], Awaitable[None]]


def status(
    code: grpc.StatusCode, message: str, details: Iterable[Message] = ()
) -> status_pb2.Status:
    """A rich status."""
    packed = []
    for detail in details:
        wrapper = any_pb2.Any()
        wrapper.Pack(detail)
        packed.append(wrapper)
    return status_pb2.Status(code=code.value[0], message=message, details=packed)


def bad_field(path: str, description: str = "out of range") -> Any:
    """Names a field that was refused."""
    violation = error_details_pb2.BadRequest.FieldViolation(field=path, description=description)
    return error_details_pb2.BadRequest(field_violations=[violation])


def retry_in(seconds: float) -> Any:
    """Says when to try again."""
    delay = duration_pb2.Duration()
    delay.FromMilliseconds(int(seconds * 1000))
    return error_details_pb2.RetryInfo(retry_delay=delay)


def error_info(reason: str, **metadata: str) -> Any:
    """What the worker puts into every failure."""
    return error_details_pb2.ErrorInfo(reason=reason, domain="sluice", metadata=metadata)


class ScriptedCall:
    """One Generate as the worker sees it."""

    def __init__(self, request: pb.GenerateRequest, context: Any) -> None:
        self.request = request
        self.context = context
        self.was_cancelled = False
        self.ended = asyncio.Event()
        self._sequence_number = request.continuation.sequence_number

    async def send(self, **event: Any) -> None:
        """Sends one message."""
        message = pb.GenerateResponse(sequence_number=self._sequence_number, **event)
        self._sequence_number += 1
        await self.context.write(message)

    async def started(self, **fields: Any) -> None:
        """The header."""
        started = pb.Started(
            request_id=self.request.request_id,
            model=MODEL,
            prompt_tokens=7,
            cached_tokens=2,
            sampling=pb.Sampling(temperature=0.7, seed=42),
            max_tokens=16,
            n=self.request.n or 1,
        )
        started.created_at.seconds = CREATED
        started.MergeFrom(pb.Started(**fields))
        await self.send(started=started)

    async def delta(self, text: str, choice: int = 0, **fields: Any) -> None:
        """An item of one token."""
        fields.setdefault("token_count", 1)
        await self.send(delta=pb.Delta(choice_index=choice, text=text, **fields))

    async def finished(
        self,
        reason: pb.FinishReason.ValueType = pb.FINISH_REASON_STOP,
        choice: int = 0,
        completion_tokens: int | None = 3,
        **fields: Any,
    ) -> None:
        """A footer; with usage unless `completion_tokens` is None."""
        finished = pb.Finished(choice_index=choice, finish_reason=reason, **fields)
        if completion_tokens is not None:
            finished.usage.CopyFrom(
                pb.Usage(prompt_tokens=7, completion_tokens=completion_tokens, cached_tokens=4)
            )
            finished.timings.queued.FromMilliseconds(1500)
        await self.send(finished=finished)

    async def fail(
        self, code: grpc.StatusCode, message: str = "the worker's words", *details: Message
    ) -> None:
        """Ends the call with a status."""
        rich = rpc_status.to_status(status(code, message, details))
        await self.context.abort(code, message, rich.trailing_metadata if details else ())

    async def hang(self) -> None:
        """Does nothing until cancelled."""
        await asyncio.Event().wait()


async def hello(call: ScriptedCall) -> None:
    """The default script: one short text for each choice."""
    await call.started()
    choices = call.request.n or 1
    for choice in range(choices):
        for text in TEXT:
            await call.delta(text, choice)
    for choice in range(choices):
        is_last = choice == choices - 1
        await call.finished(choice=choice, completion_tokens=3 * choices if is_last else None)


def texts(parts: Sequence[str]) -> Script:
    """A script that sends these texts."""

    async def script(call: ScriptedCall) -> None:
        await call.started()
        for part in parts:
            await call.delta(part)
        await call.finished(completion_tokens=len(parts))

    return script


def failing(
    code: grpc.StatusCode, message: str = "the worker's words", *details: Message
) -> Script:
    """A script that refuses before `started`."""

    async def script(call: ScriptedCall) -> None:
        await call.fail(code, message, *details)

    return script


class ScriptedWorker(pb_grpc.GenerationServiceServicer):
    """Runs `script` for each Generate and remembers what came. The edge calls nothing but the methods here."""

    GetLoad = Detokenize = None  # type: ignore[assignment]

    def __init__(self) -> None:
        self.health = health.aio.HealthServicer()
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.script: Script = hello
        self.calls: list[ScriptedCall] = []
        self.tokenizations: list[tuple[pb.TokenizeRequest, float]] = []  # with the seconds left
        self.is_tokenizer_stuck = False
        self.cancelled_tokenizations = 0
        self.aborts: list[pb.AbortRequest] = []
        self.aborted: list[str] = []
        self.aborted_for: list[str | None] = []
        self.abort_outcome = pb.ABORT_OUTCOME_ABORTED
        self.abort_failure: grpc.StatusCode | None = None

    async def Tokenize(  # noqa: N802
        self, request: pb.TokenizeRequest, context: Any
    ) -> pb.TokenizeResponse:
        """Each character is a token."""
        self.tokenizations.append((request, context.time_remaining()))
        while self.is_tokenizer_stuck:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled_tokenizations += 1
                raise
        tokens = [character.encode() for character in request.prompt.text]
        return pb.TokenizeResponse(token_ids=range(len(tokens)), tokens=tokens)

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> None:  # type: ignore[override]  # noqa: N802
        call = ScriptedCall(request, context)
        self.calls.append(call)
        try:
            await self.script(call)
        except asyncio.CancelledError:
            call.was_cancelled = True
            raise
        except grpc.aio.InternalError:  # a write that the cancellation overtook
            call.was_cancelled = True
        finally:
            call.ended.set()

    async def Abort(self, request: pb.AbortRequest, context: Any) -> pb.AbortResponse:  # noqa: N802
        self.aborts.append(request)
        self.aborted.append(request.request_id)
        self.aborted_for.append(request.key_id if request.HasField("key_id") else None)
        if self.abort_failure is not None:
            await context.abort(self.abort_failure, "the worker's words")
        return pb.AbortResponse(outcome=self.abort_outcome)

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:  # noqa: N802
        if request.HasField("model") and request.model not in (MODEL, ALIAS):
            rich = status(
                grpc.StatusCode.NOT_FOUND, "no such model", [error_info("MODEL_NOT_FOUND")]
            )
            trailing = rpc_status.to_status(rich).trailing_metadata
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such model", trailing)
        response = pb.GetModelResponse(
            model=MODEL,
            aliases=[ALIAS, "dummy"],
            context_length=2048,
            kv_cache_bytes=2**20,
            kv_bytes_per_token=512,
        )
        response.loaded_at.seconds = CREATED
        return response

    async def set_serving(self, is_serving: bool) -> None:
        """What the health service says."""
        answer = health_pb2.HealthCheckResponse
        await self.health.set("", answer.SERVING if is_serving else answer.NOT_SERVING)

    @property
    def call(self) -> ScriptedCall:
        """The only call there was."""
        assert len(self.calls) == 1
        return self.calls[0]


async def start_server(worker: ScriptedWorker, address: str) -> tuple[grpc.aio.Server, int]:
    """Serves the worker; returns the server and its port."""
    server = grpc.aio.server(
        options=[
            ("grpc.so_reuseport", 0),
            ("grpc.http2.min_ping_interval_without_data_ms", 1000),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 1000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.max_receive_message_length", 64 * 1024 * 1024),
        ]
    )
    pb_grpc.add_GenerationServiceServicer_to_server(worker, server)
    health_pb2_grpc.add_HealthServicer_to_server(worker.health, server)
    port = server.add_insecure_port(address)
    await worker.set_serving(True)
    await server.start()
    return server, port
