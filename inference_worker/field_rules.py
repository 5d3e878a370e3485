"""Rules that fields of the contract obey, each named by its path when it does not."""

from __future__ import annotations

import math
import re
from typing import Final

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from inference_worker.errors import InvalidField, UnsupportedField

REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def refuse_unknown_fields(message: Message, path: str) -> None:
    """Refuse fields of a later contract: ignoring them would give the caller something it did not ask for.

    Raises: UnsupportedField, naming the field's number.
    """
    unknown = UnknownFieldSet(message)
    if len(unknown):
        number = unknown[0].field_number
        raise UnsupportedField(f"{path}.{number}" if path else str(number))


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
