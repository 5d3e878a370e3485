"""Settings of the model: which one, under which names, and where and how it is computed."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator
from pydantic_settings import NoDecode

from inference_worker.default_model import CHECKPOINT
from inference_worker.settings.setting_group import SettingGroup, unit

EMBEDDED_MODEL_NAME = "sluice-tiny"


class ModelSettings(SettingGroup):
    """What is served."""

    model: str = Field(
        str(CHECKPOINT),
        min_length=1,
        description="Checkpoint to serve: a directory or a Hugging Face hub id. The default is the embedded model.",
        json_schema_extra=unit("path or id"),
    )
    model_name: str | None = Field(
        None,
        min_length=1,
        description=f"Name the model answers to. Unset: {EMBEDDED_MODEL_NAME} for the embedded model, "
        "else the last part of --model.",
        json_schema_extra=unit("name"),
    )
    model_aliases: Annotated[tuple[str, ...], NoDecode] = Field(
        ("default", "dummy", "tgi"),
        description="Other names the model answers to, separated by commas.",
        json_schema_extra=unit("names"),
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Number type of the weights; auto takes the checkpoint's.",
        json_schema_extra=unit("type"),
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="Where the model runs: auto, cpu, cuda or cuda:N; auto takes a GPU if there is one.",
        json_schema_extra=unit("device"),
    )
    threads: int | None = Field(
        None,
        ge=1,
        description="Threads of one matrix product on a CPU. Unset: one for a model below 20 million parameters, "
        "else torch's choice.",
        json_schema_extra=unit("threads"),
    )
    native: bool = Field(
        True,
        description="Run the steps of a model in C instead of in torch, on one CPU thread, or on several: up to 8 for "
        "a model below 2 billion parameters, any number below 100 million. Compiled at the first start, if there is a "
        "C compiler. For float32 and bfloat16 models of the kinds Llama, Mistral, Qwen2 and Qwen3.",
        json_schema_extra=unit("bool"),
    )
    context_length: int | None = Field(
        None,
        ge=2,
        description="Most tokens of prompt and completion together. Unset: what the checkpoint allows, which is the "
        "most; of a rotary embedding that changes with the longest sequence (dynamic, longrope), what it is before it "
        "changes.",
        json_schema_extra=unit("tokens"),
    )

    deterministic: bool = Field(
        False,
        description="Compute every token alike to the last bit, whatever else is in the batch, however its prompt is "
        "cut, and whether or not its prefix was cached. Slower. "
        "A model or machine on which it does not hold is refused.",
        json_schema_extra=unit("bool"),
    )

    @field_validator("model_aliases", mode="before")
    @classmethod
    def _split_names(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(name.strip() for name in value.split(",") if name.strip())
        return value

    @property
    def served_name(self) -> str:
        """The model's own name."""
        if self.model_name is not None:
            return self.model_name
        if self.model == str(CHECKPOINT):
            return EMBEDDED_MODEL_NAME
        return self.model.rstrip("/").rsplit("/", 1)[-1] or self.model
