"""How long a request may take: what its client asks for, in a header or a field, and never more than the setting."""

import math
import re
from collections.abc import Iterable

from google.protobuf import duration_pb2
from starlette.requests import Request

from edge.errors import invalid_request
from protos.sluice.v1 import generation_pb2 as pb

HEADER = "x-request-timeout"
_NUMBER = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")


def duration(seconds: float) -> duration_pb2.Duration:
    """Seconds in the contract's words."""
    made = duration_pb2.Duration()
    made.FromNanoseconds(max(1, round(seconds * 1e9)))
    return made


def limit_by_header(request: Request, messages: Iterable[pb.GenerateRequest]) -> None:
    """Gives the messages the timeout of the request's header, where it is shorter. Raises a 400 for a bad one."""
    text = request.headers.get(HEADER)
    if text is None:
        return
    if not _NUMBER.fullmatch(text.strip()) or not float(text) > 0:
        raise invalid_request("X-Request-Timeout: must be a number of seconds above 0.", HEADER)
    for message in messages:
        message.timeout.CopyFrom(duration(min(float(text), seconds_of(message))))


def seconds_of(message: pb.GenerateRequest) -> float:
    """How long it may take; for ever if it does not say."""
    if not message.HasField("timeout"):
        return math.inf
    return message.timeout.seconds + message.timeout.nanos / 1e9
