"""Settings of streams that may be resumed: how much of them is kept."""

from __future__ import annotations

from pydantic import Field

from inference_worker.settings.setting_group import SettingGroup, unit


class ReplaySettings(SettingGroup):
    """What is kept."""

    max_resume_seconds: float = Field(
        300,
        ge=0,
        le=86_400,
        description="Longest resume window: how long a stream is kept after its end, and goes on without a reader. 0 "
        "keeps none.",
        json_schema_extra=unit("seconds"),
    )
    replay_messages: int = Field(
        65_536,
        ge=1,
        description="Most messages that are kept of one stream; the oldest go first, and what needs them cannot be "
        "resumed.",
        json_schema_extra=unit("messages"),
    )
    replay_bytes: int = Field(
        4 * 1024 * 1024,
        ge=1024,
        description="Most bytes that are kept of one stream, likewise.",
        json_schema_extra=unit("bytes"),
    )
    replay_streams: int = Field(
        1024,
        ge=1,
        description="Most streams that are kept. Where there are more, those of the key that has most go first: what "
        "ended, then what is parked, the oldest first. Beside so many that run, a new one cannot be resumed.",
        json_schema_extra=unit("streams"),
    )
    replay_total_bytes: int = Field(
        256 * 1024 * 1024,
        ge=1024,
        description="Most bytes that are kept of all streams together; as many streams as need be go, likewise.",
        json_schema_extra=unit("bytes"),
    )
