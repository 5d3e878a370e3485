"""Settings of the engine: what takes part in a step, and the memory of the KV cache."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from inference_worker.settings.setting_group import SettingGroup, unit


class EngineSettings(SettingGroup):
    """How sequences are run."""

    engine: str | None = Field(
        None,
        pattern=r"^\w+(\.\w+)*:\w+$",
        description="An engine of your own in place of the worker's, made by calling what MODULE:FACTORY names. "
        "--model then names the tokenizer and chat template; settings of the worker's engine mean what yours makes "
        "of them. Unset: the worker's.",
        json_schema_extra=unit("module:factory"),
    )
    max_running: int = Field(
        32,
        ge=1,
        description="Most sequences that take part in one step.",
        json_schema_extra=unit("sequences"),
    )
    max_batch_tokens: int = Field(
        512,
        ge=1,
        description="Most tokens of one step, decode rows and prefill chunks together; at least --max-running.",
        json_schema_extra=unit("tokens"),
    )
    block_size: int = Field(
        16,
        ge=1,
        le=1024,
        description="Tokens in one block of the KV cache.",
        json_schema_extra=unit("tokens"),
    )
    step_timeout_seconds: float = Field(
        120,
        gt=0,
        description="A step of the engine that takes longer hangs: every stream is told, the stack of the engine's "
        "thread is logged, and the process ends with 1. An engine of your own hangs when its event loop does not turn "
        "for so long. More for a large model on a slow processor.",
        json_schema_extra=unit("seconds"),
    )
    kv_cache_mib: int | None = Field(
        None,
        ge=1,
        description="Memory of the KV cache. Unset: --kv-cache-fraction decides.",
        json_schema_extra=unit("MiB"),
    )
    kv_cache_fraction: float = Field(
        0.8,
        gt=0,
        le=0.98,
        description="Share of the memory that is free once the model is loaded, for the KV cache; on a GPU, of what is "
        "free beside the largest step, which is run to find out.",
        json_schema_extra=unit("fraction"),
    )
    prefix_cache: bool = Field(
        True,
        description="Keep the KV of ended prompts and share it with later ones that begin alike.",
        json_schema_extra=unit("bool"),
    )
    prefix_cache_across_keys: bool = Field(
        False,
        description="Share it between the requests of different API keys, too. Saves memory and time where they have "
        "beginnings in common; but whoever guesses a prompt of another key's learns from the cached tokens, and from "
        "the time to the first one, that the guess is right.",
        json_schema_extra=unit("bool"),
    )

    @model_validator(mode="after")
    def _check_batch(self) -> Self:
        if self.max_batch_tokens < self.max_running:
            # A decode row is one token: a smaller budget could never run --max-running sequences in one step.
            raise ValueError(
                f"--max-batch-tokens ({self.max_batch_tokens}) must be at least "
                f"--max-running ({self.max_running})"
            )
        return self
