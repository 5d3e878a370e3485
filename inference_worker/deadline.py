"""When a request ends in any case."""

from __future__ import annotations

from typing import Final

from inference_worker.field_rules import read_duration
from protos.sluice.v1 import generation_pb2 as pb

# How long before its call a request ends, so that its last messages arrive: a share of the time, and at most so much.
_CALL_MARGIN: Final = 0.1
_MAX_CALL_MARGIN_SECONDS: Final = 0.5
_LEAST_SECONDS: Final = 0.001


def read_timeout(message: pb.GenerateRequest) -> float | None:
    """Seconds from the request's arrival; None if it does not say. Raises: InvalidField, UnsupportedField."""
    return read_duration("timeout", message.timeout) if message.HasField("timeout") else None


def write_timeout(message: pb.GenerateRequest, seconds: float) -> None:
    """Set it to so many seconds. The contract has no timeout of 0: one that has passed becomes a millisecond."""
    message.timeout.FromNanoseconds(round(max(seconds, _LEAST_SECONDS) * 1e9))


def deadline_of(
    message: pb.GenerateRequest, call_deadline: float | None, arrived_at: float
) -> float | None:
    """The deadline, in time.monotonic's seconds: by the request's own timeout or a little before its call.

    Raises: InvalidField, UnsupportedField.
    """
    deadlines = []
    if (timeout := read_timeout(message)) is not None:
        deadlines.append(arrived_at + timeout)
    if call_deadline is not None:
        left = call_deadline - arrived_at
        deadlines.append(call_deadline - min(left * _CALL_MARGIN, _MAX_CALL_MARGIN_SECONDS))
    return min(deadlines, default=None)
