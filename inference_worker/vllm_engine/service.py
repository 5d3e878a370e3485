"""vllm.grpc.engine.VllmEngine on grpc.aio: the same worker, engine and limits behind another contract."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Any, Final

import grpc
import grpc.aio
from smg_grpc_proto import vllm_engine_pb2 as vllm
from smg_grpc_proto import vllm_engine_pb2_grpc as vllm_grpc
from smg_grpc_proto.generated import common_pb2 as common

from inference_worker.errors import Interrupted, InvalidField, SlowReader, SluiceError
from inference_worker.request_log import get_logger
from inference_worker.service import Context, Writer, statuses
from inference_worker.settings import WorkerSettings
from inference_worker.version import version_of_sluice
from inference_worker.vllm_engine.request import read_request, their_names
from inference_worker.vllm_engine.response import AnswerWriter
from inference_worker.vllm_engine.tokenizer_files import pack_tokenizer
from inference_worker.worker import Worker
from protos.sluice.v1 import generation_pb2 as pb

_SERVER_TYPE: Final = "vllm-grpc"  # by which the gateway knows the contract
_CHUNK_BYTES: Final = 64 * 1024  # of the tokenizer's archive, as vLLM's own servicer cuts it
# Sampling parameters that the gateway fills in where its caller leaves them unset.
_DEFAULTS: Final = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def _refusing(name: str) -> Callable[[VllmEngineService, Any, Context], Coroutine[Any, Any, None]]:
    """A method that answers UNIMPLEMENTED."""

    async def refuse(_service: VllmEngineService, _request: Any, context: Context) -> None:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{name}: not supported by this worker")

    return refuse


class VllmEngineService(vllm_grpc.VllmEngineServicer):  # type: ignore[misc]
    """Translates; what a request does is the worker's."""

    def __init__(self, worker: Worker, settings: WorkerSettings) -> None:
        self._worker = worker
        self._settings = settings
        self._started_at = time.monotonic()
        self._last_request_at = 0.0  # seconds since 1970; 0: there was none
        self._tokenizer: asyncio.Task[bytes] | None = None

    # A coroutine that writes, not an async generator: grpc.aio may clean up a generator in another task.
    async def Generate(self, request: Any, context: Context) -> None:  # noqa: N802
        """Stream one generation, or its answers once they are whole."""
        self._last_request_at = time.time()
        remaining = context.time_remaining()
        deadline = None if remaining is None else time.monotonic() + remaining
        async with statuses(context):
            ours = self._read(request)
            with their_names(request):
                await self._generate(ours, request, context, deadline)

    def _read(self, request: Any) -> pb.GenerateRequest:
        try:
            return read_request(request, self._model().vocabulary_size)
        except SluiceError as error:
            self._worker.log_refusal(request.request_id, error)
            raise

    async def _generate(
        self, ours: pb.GenerateRequest, request: Any, context: Context, deadline: float | None
    ) -> None:
        answers = AnswerWriter(request)
        async with aclosing(self._worker.generate(ours, deadline)) as stream:
            with Writer(context, self._settings.send_timeout_seconds) as writer:
                async for message in stream:
                    try:
                        for answer in answers.answers(message):
                            await writer.write(answer)
                    except (SlowReader, Interrupted) as error:
                        await stream.athrow(error)  # raises it again, once the log has it

    async def Abort(self, request: Any, context: Context) -> Any:  # noqa: N802
        """End generations from another connection; those that are not there are none of its business."""
        async with statuses(context):
            for request_id in filter(None, request.request_ids):
                self._worker.abort(pb.AbortRequest(request_id=request_id))
            # Told only now: the others are to end whatever else the list holds.
            for index, request_id in enumerate(request.request_ids):
                if not request_id:
                    raise InvalidField(f"request_ids[{index}]", "is empty")
            return vllm.AbortResponse()

    async def HealthCheck(self, _request: Any, _context: Context) -> Any:  # noqa: N802
        """Tell whether new requests may come."""
        is_draining = self._load().is_draining
        message = "draining" if is_draining else "serving"
        return vllm.HealthCheckResponse(healthy=not is_draining, message=message)

    async def GetModelInfo(self, _request: Any, _context: Context) -> Any:  # noqa: N802
        """Describe the served model."""
        model, path = self._model(), self._settings.model
        defaults = {name: getattr(model.default_sampling, name) for name in _DEFAULTS}
        return vllm.GetModelInfoResponse(
            model_path=path,
            tokenizer_path=path,
            served_model_name=model.model,
            is_generation=True,
            max_context_length=model.context_length,
            max_req_input_len=model.context_length,
            vocab_size=model.vocabulary_size,
            architectures=[model.architecture],
            eos_token_ids=model.eos_token_ids,
            default_sampling_params_json=json.dumps(defaults),
        )

    async def GetServerInfo(self, _request: Any, _context: Context) -> Any:  # noqa: N802
        """Tell what the worker is and what it may hold."""
        load = self._load()
        return vllm.GetServerInfoResponse(
            active_requests=load.requests,
            is_paused=load.is_draining,
            last_receive_timestamp=self._last_request_at,
            uptime_seconds=time.monotonic() - self._started_at,
            server_type=_SERVER_TYPE,
            data_parallel_size=1,
            block_size=load.block_size,
            model_dtype=self._model().dtype,
            max_num_seqs=load.max_running,
            constrained_decoding_start="first_token",
        )

    async def GetLoads(self, request: Any, context: Context) -> Any:  # noqa: N802
        """Tell how busy the worker is."""
        async with statuses(context):
            return vllm.GetLoadsResponse(
                timestamp=datetime.now(UTC).isoformat(),
                version=version_of_sluice(),
                dp_rank_count=1,
                loads=[] if request.dp_rank else [_scheduler_load(self._load())],
            )

    async def GetTokenizer(self, _request: Any, context: Context) -> None:  # noqa: N802
        """Send the tokenizer's files as a ZIP archive; the last piece has its SHA-256."""
        async with statuses(context):
            if self._tokenizer is None or (self._tokenizer.done() and self._tokenizer.exception()):
                self._tokenizer = asyncio.create_task(
                    asyncio.to_thread(pack_tokenizer, self._settings.model)
                )
            # a caller that goes away leaves it to the others
            archive = await asyncio.shield(self._tokenizer)
            chunks = [
                common.GetTokenizerChunk(data=archive[start : start + _CHUNK_BYTES])
                for start in range(0, len(archive), _CHUNK_BYTES)
            ]
            chunks[-1].sha256 = hashlib.sha256(archive).hexdigest()
            try:
                with Writer(context, self._settings.send_timeout_seconds) as writer:
                    for chunk in chunks:
                        await writer.write(chunk)
            except SlowReader:
                get_logger().info("slow reader", call="GetTokenizer")
                raise

    Embed = _refusing("Embed")
    FlushCache = _refusing("FlushCache")
    StartProfile = _refusing("StartProfile")
    StopProfile = _refusing("StopProfile")
    SubscribeKvEvents = _refusing("SubscribeKvEvents")  # the gateway polls GetLoads then

    def _model(self) -> pb.GetModelResponse:
        return self._worker.get_model(pb.GetModelRequest())

    def _load(self) -> pb.GetLoadResponse:
        return self._worker.get_load(pb.GetLoadRequest())


def add_to_server(worker: Worker, settings: WorkerSettings, server: grpc.aio.Server) -> None:
    """Serve it."""
    service = VllmEngineService(worker, settings)
    vllm_grpc.add_VllmEngineServicer_to_server(service, server)


def _scheduler_load(load: pb.GetLoadResponse) -> Any:
    used_blocks = load.total_blocks - load.free_blocks
    usage = used_blocks / load.total_blocks if load.total_blocks else 0.0
    return vllm.SchedulerLoad(
        num_running_reqs=load.running,
        num_waiting_reqs=load.waiting,
        num_total_reqs=load.running + load.waiting,
        num_used_tokens=used_blocks * load.block_size,
        max_total_num_tokens=load.total_blocks * load.block_size,
        token_usage=usage,
        utilization=usage,
        max_running_requests=load.max_running,
        num_waiting_uncached_tokens=load.waiting_tokens,
    )
