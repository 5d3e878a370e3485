"""The grpc.aio server: the service, health, reflection, limits and keepalive."""

from __future__ import annotations

import socket
from typing import Any, Final

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from inference_worker.health import HealthService
from inference_worker.request_log import get_logger
from inference_worker.server_certificates import ServerCertificates
from inference_worker.service import GenerationService
from inference_worker.settings import WorkerSettings
from inference_worker.worker import Worker
from protos.sluice.v1 import generation_pb2, generation_pb2_grpc

SERVICE_NAME: Final = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name
VLLM_SERVICE_NAME: Final = "vllm.grpc.engine.VllmEngine"  # with --vllm-engine
_STOP_SECONDS: Final = 0.5  # for the last bytes to leave


class AddressUnusable(Exception):
    """The server cannot listen where it is told to."""


class Server:
    """Listens from the start, answers once there is a worker."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._server = grpc.aio.server(
            options=_options(settings), maximum_concurrent_rpcs=settings.max_calls
        )
        self._names = [SERVICE_NAME]
        if settings.vllm_engine:
            self._names.append(VLLM_SERVICE_NAME)
        self._health = HealthService(("", *self._names))
        self._certificates: ServerCertificates | None = None
        if settings.tls_cert is not None and settings.tls_key is not None:
            self._certificates = ServerCertificates(
                settings.tls_cert, settings.tls_key, settings.tls_client_ca
            )
        self.address = ""  # known once bound

    def bind(self) -> None:
        """Take the address, so that a taken port is noticed before a model is loaded.

        Raises: AddressUnusable.
        """
        settings = self._settings
        if settings.unix_socket is not None:
            self.address = f"unix:{settings.unix_socket}"
            self._add_port(self.address)
            return
        _check_address(settings.host, settings.port)
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        port = self._add_port(f"{host}:{settings.port}")
        self.address = f"{host}:{port}"

    async def start(self, worker: Worker) -> None:
        """Answer calls."""
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(
            GenerationService(worker, self._settings.send_timeout_seconds), self._server
        )
        if self._settings.vllm_engine:
            # comes with an extra
            from inference_worker.vllm_engine.service import add_to_server

            add_to_server(worker, self._settings, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        _add_reflection(self._server, self._names)
        await self._server.start()
        self._health.set_serving(True)

    @property
    def is_serving(self) -> bool:
        """What health checks are told."""
        return self._health.is_serving

    def reload_certificates(self) -> None:
        """Read the certificates again, if there are any, and say in the log what came of it."""
        if self._certificates is not None:
            self._certificates.reload()
        else:
            get_logger().info("nothing to reload: there is no certificate")

    def set_not_serving(self) -> None:
        """Tell health checks that no new work should come."""
        self._health.set_serving(False)

    async def stop(self) -> None:
        """Refuse connections, let the last bytes leave, and end what is left. Does not wait for handlers."""
        self._health.close()
        await self._server.stop(_STOP_SECONDS)

    def _add_port(self, address: str) -> int:
        try:
            if self._certificates is not None:
                return self._server.add_secure_port(address, self._certificates.credentials())
            return self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise AddressUnusable(f"cannot listen on {address}") from error


def _check_address(host: str, port: int) -> None:
    """Try the address with a plain socket: gRPC tells less, and writes it to stderr besides."""
    try:
        for family, kind, _, _, address in socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
    except OSError as error:
        raise AddressUnusable(f"cannot listen on {host} port {port}: {error.strerror}") from error


def _options(settings: WorkerSettings) -> list[tuple[str, Any]]:
    keepalive_timeout = round(settings.keepalive_timeout_seconds * 1000)
    return [
        ("grpc.so_reuseport", 0),  # a second worker on the same port is a mistake, not a pool
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_send_message_length", settings.max_message_bytes),
        ("grpc.max_allowed_incoming_connections", settings.max_connections),
        ("grpc.server_handshake_timeout_ms", round(settings.handshake_seconds * 1000)),
        # Until a client has acknowledged the server's settings, gRPC holds it to none of them.
        ("grpc.http2.settings_timeout", round(settings.handshake_seconds * 1000)),
        ("grpc.max_connection_idle_ms", round(settings.connection_idle_seconds * 1000)),
        ("grpc.max_concurrent_streams", settings.max_streams),
        # Between the first and the second, by default 1000 and 3000, gRPC cancels calls of a burst at random, where
        # --max-calls and admission have an answer.
        ("grpc.server.max_pending_requests", settings.max_calls),
        ("grpc.server.max_pending_requests_hard_limit", settings.max_calls),
        # both: from the first on gRPC refuses some calls at random
        ("grpc.max_metadata_size", settings.max_metadata_bytes),
        ("grpc.absolute_max_metadata_size", settings.max_metadata_bytes),
        ("grpc.keepalive_time_ms", round(settings.keepalive_seconds * 1000)),
        ("grpc.keepalive_timeout_ms", keepalive_timeout),
        # the one that newer versions of gRPC obey
        ("grpc.http2.ping_timeout_ms", keepalive_timeout),
        ("grpc.keepalive_permit_without_calls", 1),
        (
            "grpc.http2.min_ping_interval_without_data_ms",
            round(settings.min_client_ping_seconds * 1000),
        ),
    ]


def _add_reflection(server: grpc.aio.Server, services: list[str]) -> None:
    """Serve reflection as v1alpha and, for newer clients, as v1: the messages are the same on the wire."""
    health_name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
    names = (*services, health_name, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    handler = grpc.stream_stream_rpc_method_handler(
        reflection.aio.ReflectionServicer(names).ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    # Not among the advertised names: there is no descriptor for it here, and clients that list services ask for one.
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler(
                "grpc.reflection.v1.ServerReflection", {"ServerReflectionInfo": handler}
            ),
        )
    )
