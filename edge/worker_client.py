"""The channel to one worker: calls with deadlines, and whether it serves."""

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc

from edge.errors import DETAILS_KEY, EdgeError, from_status
from edge.refusals import Refusals
from edge.settings import EdgeSettings
from protos.sluice.v1 import generation_pb2 as pb
from protos.sluice.v1 import generation_pb2_grpc as pb_grpc

GenerateCall = grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]

WATCH_RETRY_SECONDS = 0.25
_log = structlog.get_logger("edge.worker")


def channel_options(max_message_bytes: int) -> list[tuple[str, Any]]:
    """Options of the client side of the channel."""
    return [
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        # Small windows, so that a client which does not read holds up the worker's writer soon.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", 16384),
        # A worker that vanished without a word is noticed after 15 seconds.
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.http2.ping_timeout_ms", 5_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.min_reconnect_backoff_ms", 1000),
        ("grpc.max_reconnect_backoff_ms", 1000),
        ("grpc.enable_http_proxy", 0),
        ("grpc.enable_retries", 1),
    ]


def error_from_call(error: grpc.aio.AioRpcError) -> EdgeError:
    """The failure that a call ended with."""
    rich = None
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY:
            rich = value if isinstance(value, bytes) else value.encode()
    return from_status(error.code(), error.details(), rich)


def open_channel(target: str, name: str | None, settings: EdgeSettings) -> grpc.aio.Channel:
    """A channel of its own to one worker. `name` is the host:port that `target`'s address was found by, if any."""
    options = channel_options(settings.max_message_bytes)
    if name is not None:
        options.append(("grpc.default_authority", name))
    if not settings.worker_ca:
        return grpc.aio.insecure_channel(target, options=options)
    if settings.worker_server_name:
        options.append(("grpc.ssl_target_name_override", settings.worker_server_name))
    credentials = grpc.ssl_channel_credentials(
        Path(settings.worker_ca).read_bytes(),
        *(
            Path(path).read_bytes() if path else None
            for path in (settings.worker_key, settings.worker_cert)
        ),
    )
    return grpc.aio.secure_channel(target, credentials, options=options)


class WorkerClient:
    """One worker. Start it within the event loop that uses it."""

    def __init__(
        self,
        target: str,
        settings: EdgeSettings,
        on_change: Callable[[], None],
        name: str | None = None,
    ) -> None:
        """`on_change` is called when `is_serving` may have changed."""
        self.target = target
        self._name = name
        self._settings = settings
        self._on_change = on_change
        self._is_serving = False
        self._reason = "no answer from the worker yet"
        self._is_known = False
        self._is_reachable = False
        self._outstanding = 0
        self.refusals = Refusals()

    def start(self) -> None:
        """Opens the channel and begins to watch the worker's health."""
        self._channel = open_channel(self.target, self._name, self._settings)
        self._stub: pb_grpc.GenerationServiceAsyncStub = pb_grpc.GenerationServiceStub(
            self._channel
        )
        self._health = health_pb2_grpc.HealthStub(self._channel)
        self._watch = asyncio.create_task(self._watch_forever(), name="worker health")

    async def close(self) -> None:
        """Ends every call and the channel."""
        self._watch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._watch
        await self._channel.close()

    @property
    def is_serving(self) -> bool:
        """Whether the worker takes work, as it last said."""
        return self._is_serving

    @property
    def is_known(self) -> bool:
        """Whether that has been found out at least once."""
        return self._is_known

    @property
    def is_reachable(self) -> bool:
        """Whether it answers at all; one that drains does."""
        return self._is_reachable

    @property
    def reason(self) -> str:
        """Why it does not serve."""
        return self._reason

    @property
    def outstanding(self) -> int:
        """Generations that this edge has with it."""
        return self._outstanding

    def generate(self, request: pb.GenerateRequest, timeout_seconds: float) -> GenerateCall:
        """Begins a generation. The caller must cancel the call in `finally`."""
        call = self._stub.Generate(request, timeout=timeout_seconds)
        self._outstanding += 1
        call.add_done_callback(self._generated)
        return call

    def began(self, call: GenerateCall) -> None:
        """Notes that it was let in: once it ends, others may be."""
        call.add_done_callback(lambda _: self.refusals.forget())

    def _generated(self, _: Any) -> None:
        self._outstanding -= 1

    async def abort(self, request: pb.AbortRequest) -> pb.AbortOutcome.ValueType:
        """Ends a generation that came over any connection."""
        response: pb.AbortResponse = await self._ask(self._stub.Abort, request)
        return response.outcome

    async def get_model(self, model: str | None = None) -> pb.GetModelResponse:
        """Describes the served model."""
        response: pb.GetModelResponse = await self._ask(
            self._stub.GetModel, pb.GetModelRequest(model=model)
        )
        return response

    async def tokenize(self, request: pb.TokenizeRequest) -> pb.TokenizeResponse:
        """Turns a prompt into token ids."""
        # Its work grows with the prompt, and it may wait behind others'.
        response: pb.TokenizeResponse = await self._ask(
            self._stub.Tokenize, request, self._settings.request_timeout_seconds
        )
        return response

    async def _ask(self, method: Any, request: Any, timeout_seconds: float | None = None) -> Any:
        call = method(request, timeout=timeout_seconds or self._settings.connect_timeout_seconds)
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise error_from_call(error) from None
        finally:
            call.cancel()

    async def _watch_forever(self) -> None:
        while True:
            call = self._health.Watch(health_pb2.HealthCheckRequest(service=""))
            try:
                async for response in call:
                    self._health_changed(response.status)
                self._set(False, "the worker ended its health stream")
            except grpc.aio.AioRpcError as error:
                self._watch_failed(error)
            finally:
                call.cancel()
            await asyncio.sleep(WATCH_RETRY_SECONDS)

    def _health_changed(self, status: int) -> None:
        self._is_reachable = True
        if status == health_pb2.HealthCheckResponse.SERVING:
            self._set(True, "")
        else:
            name = health_pb2.HealthCheckResponse.ServingStatus.Name(status)
            self._set(False, f"the worker says {name}")

    def _watch_failed(self, error: grpc.aio.AioRpcError) -> None:
        self._is_reachable = error.code() is not grpc.StatusCode.UNAVAILABLE
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            self._set(True, "")  # no health service, but a server that answers
        elif error.code() is grpc.StatusCode.UNAVAILABLE:
            self._set(False, "the worker cannot be reached")
        else:
            self._set(False, f"the worker's health check failed with {error.code().name}")

    def _set(self, is_serving: bool, reason: str) -> None:
        if (is_serving, reason) != (self._is_serving, self._reason) or not self._is_known:
            target = self.target
            _log.info("worker health", target=target, serving=is_serving, reason=reason or None)
        self._is_serving, self._reason = is_serving, reason
        self._is_known = True
        self._on_change()
