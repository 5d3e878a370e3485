"""For whom a request is: the key's name, its share of the worker, and the limits of its own."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from inference_worker.errors import InvalidField
from inference_worker.field_rules import check_at_least, check_range, refuse_unknown_fields
from protos.sluice.v1 import generation_pb2 as pb

# The contract's, as all that follows.
_KEY_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,64}")
# Counters of the fair queue are tokens divided by weights: far smaller ones would swallow the tokens of others.
_MIN_WEIGHT: Final = 0.001
_MAX_WEIGHT: Final = 1000
_MAX_PRIORITY: Final = 100


@dataclass(frozen=True, slots=True)
class Caller:
    """All requests of one `key_id` share one weight and the limits; the latest request's hold."""

    key_id: str = ""  # empty: nobody in particular
    weight: float = 1.0  # share of the worker while others wait too
    max_concurrent: int | None = None  # requests inside
    tokens_per_minute: int | None = None  # of prompts and completions


ANYBODY: Final = Caller()


def read_caller(
    message: pb.GenerateRequest | pb.TokenizeRequest | pb.DetokenizeRequest,
) -> Caller:
    """The request's caller. Raises: InvalidField, UnsupportedField."""
    if not message.HasField("caller"):
        return ANYBODY
    caller = message.caller
    refuse_unknown_fields(caller, "caller")
    check_key_id("caller.key_id", caller.key_id)
    weight = caller.weight if caller.HasField("weight") else ANYBODY.weight
    check_range("caller.weight", weight, _MIN_WEIGHT, _MAX_WEIGHT)
    max_concurrent = tokens_per_minute = None
    if caller.HasField("max_concurrent"):
        max_concurrent = caller.max_concurrent
        check_at_least("caller.max_concurrent", max_concurrent, 1)
    if caller.HasField("tokens_per_minute"):
        tokens_per_minute = caller.tokens_per_minute
        check_at_least("caller.tokens_per_minute", tokens_per_minute, 1)
    return Caller(caller.key_id, weight, max_concurrent, tokens_per_minute)


def read_priority(message: pb.GenerateRequest) -> int:
    """Order among the key's own waiting requests, higher first. Raises: InvalidField."""
    check_range("priority", message.priority, -_MAX_PRIORITY, _MAX_PRIORITY)
    return message.priority


def check_key_id(path: str, key_id: str) -> None:
    """Check the shape of a key's name. Raises: InvalidField."""
    if not _KEY_ID.fullmatch(key_id):
        raise InvalidField(path, "must be 1 to 64 characters of [A-Za-z0-9._:-]")
