"""What the request models of all dialects share: field types, sampling fields, and readable errors."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from edge.errors import EdgeError, invalid_request
from protos.sluice.v1 import generation_pb2 as pb

# Bounds of the contract's number types. What values make sense is the worker's to say.
Uint32 = Annotated[int, Field(ge=0, le=2**32 - 1)]
Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Float = Annotated[float, Field(ge=-1e9, le=1e9, allow_inf_nan=False)]
TokenIdKey = Annotated[str, Field(pattern=r"^[0-9]{1,10}$")]

Model = TypeVar("Model", bound="RequestModel")


class RequestModel(BaseModel):
    """A body, or a part of one, in which every field is known."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # Fields that are accepted only with values that ask for nothing.
    UNSUPPORTED: ClassVar[frozenset[str]] = frozenset()


class SamplingFields(RequestModel):
    """How tokens are drawn. What is left out, or null, is the worker's to choose."""

    temperature: Float | None = Field(None, description="0 is greedy.")
    top_p: Float | None = Field(None, description="Keep tokens that reach this probability.")
    top_k: Annotated[int, Field(ge=-1, le=2**32 - 1)] | None = Field(
        None, description="Keep the k likeliest tokens; 0 and -1 keep all."
    )
    min_p: Float | None = Field(None, description="Drop tokens below this share of the likeliest.")
    repetition_penalty: Float | None = Field(None, description="Above 1 discourages repetition.")
    presence_penalty: Float | None = Field(None, description="Taken once from tokens present.")
    frequency_penalty: Float | None = Field(None, description="Taken for each occurrence.")
    logit_bias: dict[TokenIdKey, Float] | None = Field(None, description="Token id to bias.")
    seed: Int64 | None = Field(None, description="Makes the draws repeatable.")

    def sampling(self) -> pb.Sampling:
        """These fields in the contract's words."""
        message = pb.Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k if self.top_k is not None and self.top_k > 0 else None,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=self.seed,
        )
        for token_id, bias in (self.logit_bias or {}).items():
            if int(token_id) > 2**32 - 1:
                raise invalid_request("Not a token id.", f"logit_bias[{token_id}]")
            message.logit_bias[int(token_id)] = bias
        return message


class StoppingFields(RequestModel):
    """When a generation ends, besides its length."""

    stop: str | list[str] | None = Field(None, description="Texts that end a choice.")
    stop_token_ids: list[Uint32] | None = Field(None, description="Token ids that end a choice.")
    ignore_eos: bool | None = Field(None, description="Go on after an end-of-sequence token.")

    def stopping(self, max_tokens: int | None) -> pb.Stopping:
        """These fields in the contract's words."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        return pb.Stopping(
            max_tokens=max_tokens,
            stop_sequences=stop or [],
            stop_token_ids=self.stop_token_ids or [],
            ignore_eos=self.ignore_eos,
        )


def validate(model: type[Model], body: Mapping[str, Any], *, strict: bool = True) -> Model:
    """The body as a model, or a 400 that names the field."""
    try:
        return model.model_validate(body, strict=strict)
    except ValidationError as error:
        raise _explain(model, body, error) from None


def _explain(
    model: type[RequestModel], body: Mapping[str, Any], error: ValidationError
) -> EdgeError:
    # A union reports every member that did not fit; the one that got furthest is the one that was meant.
    paths = [(_path(body, detail), detail) for detail in error.errors(include_url=False)]
    path, detail = max(paths, key=lambda entry: entry[0].count(".") + entry[0].count("["))
    field = re.split(r"[.\[]", path, maxsplit=1)[0]
    if detail["type"] == "extra_forbidden":
        return invalid_request(f"Unrecognized field: {path}.", path, "unknown_field")
    if field in model.UNSUPPORTED:
        return invalid_request(f"{field} is not supported with this value.", field, "unsupported")
    if detail["type"] == "missing":
        return invalid_request(f"{path} is required.", path)
    return invalid_request(f"{path}: {detail['msg']}.", path)


def _path(body: Mapping[str, Any], detail: ErrorDetails) -> str:
    """The path of an error in the body, without pydantic's names of union members."""
    path = ""
    value: Any = body
    for part in detail["loc"]:
        if isinstance(value, Mapping) and part in value:
            value = value[str(part)]
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        elif not (detail["type"] == "missing" and part == detail["loc"][-1]):
            continue
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path.removeprefix(".")
