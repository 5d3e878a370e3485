"""A stream cut anywhere and continued elsewhere is the uncut one, with real models, through the contract alone."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from typing import Any

import grpc
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from protos.sluice.v1 import generation_pb2 as pb
from tests.worker.drawn_requests import PROMPTS, Stops, positions, requests, stops
from tests.worker.same_streams import assert_same
from tests.worker.served_models import (
    CONTEXT,
    MODELS,
    ROOMY,
    TIGHT,
    serve_embedded,
    serve_random,
    tiny_llama,
)
from tests.worker.served_worker import (
    Refusal,
    ServedWorker,
    generate_request,
    read_until,
    serve,
    serve_script,
)
from tests.worker.stream_record import StreamRecord

TIGHT_TOKENS = 64


class Pair:
    """Two workers with one model, and the loop they live on."""

    def __init__(self, loop: asyncio.Runner, first: ServedWorker, second: ServedWorker) -> None:
        self._loop = loop
        self.first = first
        self.second = second

    def generate(self, request: pb.GenerateRequest) -> list[pb.GenerateResponse]:
        """The uncut stream, from the first worker."""
        return self._loop.run(_read(self.first, request))

    def load(self) -> pb.GetLoadResponse:
        """The second worker's."""
        return self._loop.run(self.second.load())

    def go_on(
        self, request: pb.GenerateRequest, among: Sequence[pb.GenerateRequest] = ()
    ) -> list[pb.GenerateResponse]:
        """The rest, from the second worker, among other requests."""
        return self._loop.run(_read_among(self.second, request, among))


async def _read(worker: ServedWorker, request: pb.GenerateRequest) -> list[pb.GenerateResponse]:
    return [message async for message in worker.stub.Generate(request)]


async def _read_among(
    worker: ServedWorker, request: pb.GenerateRequest, others: Sequence[pb.GenerateRequest]
) -> list[pb.GenerateResponse]:
    streams = await asyncio.gather(*[_read(worker, each) for each in (request, *others)])
    await worker.wait_idle()
    return streams[0]


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    yield from running_pair(request.param, TIGHT_TOKENS)


@pytest.fixture(scope="module", params=MODELS)
def roomy_pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """The second worker has memory for a few sequences of the whole context."""
    yield from running_pair(request.param, 3 * CONTEXT)


