"""Every setting of the edge, read once from flags and SLUICE_EDGE_* variables."""

import re
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from edge.certificates import check_pair, check_roots
from edge.worker_targets import split_targets

ENV_PREFIX = "SLUICE_EDGE_"

_HOST = r"(\[[0-9A-Fa-f:.]+\]|[^\s/:@?#\[\]]+)"
_ORIGIN = re.compile(rf"\*|[A-Za-z][A-Za-z0-9+.-]*://{_HOST}(:[0-9]{{1,5}})?")


def unit(name: str) -> dict[str, Any]:
    """What a setting counts; --help shows it as the flag's placeholder."""
    return {"unit": name}


class EdgeSettings(BaseSettings):
    """Serve HTTP and server-sent events in front of workers."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
    )

    host: str = Field(
        "127.0.0.1",
        min_length=1,
        description="Address to listen on. Without API keys only trusted callers should reach it.",
        json_schema_extra=unit("address"),
    )
    port: int = Field(
        8000,
        ge=0,
        le=65535,
        description="TCP port to listen on; 0 picks a free one.",
        json_schema_extra=unit("port"),
    )
    worker: str = Field(
        "localhost:50051",
        description="gRPC targets of the workers, separated by commas: host:port, unix:/path, or"
        " dns:///name:port for every address that the name has. All serve the same model.",
        json_schema_extra=unit("target"),
    )
    resolve_seconds: float = Field(
        10,
        gt=0,
        le=3600,
        description="Time after which a dns: name is looked up again; a second while a worker of"
        " it does not serve.",
        json_schema_extra=unit("seconds"),
    )
    failover_attempts: int = Field(
        2,
        ge=0,
        le=16,
        description="How often a request goes to another worker after one that was lost; 0 turns"
        " failover off.",
        json_schema_extra=unit("times"),
    )
    failover_seconds: float = Field(
        10,
        gt=0,
        le=600,
        description="Time that a stream whose worker was lost may wait for another one to take it.",
        json_schema_extra=unit("seconds"),
    )
    failover_tokens: int = Field(
        65536,
        ge=0,
        description="Completion tokens of a stream that are remembered for another worker, 4 bytes"
        " each; a longer stream fails with its worker.",
        json_schema_extra=unit("tokens"),
    )
    admin_host: str = Field(
        "127.0.0.1",
        min_length=1,
        description="Address of --admin-port.",
        json_schema_extra=unit("address"),
    )
    admin_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="TCP port for /health, /ready and /metrics, which are then nowhere else, without keys and TLS;"
        " 0 picks a free one."
        " Unset: they are on --port.",
        json_schema_extra=unit("port"),
    )
    api_keys_file: str = Field(
        "",
        description="File of API keys, one a line as `python -m edge.keys` prints them; SIGHUP reads it again.",
        json_schema_extra=unit("path"),
    )
    api_keys: str = Field(
        "",
        description="More such lines, separated by semicolons. With neither, everybody may call.",
        json_schema_extra=unit("lines"),
    )
    token_secret_file: str = Field(
        "",
        description="File of at least 32 random bytes that signs the tokens of /v1/tokens, the same for all edges."
        " Unset: a random secret, so that an edge takes only its own tokens.",
        json_schema_extra=unit("path"),
    )
    token_seconds: int = Field(
        300,
        ge=1,
        le=86400,
        description="How long a token of /v1/tokens may begin requests.",
        json_schema_extra=unit("seconds"),
    )
    open_metrics: bool = Field(
        False,
        description="Whether /metrics needs no API key on --port.",
        json_schema_extra=unit("bool"),
    )
    tls_cert: str = Field(
        "",
        description="PEM file of the certificate, and those between it and its root, for HTTPS on --port. Unset: HTTP.",
        json_schema_extra=unit("path"),
    )
    tls_key: str = Field(
        "",
        validate_default=True,
        description="PEM file of its private key.",
        json_schema_extra=unit("path"),
    )
    worker_ca: str = Field(
        "",
        description="PEM file of the roots that workers' certificates are checked against; turns on TLS to them.",
        json_schema_extra=unit("path"),
    )
    worker_cert: str = Field(
        "",
        description="PEM file of the certificate that the edge shows workers who ask for one.",
        json_schema_extra=unit("path"),
    )
    worker_key: str = Field(
        "",
        validate_default=True,
        description="PEM file of its private key.",
        json_schema_extra=unit("path"),
    )
    worker_server_name: str = Field(
        "",
        description="Name that workers' certificates are for, where it is not the one in --worker.",
        json_schema_extra=unit("name"),
    )
    cors_origins: str = Field(
        "",
        description="Browser origins that may call, separated by commas: scheme://host[:port], or * for all.",
        json_schema_extra=unit("origins"),
    )
    playground: bool = Field(
        True,
        description="Serve the playground page at /.",
        json_schema_extra=unit("bool"),
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info",
        description="Least severe log lines written: debug, info, warning or error.",
        json_schema_extra=unit("level"),
    )
    heartbeat_seconds: float = Field(
        15,
        gt=0,
        le=3600,
        description="Silence after which a stream gets a `: ping`.",
        json_schema_extra=unit("seconds"),
    )
    # A worker lets in or refuses at once, so what takes long is most likely the overload that a status had better tell.
    # Proxies are patient for longer: nginx and AWS's balancers for 60 seconds.
    first_message_seconds: float = Field(
        15,
        gt=0,
        le=3600,
        description="Time to wait for the worker's first message before a stream's 200 goes out"
        " without it.",
        json_schema_extra=unit("seconds"),
    )
    resume_window_seconds: float = Field(
        30,
        ge=0,
        le=86400,
        description="How long a stream may be resumed after its reader went away, and after its end, where the"
        " request does not say: GET /v1/streams, /v1/responses and /api/chat. 0 is not at all. Workers have limits of"
        " their own.",
        json_schema_extra=unit("seconds"),
    )
    request_timeout_seconds: float = Field(
        600,
        gt=0,
        le=86400,
        description="Deadline of a generation, and of the tokenization of a prompt.",
        json_schema_extra=unit("seconds"),
    )
    read_timeout_seconds: float = Field(
        30,
        gt=0,
        le=3600,
        description="Time a client may take to send one whole request.",
        json_schema_extra=unit("seconds"),
    )
    send_timeout_seconds: float = Field(
        30,
        gt=0,
        le=3600,
        description="Time after which a client that stopped reading is dropped.",
        json_schema_extra=unit("seconds"),
    )
    connect_timeout_seconds: float = Field(
        2,
        gt=0,
        le=60,
        description="Time a request may wait while the worker's health is not yet known or none of"
        " several workers serves, and the time limit of a call that only asks the worker something.",
        json_schema_extra=unit("seconds"),
    )
    unready_seconds: float = Field(
        0,
        ge=0,
        le=600,
        description="Time between telling /ready that the edge stops and refusing new work, for"
        " load balancers to notice.",
        json_schema_extra=unit("seconds"),
    )
    drain_seconds: float = Field(
        30,
        ge=0,
        le=3600,
        description="Time that running generations get to end on shutdown.",
        json_schema_extra=unit("seconds"),
    )
    max_connections: int = Field(
        4096,
        ge=1,
        description="Open connections above which those that come get a 429.",
        json_schema_extra=unit("connections"),
    )
    max_connections_per_address: int = Field(
        1024,
        ge=1,
        description="The same for one address, as the connection tells it: of clients behind a proxy that is the"
        " proxy's, since no header is believed. Beyond twice as many there is no answer.",
        json_schema_extra=unit("connections"),
    )
    max_header_bytes: int = Field(
        64 * 1024,
        ge=1024,
        le=2**24,
        description="Largest head of a request: its URL and headers, and trailers.",
        json_schema_extra=unit("bytes"),
    )
    max_headers: int = Field(
        128,
        ge=8,
        le=65536,
        description="Most headers and trailers of a request.",
        json_schema_extra=unit("headers"),
    )
    max_url_bytes: int = Field(
        32 * 1024,
        ge=256,
        le=2**24,
        description="Longest URL of a request.",
        json_schema_extra=unit("bytes"),
    )
    max_query_parameters: int = Field(
        128,
        ge=1,
        le=65536,
        description="Most parameters in the URL of a request.",
        json_schema_extra=unit("parameters"),
    )
    max_body_bytes: int = Field(
        4 * 1024 * 1024,
        ge=1024,
        le=2**30,
        description="Largest request body.",
        json_schema_extra=unit("bytes"),
    )
    max_bodies_bytes: int = Field(
        512 * 1024 * 1024,
        ge=64 * 1024,
        le=2**40,
        description="Request bodies that are read and parsed at once, together; beyond it one of more than 64 KiB gets"
        " a 429.",
        json_schema_extra=unit("bytes"),
    )
    max_json_depth: int = Field(
        32,
        ge=4,
        le=250,  # what orjson writes again, a tool's schema say, may be 254 levels deep
        description="Deepest nesting of a request body.",
        json_schema_extra=unit("levels"),
    )
    max_json_values: int = Field(
        65536,
        ge=16,
        le=2**24,
        description="Most objects, arrays and strings in a request body, names of fields included.",
        json_schema_extra=unit("values"),
    )
    max_prompts: int = Field(
        32,
        ge=1,
        le=1024,
        description="Most prompts in one /v1/completions request.",
        json_schema_extra=unit("prompts"),
    )
    max_message_bytes: int = Field(
        64 * 1024 * 1024,
        ge=1024 * 1024,
        le=2**31 - 1,
        description="Largest gRPC message from or to the worker.",
        json_schema_extra=unit("bytes"),
    )
    max_socket_fragments: int = Field(
        1024,
        ge=1,
        le=2**20,
        description="Most pieces of one WebSocket message, however small they are.",
        json_schema_extra=unit("pieces"),
    )
    socket_idle_seconds: float = Field(
        300,
        gt=0,
        le=86400,
        description="Time after which a WebSocket that generates nothing and sends nothing is closed.",
        json_schema_extra=unit("seconds"),
    )

    @field_validator("worker")
    @classmethod
    def _are_targets(cls, value: str) -> str:
        split_targets(value)
        return value

    @field_validator("tls_key")
    @classmethod
    def _is_key_of_edge(cls, value: str, info: ValidationInfo) -> str:
        check_pair(info.data.get("tls_cert", ""), value, "--tls-cert")
        return value

    @field_validator("worker_ca")
    @classmethod
    def _are_roots(cls, value: str) -> str:
        check_roots(value)
        return value

    @field_validator("worker_key")
    @classmethod
    def _is_key_for_workers(cls, value: str, info: ValidationInfo) -> str:
        check_pair(info.data.get("worker_cert", ""), value, "--worker-cert")
        if value and not info.data.get("worker_ca"):
            raise ValueError("needs --worker-ca, which turns on TLS")
        return value

    @field_validator("worker_server_name")
    @classmethod
    def _has_tls(cls, value: str, info: ValidationInfo) -> str:
        if value and not info.data.get("worker_ca"):
            raise ValueError("needs --worker-ca, which turns on TLS")
        return value

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, value: str) -> str:
        for origin in filter(None, map(str.strip, value.split(","))):
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(f"{origin!r} must be * or scheme://host[:port]")
        return value

    def allowed_origins(self) -> list[str]:
        """The CORS origins as a list."""
        return [origin.strip() for origin in self.cors_origins.split(",") if origin.strip()]
