"""Settings of what the worker tells about itself: metrics and the log."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from inference_worker.settings.setting_group import SettingGroup, unit


class TelemetrySettings(SettingGroup):
    """What it tells."""

    metrics_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="TCP port of /metrics, /health and /ready over HTTP, without TLS; 0 takes a free one and tells it "
        "in the ready line. Unset: nowhere.",
        json_schema_extra=unit("port"),
    )
    metrics_host: str = Field(
        "127.0.0.1",
        min_length=1,
        description="Address of --metrics-port.",
        json_schema_extra=unit("address"),
    )

    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info",
        description="Least severe line that is written.",
        json_schema_extra=unit("level"),
    )
    log_prompts: bool = Field(
        False,
        description="Write prompts and completions into the log.",
        json_schema_extra=unit("bool"),
    )
