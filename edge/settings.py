"""Every setting of the edge, read once from flags and SLUICE_EDGE_* variables."""

import sys
from collections.abc import Sequence
from typing import Literal

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, CliApp, SettingsConfigDict, SettingsError

ENV_PREFIX = "SLUICE_EDGE_"


class InvalidSettingsError(Exception):
    """A setting has a value that cannot be used. The text is one line that names it."""


class EdgeSettings(BaseSettings):
    """Settings of the edge."""

    model_config = SettingsConfigDict(
        frozen=True,
        env_prefix=ENV_PREFIX,
        env_ignore_empty=True,
        cli_prog_name="python -m edge",
        cli_kebab_case=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        cli_show_env_vars=True,
        cli_exit_on_error=False,
    )

    host: str = Field("0.0.0.0", description="Address to listen on.")  # noqa: S104
    port: int = Field(
        8000, ge=0, le=65535, description="TCP port to listen on; 0 picks a free one."
    )
    worker: str = Field(
        "localhost:50051",
        description="gRPC target of the worker: host:port, or unix:/path.",
    )
    cors_origins: str = Field(
        "",
        description="Browser origins that may call, comma separated; * for all, empty for none.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe log lines written."
    )
    heartbeat_seconds: float = Field(
        15, gt=0, le=3600, description="Silence, in seconds, after which a stream gets a `: ping`."
    )
    first_message_seconds: float = Field(
        5,
        gt=0,
        le=3600,
        description="Seconds to wait for the worker's first message before a stream's 200 goes out"
        " without it.",
    )
    request_timeout_seconds: float = Field(
        600, gt=0, le=86400, description="Deadline of a generation, in seconds."
    )
    read_timeout_seconds: float = Field(
        30, gt=0, le=3600, description="Seconds a client may take to send one whole request."
    )
    send_timeout_seconds: float = Field(
        30,
        gt=0,
        le=3600,
        description="Seconds after which a client that stopped reading is dropped.",
    )
    connect_timeout_seconds: float = Field(
        2,
        gt=0,
        le=60,
        description="Seconds a request may wait while the worker's health is not yet known, and the"
        " time limit of a call that only asks the worker something.",
    )
    unready_seconds: float = Field(
        0,
        ge=0,
        le=600,
        description="Seconds between telling /ready that the edge stops and refusing new work, for"
        " load balancers to notice.",
    )
    drain_seconds: float = Field(
        30, ge=0, le=3600, description="Seconds that running generations get to end on shutdown."
    )
    max_connections: int = Field(
        4096, ge=1, description="Open connections above which new requests get a 429."
    )
    max_body_bytes: int = Field(
        4 * 1024 * 1024, ge=1024, le=2**30, description="Largest request body, in bytes."
    )
    max_json_depth: int = Field(
        32, ge=4, le=512, description="Deepest nesting of a request body, in levels."
    )
    max_prompts: int = Field(
        32, ge=1, le=1024, description="Most prompts in one /v1/completions request."
    )
    max_message_bytes: int = Field(
        64 * 1024 * 1024,
        ge=1024 * 1024,
        le=2**31 - 1,
        description="Largest gRPC message from or to the worker, in bytes.",
    )

    def allowed_origins(self) -> list[str]:
        """The CORS origins as a list."""
        return [origin.strip() for origin in self.cors_origins.split(",") if origin.strip()]


def load_settings(arguments: Sequence[str] | None = None) -> EdgeSettings:
    """Reads flags (by default those of the process) and environment, or raises InvalidSettings."""
    try:
        given = sys.argv[1:] if arguments is None else list(arguments)
        return CliApp.run(EdgeSettings, cli_args=given, cli_exit_on_error=False)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        flag, variable = "--" + name.replace("_", "-"), ENV_PREFIX + name.upper()
        text = f"{flag} ({variable}): {first['msg']}, got {first['input']!r}"
        raise InvalidSettingsError(" ".join(text.split())) from None
    except SettingsError as error:
        text = str(error).removeprefix("error parsing CLI: ")
        raise InvalidSettingsError(" ".join(text.split())) from None
