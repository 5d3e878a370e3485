"""The ring alone: numbers, joining, bounds."""

from __future__ import annotations

import random

import pytest

from inference_worker.errors import StreamGone
from inference_worker.replay import MESSAGE_OVERHEAD, Replay
from protos.sluice.v1 import generation_pb2 as pb
from tests.worker.stream_record import StreamRecord


def delta(text: str, choice: int = 0, **fields: object) -> pb.GenerateResponse:
    piece = pb.Delta(choice_index=choice, text=text, token_count=1)
    piece.MergeFrom(pb.Delta(**fields))  # type: ignore[arg-type]
    return pb.GenerateResponse(delta=piece)


def heartbeat() -> pb.GenerateResponse:
    return pb.GenerateResponse(heartbeat=pb.Heartbeat())


def rest(replay: Replay, number: int = 0) -> list[pb.GenerateResponse]:
    messages = []
    while (message := replay.read(number)) is not None:
        messages.append(message)
        number += 1
    return messages


def test_what_nobody_has_read_is_joined_and_what_was_read_stays() -> None:
    replay = Replay(100, 10_000)
    replay.append(pb.GenerateResponse(started=pb.Started(request_id="r")))
    replay.append(delta("a", token_ids=[1]))
    first = rest(replay)
    assert [message.sequence_number for message in first] == [0, 1]
    for text, token_id in (("b", 2), ("c", 3)):
        replay.append(delta(text, token_ids=[token_id]))
    replay.append(delta("x", choice=1))
    replay.append(delta("d", token_ids=[4]))
    replay.append(heartbeat())
    replay.append(heartbeat())
    second = rest(replay, 2)
    assert [message.sequence_number for message in second] == [2, 3, 4]
    assert second[0].delta == pb.Delta(text="bcd", token_count=3, token_ids=[2, 3, 4])
    assert second[1].delta == pb.Delta(choice_index=1, text="x", token_count=1)
    assert second[2].HasField("heartbeat")
    assert rest(replay) == first + second  # again, and the same


@pytest.mark.parametrize(
    ("earlier", "later", "is_joined"),
    [
        (delta("a"), delta("", reasoning="b"), False),
        (delta("", reasoning="a"), delta("b"), True),
        (delta("a", tool_calls=[pb.ToolCallDelta(arguments="{")]), delta("b"), False),
        (delta("a"), delta("", tool_calls=[pb.ToolCallDelta(arguments="{")]), True),
        (delta("a", is_prompt=True), delta("b"), False),
        (delta("a" * 16_384), delta("b"), False),
    ],
)
def test_only_what_says_the_same_is_joined(
    earlier: pb.GenerateResponse, later: pb.GenerateResponse, is_joined: bool
) -> None:
    replay = Replay(100, 100_000)
    replay.append(earlier)
    replay.append(later)
    assert replay.end == (1 if is_joined else 2)


def test_a_footer_is_never_overtaken() -> None:
    replay = Replay(100, 10_000)
    replay.append(delta("a"))
    replay.append(pb.GenerateResponse(finished=pb.Finished(choice_index=0)))
    replay.append(delta("b", choice=1))
    kinds = [message.WhichOneof("event") for message in rest(replay)]
    assert kinds == ["delta", "finished", "delta"]


def test_the_oldest_go_first() -> None:
    replay = Replay(3, 10_000)
    for index in range(5):
        assert replay.is_full == (index >= 3)
        if replay.is_full:
            assert replay.drop_oldest()
        replay.append(pb.GenerateResponse(finished=pb.Finished(choice_index=index)))
    assert (replay.first, replay.end) == (2, 5)
    assert [message.finished.choice_index for message in rest(replay, 2)] == [2, 3, 4]
    with pytest.raises(StreamGone, match="number 2"):
        replay.read(1)


def test_bytes_are_bounded_and_told() -> None:
    told = 0

    def note(size: int) -> None:
        nonlocal told
        told += size

    replay = Replay(1000, 4096, note)
    for index in range(200):
        if replay.is_full:
            assert replay.drop_oldest()
        replay.append(delta("x" * 100, choice=index))
        assert replay.num_bytes <= 4096 + 100 + MESSAGE_OVERHEAD + 10
        assert told == replay.num_bytes
    assert replay.first > 100
    kept = rest(replay, replay.first)
    assert replay.num_bytes == sum(message.ByteSize() + MESSAGE_OVERHEAD for message in kept)
    replay.append(delta("y" * 10_000))
    while replay.is_full and replay.drop_oldest():
        assert told == replay.num_bytes
    assert (replay.end - replay.first, told) == (0, 0)
    replay.clear()
    assert told == 0


@pytest.mark.parametrize("seed", range(20))
def test_whenever_it_is_read_the_joined_stream_is_the_same(seed: int) -> None:
    rng = random.Random(seed)
    replay, whole = Replay(10_000, 1_000_000), StreamRecord()
    read: list[pb.GenerateResponse] = []
    for index in range(300):
        message = delta(rng.choice(["", "a", "bc"]), rng.randrange(3), token_ids=[index])
        whole.add([message])
        replay.append(message)
        if rng.random() < 0.2:
            read += rest(replay, len(read))
    read += rest(replay, len(read))
    assert [message.sequence_number for message in read] == list(range(len(read)))
    assert StreamRecord().add(read).choices == whole.choices
    assert rest(replay) == read
