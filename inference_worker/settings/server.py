"""Settings of the gRPC server: where it listens, to whom, and what a connection may ask of it."""

from __future__ import annotations

from pydantic import Field, ValidationInfo, field_validator

from inference_worker.certificates import check_pair, check_roots
from inference_worker.settings.setting_group import SettingGroup, unit


class ServerSettings(SettingGroup):
    """How callers reach it."""

    host: str = Field(
        "127.0.0.1",
        min_length=1,
        description="Address to listen on. Without --tls-client-ca only trusted callers should reach it.",
        json_schema_extra=unit("address"),
    )
    port: int = Field(
        50051,
        ge=0,
        le=65535,
        description="TCP port to listen on; 0 takes a free one and tells it in the ready line.",
        json_schema_extra=unit("port"),
    )
    unix_socket: str | None = Field(
        None,
        min_length=1,
        description="Path of a Unix socket to listen on, in place of --host and --port.",
        json_schema_extra=unit("path"),
    )
    tls_cert: str | None = Field(
        None,
        min_length=1,
        description="PEM file of the certificate, and those between it and its root, for TLS. Unset: none.",
        json_schema_extra=unit("path"),
    )
    tls_key: str | None = Field(
        None,
        min_length=1,
        validate_default=True,
        description="PEM file of its private key.",
        json_schema_extra=unit("path"),
    )
    tls_client_ca: str | None = Field(
        None,
        min_length=1,
        description="PEM file of roots: callers need a certificate of one of them. Unset: they need none.",
        json_schema_extra=unit("path"),
    )
    max_message_bytes: int = Field(
        16 * 1024 * 1024,
        ge=1024,
        le=2**31 - 1,
        description="Largest message received or sent.",
        json_schema_extra=unit("bytes"),
    )
    max_connections: int = Field(
        512,
        ge=1,
        le=65536,
        description="Most open connections; more are closed before a word is exchanged. Each takes an open"
        " file.",
        json_schema_extra=unit("connections"),
    )
    max_calls: int = Field(
        16384,
        ge=1,
        le=2**31 - 1,
        description="Most calls at once on all connections together, health watches among them; more are refused.",
        json_schema_extra=unit("calls"),
    )
    max_streams: int = Field(
        4096,
        ge=1,
        le=2**31 - 1,
        description="Most calls at once on one connection; more wait until others have ended.",
        json_schema_extra=unit("calls"),
    )
    max_metadata_bytes: int = Field(
        16 * 1024,
        ge=1024,
        le=2**24,
        description="Most metadata of one call; a call with more is refused.",
        json_schema_extra=unit("bytes"),
    )
    handshake_seconds: float = Field(
        10,
        gt=0,
        le=3600,
        description="Time that a new connection may take until it speaks TLS, if that is set, and HTTP/2 by the "
        "server's rules.",
        json_schema_extra=unit("seconds"),
    )
    connection_idle_seconds: float = Field(
        600,
        gt=0,
        le=86_400,
        description="A connection without a call for so long is closed; clients of gRPC open another when they "
        "need it.",
        json_schema_extra=unit("seconds"),
    )
    heartbeat_seconds: float = Field(
        15,
        gt=0,
        description="A stream that was silent this long sends a heartbeat.",
        json_schema_extra=unit("seconds"),
    )
    send_timeout_seconds: float = Field(
        60,
        gt=0,
        description="A stream that its caller did not read for this long is ended, and its memory freed.",
        json_schema_extra=unit("seconds"),
    )
    unready_seconds: float = Field(
        0,
        ge=0,
        le=600,
        description="Time between telling health checks that the worker stops and refusing new work, for callers that "
        "only ask now and then to notice.",
        json_schema_extra=unit("seconds"),
    )
    drain_seconds: float = Field(
        30,
        ge=0,
        description="How long running streams may take to finish after SIGTERM or SIGINT.",
        json_schema_extra=unit("seconds"),
    )
    keepalive_seconds: float = Field(
        20,
        gt=0,
        description="A connection that was silent this long is pinged.",
        json_schema_extra=unit("seconds"),
    )
    keepalive_timeout_seconds: float = Field(
        10,
        gt=0,
        description="A connection whose ping got no answer for this long is closed and its requests are cancelled.",
        json_schema_extra=unit("seconds"),
    )
    min_client_ping_seconds: float = Field(
        5,
        gt=0,
        description="Clients that ping more often than this are disconnected.",
        json_schema_extra=unit("seconds"),
    )

    vllm_engine: bool = Field(
        False,
        description="Serve vllm.grpc.engine.VllmEngine too, for a gateway that drives vLLM's workers. Needs the extra "
        "gateway.",
        json_schema_extra=unit("bool"),
    )

    @field_validator("tls_key")
    @classmethod
    def _is_key(cls, value: str | None, info: ValidationInfo) -> str | None:
        check_pair(info.data.get("tls_cert") or "", value or "", "--tls-cert")
        if value and info.data.get("unix_socket"):
            raise ValueError("is not for a --unix-socket")
        return value

    @field_validator("tls_client_ca")
    @classmethod
    def _are_roots(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value and not info.data.get("tls_key"):
            raise ValueError("needs --tls-cert and --tls-key")
        check_roots(value or "")
        return value

    @field_validator("vllm_engine")
    @classmethod
    def _check_vllm_engine(cls, value: bool) -> bool:
        if value:
            # Imported only now, and before a model is loaded: the package is an extra, and wants a newer protobuf than
            # the worker does.
            try:
                import smg_grpc_proto.generated.vllm_engine_pb2_grpc  # noqa: F401
            except Exception as error:
                raise ValueError(
                    f"needs the extra gateway: pip install 'sluice[gateway]' ({error})"
                ) from error
        return value
