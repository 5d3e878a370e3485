"""What the request models of all dialects share: field types, sampling fields, and readable errors."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from google.protobuf import duration_pb2
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from edge.errors import EdgeError, invalid_request
from edge.request_timeout import duration
from protos.sluice.v1 import generation_pb2 as pb

# Bounds of the contract's number types. What values make sense is the worker's to say.
Uint32 = Annotated[int, Field(ge=0, le=2**32 - 1)]
Int32 = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Float = Annotated[float, Field(ge=-1e9, le=1e9, allow_inf_nan=False)]
TokenIdKey = Annotated[str, Field(pattern=r"^[0-9]{1,10}$")]


def _boolean(value: object) -> object:
    # else 0 would pass for False, to which it is equal
    if not isinstance(value, bool):
        raise PydanticCustomError("bool_type", "Input should be a valid boolean")
    return value


# What may be said where there is nothing to choose.
OnlyFalse = Annotated[Literal[False], BeforeValidator(_boolean)]
OnlyTrue = Annotated[Literal[True], BeforeValidator(_boolean)]
OnlyZero = Annotated[int, Field(ge=0, le=0)]
OnlyOne = Annotated[int, Field(ge=1, le=1)]

# Lists that are given up at their first bad element. Pydantic would otherwise collect an error for each, which for a
# body of a few megabytes takes gigabytes and stops the event loop for a minute.
Element = TypeVar("Element")
Items = Annotated[list[Element], Field(fail_fast=True)]
SomeItems = Annotated[list[Element], Field(fail_fast=True, min_length=1)]
Nothing = Annotated[list[Any], Field(max_length=0)]

# Far above what any model here has; each field beyond those it has is an error of its own.
MAX_FIELDS = 64
# The contract's; a worker may be set to fewer.
MAX_LOGIT_BIASES = 1024
_MAX_SHOWN_PATH = 128

Model = TypeVar("Model", bound="RequestModel")


class RequestModel(BaseModel):
    """A body, or a part of one, in which every field is known."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # Fields that are accepted only with values that ask for nothing.
    UNSUPPORTED: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _has_few_fields(cls, value: object) -> object:
        if isinstance(value, dict) and len(value) > MAX_FIELDS:
            raise PydanticCustomError("too_many_fields", f"more than {MAX_FIELDS} fields")
        return value


def _few_biases(value: object) -> object:
    if isinstance(value, dict) and len(value) > MAX_LOGIT_BIASES:
        raise PydanticCustomError("too_many_biases", f"more than {MAX_LOGIT_BIASES} entries")
    return value


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
    logit_bias: (
        Annotated[dict[TokenIdKey, Float], Field(fail_fast=True), BeforeValidator(_few_biases)]
        | None
    ) = Field(None, description=f"Token id to bias; at most {MAX_LOGIT_BIASES} entries.")
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


class TimeoutField(RequestModel):
    """For dialects that have no field of this name themselves: not Triton's, whose `timeout` is in microseconds."""

    timeout: Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)] | None = Field(
        None,
        description="Seconds until the generation has to end, as X-Request-Timeout; at most the server's own limit.",
    )

    def timeout_duration(self) -> duration_pb2.Duration | None:
        """In the contract's words."""
        return None if self.timeout is None else duration(self.timeout)


class StoppingFields(RequestModel):
    """When a generation ends, besides its length."""

    stop: str | Items[str] | None = Field(None, description="Texts that end a choice.")
    stop_token_ids: Items[Uint32] | None = Field(None, description="Token ids that end a choice.")
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
    details = error.errors(include_url=False, include_input=False)
    path, detail = max(((_path(body, detail), detail) for detail in details), key=_meant)
    path = path[:_MAX_SHOWN_PATH]
    field = re.split(r"[.\[]", path, maxsplit=1)[0]
    if detail["type"] == "extra_forbidden":
        return invalid_request(f"Unrecognized field: {path}.", path, "unknown_field")
    if field in model.UNSUPPORTED:
        return invalid_request(f"{field} is not supported with this value.", field, "unsupported")
    if detail["type"] == "missing":
        return invalid_request(f"{path} is required.", path)
    if detail["type"] == "too_many_fields":
        return invalid_request(f"{path or 'The request body'}: {detail['msg']}.", path or None)
    if detail["type"] == "union_tag_invalid":  # pydantic's words hold all of what was sent
        name, known = detail["ctx"]["discriminator"].strip("'"), detail["ctx"]["expected_tags"]
        return invalid_request(f"{path}.{name}: must be one of {known}.", f"{path}.{name}")
    if detail["type"] in ("too_short", "string_too_short"):
        return invalid_request(f"{path}: must not be empty.", path)
    return invalid_request(f"{path}: {detail['msg']}.", path)


def _meant(entry: tuple[str, ErrorDetails]) -> tuple[int, bool]:
    """How far a member of a union got: into the value, and past its type."""
    path, detail = entry
    return path.count(".") + path.count("["), not detail["type"].endswith("_type")


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