def running_pair(name: str, num_tokens: int) -> Iterator[Pair]:
    """`num_tokens` is the memory of the second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    if name == "random":
        model = tiny_llama()
        served = [serve_random(model, **options) for options in (ROOMY, TIGHT)]
    else:
        served = [serve_embedded(**options) for options in (ROOMY, TIGHT)]
    tight = served[1][0].runner
    tight.num_blocks = num_tokens // tight.block_size
    with asyncio.Runner() as loop:
        stack = AsyncExitStack()
        workers = [
            loop.run(_entered(stack, serve(model, worker_settings)))
            for model, worker_settings in served
        ]
        yield Pair(loop, *workers)
        loop.run(_closed(stack))
    torch.set_num_threads(threads)


async def _entered(stack: AsyncExitStack, context: Any) -> ServedWorker:
    worker: ServedWorker = await stack.enter_async_context(context)
    return worker


async def _closed(stack: AsyncExitStack) -> None:
    await stack.aclose()


# Three choices that alone need more memory than the second worker has.
CROWDED = pb.GenerateRequest(
    prompt=pb.Prompt(text=PROMPTS[3]),
    sampling=pb.Sampling(temperature=1, seed=1),
    stopping=pb.Stopping(max_tokens=20, ignore_eos=True),
    output=pb.Output(token_ids=True),
    n=3,
)


def test_a_cut_stream_that_goes_on_elsewhere_is_the_uncut_one(pair: Pair) -> None:
    @settings(max_examples=30, deadline=None)
    @example(request=CROWDED, stop=Stops(0, 0, 1, 0, 0), others=[CROWDED], cuts=[4])
    @given(
        request=requests,
        stop=stops,
        others=st.lists(requests, max_size=3),
        cuts=st.lists(positions, min_size=1, max_size=2),
    )
    def check(
        request: pb.GenerateRequest,
        stop: Stops,
        others: list[pb.GenerateRequest],
        cuts: list[int],
    ) -> None:
        stop.add_to(request, StreamRecord().add(pair.generate(request)))
        messages = pair.generate(request)
        uncut = StreamRecord().add(messages)
        for cut in cuts:
            joined = StreamRecord().add(messages[: 1 + cut % (len(messages) - 1)])
            rest = pair.go_on(joined.going_on(request), others)
            assert [message.sequence_number for message in rest] == list(range(len(rest)))
            assert_same(joined.add(rest), uncut)

    check()
    assert pair.load().preemptions  # the second worker did run short of memory


def test_any_prefix_of_its_own_tokens_goes_on_as_the_whole(pair: Pair) -> None:
    """Not only those that a stream was ever cut to: the caller has any number of tokens, and says so of no text."""

    @settings(max_examples=12, deadline=None)
    @given(
        request=requests,
        stop=stops,
        others=st.lists(requests, max_size=2),
        counts=st.lists(positions, min_size=3, max_size=3),
    )
    def check(
        request: pb.GenerateRequest,
        stop: Stops,
        others: list[pb.GenerateRequest],
        counts: list[int],
    ) -> None:
        stop.add_to(request, StreamRecord().add(pair.generate(request)))
        messages = pair.generate(request)
        uncut = StreamRecord().add(messages)
        begun = StreamRecord().add(messages[:1])
        for index, choice in uncut.choices.items():
            has = begun.choice(index)
            has.token_ids = choice.token_ids[: counts[index] % (len(choice.token_ids) + 1)]
            has.echoed_tokens = choice.echoed_tokens
        rest = StreamRecord().add(pair.go_on(begun.going_on(request), others))
        assert rest.usage is not None
        assert uncut.usage is not None
        assert rest.usage.completion_tokens == uncut.usage.completion_tokens
        for index, expected in uncut.choices.items():
            got, had = rest.choices[index], begun.choices[index].token_ids
            assert had + got.token_ids == expected.token_ids
            assert (got.text, got.echo) == (expected.text, "")
            assert got.finished is not None
            assert expected.finished is not None
            assert got.finished.finish_reason == expected.finished.finish_reason
            assert got.finished.completion_tokens == expected.finished.completion_tokens

    check()


WEATHER = pb.Tool(
    name="get_weather",
    parameters='{"properties": {"city": {"type": "string"}}, "required": ["city"]}',
)
CHATS = [
    pb.Chat(
        messages=[pb.ChatMessage(role="user", content=content)],
        tools=[WEATHER],
        tool_choice=pb.ToolChoice(mode=mode),
    )
    for content in ("What is the weather in Paris?", "Say hello.")
    for mode in (pb.TOOL_CHOICE_MODE_AUTO, pb.TOOL_CHOICE_MODE_REQUIRED)
]


@pytest.mark.parametrize("number", range(len(CHATS)))
def test_a_cut_chat_with_calls_of_functions_is_the_uncut_one(roomy_pair: Pair, number: int) -> None:
    pair = roomy_pair
    request = pb.GenerateRequest(
        prompt=pb.Prompt(chat=CHATS[number]),
        sampling=pb.Sampling(temperature=0.7, seed=5),
        stopping=pb.Stopping(max_tokens=40),
        n=2,
        is_continuable=True,
    )
    messages = pair.generate(request)
    assert messages[0].started.is_continuable
    uncut = StreamRecord().add(messages)
    if CHATS[number].tool_choice.mode == pb.TOOL_CHOICE_MODE_REQUIRED:
        assert all(choice.calls for choice in uncut.choices.values())
    for cut in range(1, len(messages)):
        joined = StreamRecord().add(messages[:cut])
        assert_same(joined.add(pair.go_on(joined.going_on(request))), uncut)


def cut_after(messages: list[pb.GenerateResponse], kind: str) -> list[pb.GenerateResponse]:
    """Messages up to the first of a kind."""
    kinds = [str(message.WhichOneof("event")) for message in messages]
    return messages[: kinds.index(kind) + 1]


def test_choices_that_are_over_are_not_sent_again(pair: Pair) -> None:
    request = pb.GenerateRequest(
        prompt=pb.Prompt(text="Count to 10"),
        sampling=pb.Sampling(temperature=1.5, seed=1),
        stopping=pb.Stopping(max_tokens=8, ignore_eos=True),
        output=pb.Output(token_ids=True),
        n=3,
    )
    messages = pair.generate(request)
    before = cut_after(messages, "finished")
    joined = StreamRecord().add(before)
    rest = pair.go_on(joined.going_on(request))
    over = before[-1].finished.choice_index
    assert all(over != message.delta.choice_index for message in rest if message.HasField("delta"))
    assert_same(joined.add(rest), StreamRecord().add(messages))


def test_a_choice_that_lacks_its_footer_alone_gets_it(pair: Pair) -> None:
    request = pb.GenerateRequest(
        prompt=pb.Prompt(text="Count to 10"),
        sampling=pb.Sampling(temperature=0),
        stopping=pb.Stopping(max_tokens=6, ignore_eos=True),
        output=pb.Output(token_ids=True),
        n=2,
    )
    messages = pair.generate(request)
    items = [message for message in messages if not message.HasField("finished")]
    joined = StreamRecord().add(items)
    steps = pair.load().steps
    rest = pair.go_on(joined.going_on(request))
    assert [message.WhichOneof("event") for message in rest] == ["started", "finished", "finished"]
    assert pair.load().steps == steps  # the model had nothing to do
    assert_same(joined.add(rest), StreamRecord().add(messages))


def test_what_was_computed_before_comes_from_the_prefix_cache(pair: Pair) -> None:
    request = pb.GenerateRequest(
        prompt=pb.Prompt(text="What is streaming?"),
        sampling=pb.Sampling(temperature=0),
        stopping=pb.Stopping(max_tokens=40, ignore_eos=True),
        output=pb.Output(token_ids=True),
    )
    uncut = StreamRecord().add(pair.generate(request))
    # whatever the messages were, a caller may go on after any token; this one says that it has no text yet
    begun = StreamRecord().add(pair.generate(request)[:1])
    begun.choice(0).token_ids = uncut.choices[0].token_ids[:20]
    for _ in range(2):
        rest = StreamRecord().add(pair.go_on(begun.going_on(request)))
        assert rest.choices[0].token_ids == uncut.choices[0].token_ids[20:]
        assert rest.choices[0].text == uncut.choices[0].text
    assert rest.usage is not None
    assert 0 < rest.usage.cached_tokens <= rest.usage.prompt_tokens


async def test_a_shutdown_gives_out_nothing_that_a_continuable_stream_holds_back() -> None:
    text = "The quick brown fox jumps over the lazy dog. "
    held = text * 20 + "!"  # which never comes, and whose beginning always does
    stopping = pb.Stopping(stop_sequences=[held], ignore_eos=True)
    # what is held back takes four seconds to come, of which a few steps are waited for
    async with serve_script(text=text, step_milliseconds=20) as worker:
        requests = [
            generate_request(stopping=stopping, max_tokens=4000, is_continuable=is_continuable)
            for is_continuable in (True, False)
        ]
        calls = [worker.stub.Generate(request) for request in requests]
        for call, is_continuable in zip(calls, (True, False), strict=True):
            assert (await read_until(call, "started"))[-1].started.is_continuable == is_continuable
        while (await worker.load()).generated_tokens < 10:
            await asyncio.sleep(0.01)
        worker.worker.stop_admitting()
        await worker.worker.drain(0)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await calls[0].read()
        refusal = Refusal(error.value)
        assert (refusal.code, refusal.info.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTDOWN")
        ended = StreamRecord().add(await read_until(calls[1], "finished")).choices[0]
        assert ended.text
        assert ended.finished is not None
        assert ended.finished.finish_reason == pb.FINISH_REASON_SHUTDOWN
