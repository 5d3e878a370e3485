"""What all groups of settings have in common."""

from __future__ import annotations

from typing import Any

from pydantic_settings import BaseSettings, SettingsConfigDict


def unit(name: str) -> dict[str, Any]:
    """Say what a setting counts; --help shows it as the flag's placeholder."""
    return {"unit": name}


class SettingGroup(BaseSettings):
    """Some of the worker's settings: each one a field, a flag and an environment variable."""

    model_config = SettingsConfigDict(
        env_prefix="SLUICE_WORKER_",
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
    )
