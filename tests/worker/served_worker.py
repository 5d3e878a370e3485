"""A worker in the test's own process: the real server on a real port, with the scripted model behind it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import grpc
import grpc.aio
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from inference_worker.engine.engine_thread import EngineThread
from inference_worker.scripted_model import ScriptedRunner, ScriptedSettings, load_script
from inference_worker.served_model import Served, ServedModel
from inference_worker.server import Server
from inference_worker.settings import WorkerSettings
from inference_worker.worker import Worker
from protos.sluice.v1 import generation_pb2 as pb
from protos.sluice.v1 import generation_pb2_grpc
from tests.patience import PATIENCE

Call: TypeAlias = grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]


class ServedWorker:
    """What a test may use of it."""

    def __init__(
        self, worker: Worker, server: Server, served: Served, channel: grpc.aio.Channel
    ) -> None:
        self.worker = worker
        self.server = server
        self.served = served
        self.channel = channel
        self.stub: generation_pb2_grpc.GenerationServiceAsyncStub = (
            generation_pb2_grpc.GenerationServiceStub(channel)
        )
        self.crashes: list[BaseException] = []

    @property
    def address(self) -> str:
        return self.server.address

    def set_pace(self, milliseconds: float) -> None:
        """How long a step of the scripted model takes from now on."""
        assert isinstance(self.served, ServedModel)
        runner = self.served.runner
        assert isinstance(runner, ScriptedRunner)
        runner._settings = runner._settings.model_copy(update={"step_milliseconds": milliseconds})

    async def load(self) -> pb.GetLoadResponse:
        return await self.stub.GetLoad(pb.GetLoadRequest())

    async def wait_for(self, **expected: int) -> pb.GetLoadResponse:
        """Wait until GetLoad shows these numbers."""
        deadline = asyncio.get_running_loop().time() + PATIENCE
        while True:
            load = await self.load()
            if all(getattr(load, name) == value for name, value in expected.items()):
                return load
            assert asyncio.get_running_loop().time() < deadline, f"wanted {expected}, got {load}"
            await asyncio.sleep(0.002)

    async def wait_idle(self) -> pb.GetLoadResponse:
        """Wait until nothing is inside and every block is free."""
        total = (await self.load()).total_blocks
        return await self.wait_for(
            running=0, waiting=0, waiting_tokens=0, requests=0, free_blocks=total
        )

    async def generate(self, **fields: Any) -> list[pb.GenerateResponse]:
        """The whole stream of a request."""
        return [message async for message in self.stub.Generate(generate_request(**fields))]


@asynccontextmanager
async def serve_script(**settings: Any) -> AsyncIterator[ServedWorker]:
    """Serve the scripted model for the length of the block."""
    scripted = ScriptedSettings(**({"port": 0} | settings))
    async with serve(load_script(scripted), scripted) as worker:
        yield worker


@asynccontextmanager
async def serve(served: Served, settings: WorkerSettings) -> AsyncIterator[ServedWorker]:
    """Serve a model for the length of the block; at its end nothing may be left inside."""
    crashes: list[BaseException] = []
    worker = Worker(served, settings, crashes.append)
    server = Server(settings)
    server.bind()
    worker.start()
    await server.start(worker)
    channel = grpc.aio.insecure_channel(
        server.address, options=[("grpc.max_receive_message_length", -1)]
    )
    try:
        async with channel:
            harness = ServedWorker(worker, server, served, channel)
            harness.crashes = crashes
            yield harness
            if not crashes:
                await harness.wait_idle()
                _check_blocks(worker)
    finally:
        await server.stop()
        await worker.close()


def _check_blocks(worker: Worker) -> None:
    """Of an idle worker: no block is lost, and none owned twice."""
    if isinstance(worker._engine, EngineThread):
        worker._engine._engine.check()


def generate_request(**fields: Any) -> pb.GenerateRequest:
    """A request that is fine but for what is given; `text`, `ids` and `max_tokens` are short for their long names."""
    request = pb.GenerateRequest()
    if (ids := fields.pop("ids", None)) is not None:
        request.prompt.token_ids.ids.extend(ids)
    elif "prompt" not in fields and "resume" not in fields:
        request.prompt.text = fields.pop("text", "Say this is a test")
    request.stopping.max_tokens = fields.pop("max_tokens", 4)
    request.MergeFrom(pb.GenerateRequest(**fields))
    return request


def texts(messages: list[pb.GenerateResponse]) -> dict[int, str]:
    """The text of each choice, echoed prompts included."""
    joined: dict[int, str] = {}
    for message in messages:
        if message.HasField("delta"):
            index = message.delta.choice_index
            joined[index] = joined.get(index, "") + message.delta.text
    return joined


def kinds(messages: list[pb.GenerateResponse]) -> list[str]:
    """What each message is."""
    return [str(message.WhichOneof("event")) for message in messages]


def reasons(messages: list[pb.GenerateResponse]) -> list[str]:
    """The finish reasons, in the order they came."""
    return [
        pb.FinishReason.Name(message.finished.finish_reason).removeprefix("FINISH_REASON_")
        for message in messages
        if message.HasField("finished")
    ]


class Refusal:
    """A status with its details, unpacked."""

    def __init__(self, error: grpc.aio.AioRpcError | grpc.Call) -> None:
        self.code = error.code()
        self.message = error.details() or ""
        self.status = status_pb2.Status()
        for key, value in error.trailing_metadata() or ():
            if key == "grpc-status-details-bin":
                assert isinstance(value, bytes)
                self.status.ParseFromString(value)
        self.info = error_details_pb2.ErrorInfo()
        self.violations = error_details_pb2.BadRequest()
        self.retry = error_details_pb2.RetryInfo()
        self.has_retry = self._unpack(self.retry)
        self._unpack(self.info)
        self._unpack(self.violations)

    @property
    def field(self) -> str:
        return self.violations.field_violations[0].field if self.violations.field_violations else ""

    @property
    def retry_seconds(self) -> float:
        assert self.has_retry
        seconds: float = self.retry.retry_delay.ToNanoseconds() / 1e9
        return seconds

    def _unpack(self, into: Message) -> bool:
        return any(detail.Unpack(into) for detail in self.status.details)


async def read_rest(call: Call) -> list[pb.GenerateResponse]:
    """Messages up to the end. Reading and iterating cannot be mixed on one call."""
    messages: list[pb.GenerateResponse] = []
    while isinstance(message := await call.read(), pb.GenerateResponse):
        messages.append(message)
    return messages


async def refusal_of(call: Call) -> Refusal:
    """Read a stream to its failure; nothing may come before it but messages."""
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as error:
        return Refusal(error)
    raise AssertionError("the call was not refused")


async def read_until(call: Call, kind: str) -> list[pb.GenerateResponse]:
    """Messages up to the first of this kind."""
    messages: list[pb.GenerateResponse] = []
    while True:
        message = await call.read()
        assert isinstance(message, pb.GenerateResponse), f"the stream ended before {kind}"
        messages.append(message)
        if message.HasField(kind):  # type: ignore[arg-type]
            return messages


# A client that takes little before its reader does; by default megabytes go by before anybody notices.
NARROW: list[tuple[str, int]] = [
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 16384),
]
# for a worker of whose streams one does not fit into what the client takes by itself
LONG_STREAMS: dict[str, Any] = {"context_length": 8192, "blocks": 1024}


@asynccontextmanager
async def stalled_call(worker: ServedWorker, **fields: Any) -> AsyncIterator[Call]:
    """A stream of 8000 tokens whose reader has read the header and reads no more, until the test does."""
    output = pb.Output(token_ids=True, logprobs=5)
    async with grpc.aio.insecure_channel(worker.address, options=NARROW) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        call = stub.Generate(generate_request(**{"max_tokens": 8000, "output": output} | fields))
        await call.read()
        yield call


def environment() -> dict[str, str]:
    """For child processes: this one's, without settings of the worker."""
    return {
        name: value for name, value in os.environ.items() if not name.startswith("SLUICE_WORKER_")
    }
