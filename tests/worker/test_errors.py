"""The table of errors: complete, bounded, and readable by programs."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from inference_worker import errors


def all_errors() -> list[errors.SluiceError]:
    return [
        errors.InvalidField("sampling.top_p", "must be above 0 to 1, got 2"),
        errors.ContextExceeded("prompt", "too long", tokens=10, limit=5),
        errors.UnsupportedField("constraint"),
        errors.ModelNotFound("x" * 10_000, "sluice-tiny"),
        errors.RequestExists("r1"),
        errors.QueueFull(128, 2.5),
        errors.QueueShareFull("k" * 64, 2.5),
        errors.TokenBudgetFull(1, 2, 3, "tokens", 1.0),
        errors.WouldMissDeadline(2.0, 1.0, 1.0),
        errors.KeyLimit("3 of its requests are inside already", 1.0),
        errors.DeadlinePassed(),
        errors.Draining(),
        errors.Interrupted(),
        errors.EngineLost(),
        errors.SlowReader(60),
        errors.StreamNotFound(),
        errors.StreamGone(7),
        errors.TakenOver(),
        errors.InternalError("r1"),
    ]


def subclasses(kind: type[errors.SluiceError]) -> set[type[errors.SluiceError]]:
    found = {kind}
    for child in kind.__subclasses__():
        found |= subclasses(child)
    return found


def test_every_error_is_here_and_in_the_table() -> None:
    assert {type(error) for error in all_errors()} == subclasses(errors.SluiceError) - {
        errors.SluiceError
    }


@pytest.mark.parametrize("error", all_errors(), ids=lambda error: type(error).__name__)
def test_one_that_is_kept_says_the_same_and_holds_on_to_nothing(error: errors.SluiceError) -> None:
    with pytest.raises(errors.SluiceError) as raised:
        raise error from ValueError()
    kept = raised.value.alike()
    assert (type(kept), errors.status_of(kept)) == (type(error), errors.status_of(error))
    assert (kept.__traceback__, kept.__cause__, kept.__context__) == (None, None, None)


@pytest.mark.parametrize("error", all_errors(), ids=lambda error: type(error).__name__)
def test_the_status_carries_its_details(error: errors.SluiceError) -> None:
    status = errors.status_of(error)
    ((key, value),) = status.trailing_metadata()
    assert key == "grpc-status-details-bin"
    assert len(value) < 4096  # headers are limited to 8 KiB
    parsed = status_pb2.Status.FromString(value)
    assert parsed.code == status.code.value[0]
    assert parsed.message == status.message
    info = error_details_pb2.ErrorInfo()
    assert parsed.details[0].Unpack(info)
    assert (info.domain, info.reason) == ("sluice", status.reason)
    retry = error_details_pb2.RetryInfo()
    has_retry = any(detail.Unpack(retry) for detail in parsed.details)
    helps = status.code in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)
    assert has_retry == helps
