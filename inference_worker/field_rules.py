"""Rules that fields of the contract obey, each named by its path when it does not."""

from __future__ import annotations

import math
import re
from typing import Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from inference_worker.errors import InvalidField, UnsupportedField

REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# What google/protobuf/duration.proto allows: some 10,000 years, and less than a second.
_MAX_DURATION_SECONDS: Final = 315_576_000_000
_MAX_DURATION_NANOS: Final = 999_999_999


def refuse_unknown_fields(message: Message, path: str) -> None:
    """Refuse fields of a later contract: ignoring them would give the caller something it did not ask for.

    Raises: UnsupportedField, naming the field's number.
    """
    unknown = UnknownFieldSet(message)
    if len(unknown):
        number = unknown[0].field_number
        raise UnsupportedField(f"{path}.{number}" if path else str(number))


def read_duration(path: str, message: Duration) -> float:
    """Seconds, above 0. Raises: InvalidField, also for what the type itself does not allow; UnsupportedField."""
    refuse_unknown_fields(message, path)
    seconds, nanos = message.seconds, message.nanos
    if abs(seconds) > _MAX_DURATION_SECONDS:
        limit = _MAX_DURATION_SECONDS
        raise InvalidField(path, f"must be at most {limit} seconds, got {seconds}")
    if abs(nanos) > _MAX_DURATION_NANOS or seconds * nanos < 0:
        raise InvalidField(
            path, f"nanos must be below a second, with the sign of seconds, got {nanos}"
        )
    total = seconds + nanos / 1e9
    if total <= 0:
        raise InvalidField(path, f"must be above 0 seconds, got {total:g}")
    return total


def check_range(
    path: str, value: float, low: float, high: float, *, above_low: bool = False
) -> None:
    """Check low <= value <= high, or low < value with `above_low`. Raises: InvalidField, also for NaN."""
    if math.isnan(value) or not low <= value <= high or (above_low and value == low):
        begin = f"above {low:g}" if above_low else f"{low:g}"
        raise InvalidField(path, f"must be {begin} to {high:g}, got {value:g}")


def check_at_least(path: str, value: int, low: int) -> None:
    """Check value >= low. Raises: InvalidField."""
    if value < low:
        raise InvalidField(path, f"must be {low} or more, got {value}")


def check_count(path: str, count: int, limit: int, noun: str) -> None:
    """Check that a list is not too long. Raises: InvalidField."""
    if count > limit:
        raise InvalidField(path, f"at most {limit} {noun}, got {count}")
