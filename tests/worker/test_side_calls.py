"""Uses of the tokenizer: bounded together, and for each key."""

from __future__ import annotations

from contextlib import ExitStack

import grpc
import pytest

from inference_worker.caller import Caller
from inference_worker.errors import KeyLimit, QueueFull
from inference_worker.side_calls import SideCalls
from protos.sluice.v1 import generation_pb2 as pb
from tests.worker.served_worker import serve_script


def test_one_key_leaves_room_for_the_others() -> None:
    calls = SideCalls(max_waiting=5, retry_after=lambda: 2.0)
    with ExitStack() as under_way:
        for _ in range(3):
            under_way.enter_context(calls.enter(Caller("alice")))
        with pytest.raises(KeyLimit, match="3 of its calls"):
            under_way.enter_context(calls.enter(Caller("alice")))
        under_way.enter_context(calls.enter(Caller("bob", max_concurrent=1)))
        with pytest.raises(KeyLimit, match="1 of its calls"):
            under_way.enter_context(calls.enter(Caller("bob", max_concurrent=1)))
        for _ in range(2):
            under_way.enter_context(calls.enter())
        with pytest.raises(QueueFull):
            under_way.enter_context(calls.enter(Caller("carol")))
    for _ in range(10):  # all have left
        with calls.enter(Caller("bob", max_concurrent=1)):
            pass


async def test_a_caller_that_cannot_be_is_named() -> None:
    async with serve_script() as worker:
        caller = pb.Caller(key_id="alice", max_concurrent=0)
        for call in (
            worker.stub.Tokenize(pb.TokenizeRequest(prompt=pb.Prompt(text="a"), caller=caller)),
            worker.stub.Detokenize(pb.DetokenizeRequest(token_ids=[5], caller=caller)),
        ):
            with pytest.raises(grpc.aio.AioRpcError, match=r"caller\.max_concurrent") as refusal:
                await call
            assert refusal.value.code() == grpc.StatusCode.INVALID_ARGUMENT
