"""--deterministic through the contract, in bfloat16: a seeded request gives the same tokens and the same probabilities,
to the last bit, whatever else the worker does.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from protos.sluice.v1 import generation_pb2 as pb
from tests.worker.served_models import ROOMY, TIGHT, serve_random, tiny_llama
from tests.worker.served_worker import ServedWorker, generate_request, serve
from tests.worker.stream_record import StreamRecord

REQUEST = generate_request(
    ids=[7 + i * i % 1000 for i in range(40)],
    max_tokens=24,
    n=2,
    sampling=pb.Sampling(temperature=1.2, top_p=0.95, seed=11, repetition_penalty=1.1),
    output=pb.Output(token_ids=True, logprobs=3),
)
OTHERS = [
    generate_request(
        ids=list(range(50 + 9 * i, 60 + 19 * i)),
        max_tokens=20 + i,
        sampling=pb.Sampling(temperature=0.9, seed=i),
    )
    for i in range(4)
]


async def serve_steady(
    options: dict[str, int], num_tokens: int | None
) -> AsyncIterator[ServedWorker]:
    model = tiny_llama().bfloat16()
    served, settings = serve_random(model, deterministic=True, native=False, **options)
    if num_tokens is not None:
        served.runner.num_blocks = num_tokens // served.runner.block_size
    async with serve(served, settings) as worker:
        yield worker


@pytest.fixture
async def roomy() -> AsyncIterator[ServedWorker]:
    async for worker in serve_steady(ROOMY, None):
        yield worker


@pytest.fixture
async def tight() -> AsyncIterator[ServedWorker]:
    """Its memory is that of one of the choices and a little more, and its steps are cut differently."""
    async for worker in serve_steady(TIGHT, 72):
        yield worker


async def read(worker: ServedWorker, request: pb.GenerateRequest) -> list[pb.GenerateResponse]:
    return [message async for message in worker.stub.Generate(request)]


def outcome(record: StreamRecord) -> dict[int, tuple[str, list[int], list[bytes]]]:
    """Text, tokens and what is told of their probabilities, by choice."""
    return {
        index: (
            choice.text,
            choice.token_ids,
            [logprob.SerializeToString(deterministic=True) for logprob in choice.logprobs],
        )
        for index, choice in record.choices.items()
    }


async def test_alone_in_a_batch_preempted_cached_and_continued(
    roomy: ServedWorker, tight: ServedWorker
) -> None:
    messages = await read(roomy, REQUEST)
    alone = outcome(StreamRecord().add(messages))
    assert [len(token_ids) for _, token_ids, _ in alone.values()] == [24, 24]

    again = StreamRecord().add(await read(roomy, REQUEST))
    assert again.usage is not None
    assert again.usage.cached_tokens > 0
    assert outcome(again) == alone

    batch = await asyncio.gather(*[read(roomy, each) for each in (*OTHERS, REQUEST)])
    assert outcome(StreamRecord().add(batch[-1])) == alone

    assert outcome(StreamRecord().add(await read(tight, REQUEST))) == alone
    assert (await tight.load()).preemptions > 0  # for the two choices do not fit together
    crowd = await asyncio.gather(*[read(tight, each) for each in (REQUEST, *OTHERS)])
    assert outcome(StreamRecord().add(crowd[0])) == alone

    for cut in (2, len(messages) // 2, len(messages) - 2):
        record = StreamRecord().add(messages[:cut])
        record.add(await read(tight, record.going_on(REQUEST)))
        assert outcome(record) == alone
