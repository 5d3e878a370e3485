"""The registry: ids, their owners and what Abort finds."""

from __future__ import annotations

import pytest

from inference_worker import registry as registry_module
from inference_worker.engine.event import FinishReason
from inference_worker.errors import RequestExists
from inference_worker.registry import Registry
from protos.sluice.v1 import generation_pb2 as pb


class Inside:
    """A request that remembers being told to end."""

    def __init__(self) -> None:
        self.reasons: list[FinishReason] = []

    def end(self, reason: FinishReason) -> bool:
        self.reasons.append(reason)
        return len(self.reasons) == 1


async def test_an_id_is_inside_then_ended_then_free_again() -> None:
    registry = Registry()
    assert registry.abort("a") == pb.ABORT_OUTCOME_UNKNOWN
    request = Inside()
    with registry.hold("a", request):
        with pytest.raises(RequestExists):
            registry.check_free("a")
        assert registry.abort("a") == pb.ABORT_OUTCOME_ABORTED
        assert request.reasons == [FinishReason.CANCELLED]
        assert registry.abort("a") == pb.ABORT_OUTCOME_ALREADY_FINISHED
    registry.check_free("a")
    assert registry.abort("a") == pb.ABORT_OUTCOME_ALREADY_FINISHED
    with registry.hold("a", Inside()):
        assert registry.abort("a") == pb.ABORT_OUTCOME_ABORTED


async def test_a_bounded_number_of_ended_ids_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "_MAX_ENDED", 3)
    registry = Registry()
    for name in "abcd":
        with registry.hold(name, Inside()):
            pass
    assert registry.abort("a") == pb.ABORT_OUTCOME_UNKNOWN
    assert registry.abort("b") == pb.ABORT_OUTCOME_ALREADY_FINISHED


async def test_a_key_ends_no_request_but_its_own() -> None:
    registry = Registry()
    inside = Inside()
    with registry.hold("a", inside, "mine"):
        for key_id in ("theirs", ""):
            assert registry.abort("a", key_id) == pb.ABORT_OUTCOME_UNKNOWN
        assert not inside.reasons
        assert registry.abort("a", "mine") == pb.ABORT_OUTCOME_ABORTED
    assert registry.abort("a", "theirs") == pb.ABORT_OUTCOME_UNKNOWN
    assert registry.abort("a", "mine") == pb.ABORT_OUTCOME_ALREADY_FINISHED
    assert registry.abort("b", "mine") == pb.ABORT_OUTCOME_UNKNOWN


async def test_waits_until_the_last_has_left() -> None:
    registry = Registry()
    assert await registry.wait_empty(0.01)
    with registry.hold("a", Inside()):
        assert not await registry.wait_empty(0.01)
    assert await registry.wait_empty(0.01)
