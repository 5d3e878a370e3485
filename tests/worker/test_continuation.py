"""A stream cut anywhere and continued elsewhere is the uncut one, with real models, through the contract alone."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from inference_worker.default_model import CHECKPOINT
from inference_worker.engine.request import SamplingParams
from inference_worker.model.loader import load_model, make_runner
from inference_worker.served_model import ModelInfo, ServedModel
from inference_worker.settings import WorkerSettings
from inference_worker.tokenizer import Tokenizer
from protos.sluice.v1 import generation_pb2 as pb
from tests.worker.model.tiny_models import build_from
from tests.worker.served_worker import (
    Refusal,
    ServedWorker,
    generate_request,
    read_until,
    serve,
    serve_script,
)
from tests.worker.stream_record import ChoiceRecord, StreamRecord

CONTEXT = 192
# The second worker's steps are cut differently, and its memory is so small that sequences are preempted.
ROOMY: dict[str, Any] = {"max_running": 16, "max_batch_tokens": 256}
TIGHT: dict[str, Any] = {"max_running": 6, "max_batch_tokens": 11, "block_size": 8}
TIGHT_TOKENS = 64


def tiny_llama() -> Any:
    """A random model with the embedded one's tokenizer: it says anything, broken characters too."""
    return build_from(
        LlamaConfig(
            vocab_size=Tokenizer.load(str(CHECKPOINT)).vocabulary_size,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def serve_random(model: Any, **options: Any) -> tuple[ServedModel, WorkerSettings]:
    worker_settings = WorkerSettings(port=0, **options)
    info = ModelInfo(
        name="random",
        context_length=CONTEXT,
        vocabulary_size=model.config.vocab_size,
        architecture="LlamaForCausalLM",
        dtype="float32",
        device="cpu",
        parameter_count=0,
        eos_token_ids=frozenset(),
        default_sampling=SamplingParams(),
        kv_cache="",
    )
    runner = make_runner(model, CONTEXT, worker_settings)
    return ServedModel(info, Tokenizer.load(str(CHECKPOINT)), runner), worker_settings


def serve_embedded(**options: Any) -> tuple[ServedModel, WorkerSettings]:
    worker_settings = WorkerSettings(port=0, context_length=CONTEXT, **options)
    return load_model(worker_settings), worker_settings


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


MODELS = ["random", "embedded"]


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


PROMPTS = ["Count to 10", "Say hello.", "What is streaming?", "Repeat: é 漢字 👩‍💻", "a"]
samplings = st.one_of(
    st.just(pb.Sampling(temperature=0)),
    st.builds(
        pb.Sampling,
        temperature=st.sampled_from([0.5, 1.0, 1.7]),
        top_k=st.sampled_from([None, 5, 40]),
        top_p=st.sampled_from([None, 0.9]),
        min_p=st.sampled_from([None, 0.02]),
        logit_bias=st.sampled_from([None, {70: 3.0, 75: -100.0}]),
        repetition_penalty=st.sampled_from([None, 1.3]),
        presence_penalty=st.sampled_from([None, 0.7]),
        frequency_penalty=st.sampled_from([None, 0.4]),
        seed=st.sampled_from([None, 0, -7, 2**60]),
    ),
)
outputs = st.sampled_from(
    [
        pb.Output(token_ids=True),
        pb.Output(token_ids=True, logprobs=2),
        pb.Output(token_ids=True, echo=True),
        pb.Output(token_ids=True, echo=True, logprobs=1, prompt_logprobs=True),
        # is_continuable alone has to do
        pb.Output(),
        pb.Output(logprobs=0),
        pb.Output(echo=True),
    ]
)
# Of which the second can become whole before max_tokens.
constraints = st.sampled_from(
    [
        None,
        pb.Constraint(regex="[a-h0-9 ]{2,4}|(ab|é|漢)*[0-9]{9}"),
        pb.Constraint(choice=pb.ChoiceList(texts=["yes", "no", "no way", "👩‍💻 and é"])),
        pb.Constraint(json_schema='{"type": "array", "items": {"enum": [1, "é", null]}}'),
    ]
)
requests = st.builds(
    pb.GenerateRequest,
    constraint=st.none() | constraints,
    prompt=st.sampled_from(PROMPTS).map(lambda text: pb.Prompt(text=text)),
    sampling=samplings,
    stopping=st.integers(1, 20).map(
        lambda number: pb.Stopping(max_tokens=number, ignore_eos=number % 3 == 0)
    ),
    output=outputs,
    n=st.integers(1, 3),
    is_continuable=st.just(True),
)


@dataclass(frozen=True)
class Stops:
    """Where in the output to take stop sequences and tokens from: what comes, and what almost comes."""

    # Numbers of which the remainders count: hypothesis must not see that the output varies with the drawn seeds.
    choice: int
    begin: int
    length: int
    kind: int
    token: int

    def add_to(self, request: pb.GenerateRequest, uncut: StreamRecord) -> None:
        assert uncut.started is not None
        request.sampling.CopyFrom(uncut.started.sampling)  # the seed too
        said = [choice for choice in uncut.choices.values() if choice.text]
        if not said:
            return
        choice = said[self.choice % len(said)]
        begin = self.begin % len(choice.text)
        stop = choice.text[begin : begin + self.length]
        kinds: tuple[list[str], ...] = ([], [stop], [stop + "\0"], [stop + "\0", stop[:3]])
        request.stopping.stop_sequences.extend(kinds[self.kind])
        # without one of its tokens a constraint may have nothing left to say
        if choice.token_ids and self.token and not request.HasField("constraint"):
            request.stopping.stop_token_ids.append(
                choice.token_ids[self.token % len(choice.token_ids)]
            )


positions = st.integers(0, 10_000)
stops = st.builds(
    Stops,
    choice=positions,
    begin=positions,
    length=st.integers(1, 12),
    kind=st.integers(0, 3),
    token=st.one_of(st.just(0), positions),
)


def assert_same(joined: StreamRecord, uncut: StreamRecord) -> None:
    assert joined.choices.keys() == uncut.choices.keys()
    for index, expected in uncut.choices.items():
        assert_same_choice(joined.choices[index], expected)
    assert joined.usage is not None
    assert uncut.usage is not None
    assert joined.usage.prompt_tokens == uncut.usage.prompt_tokens
    assert joined.usage.completion_tokens == uncut.usage.completion_tokens


def assert_same_choice(joined: ChoiceRecord, uncut: ChoiceRecord) -> None:
    assert joined.text == uncut.text
    assert (joined.reasoning, joined.calls) == (uncut.reasoning, uncut.calls)
    assert joined.token_ids == uncut.token_ids
    assert joined.num_tokens == uncut.num_tokens
    assert (joined.echo, joined.echoed_tokens) == (uncut.echo, uncut.echoed_tokens)
    for ours, theirs in (
        (joined.logprobs, uncut.logprobs),
        (joined.echo_logprobs, uncut.echo_logprobs),
    ):
        assert [x.token.token_id for x in ours] == [x.token.token_id for x in theirs]
        got = [candidate.logprob for x in ours for candidate in (x.token, *x.top)]
        expected = [candidate.logprob for x in theirs for candidate in (x.token, *x.top)]
        assert got == pytest.approx(expected, abs=2e-3)
    assert joined.finished is not None
    assert uncut.finished is not None
    for name in (
        *("finish_reason", "completion_tokens"),
        *("stop_sequence", "stop_token_id", "withheld_token_ids"),
    ):
        assert getattr(joined.finished, name) == getattr(uncut.finished, name)


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
