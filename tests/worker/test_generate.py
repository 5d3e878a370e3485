"""A stream from its header to its footers, over a real socket."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc.aio
import pytest

from inference_worker.service import Context, GenerationService
from protos.sluice.v1 import generation_pb2 as pb
from tests.patience import PATIENCE
from tests.worker.served_worker import (
    LONG_STREAMS,
    Call,
    Refusal,
    generate_request,
    kinds,
    read_rest,
    read_until,
    reasons,
    refusal_of,
    serve_script,
    stalled_call,
    texts,
)

TEXT = "One two three."


async def test_a_stream_is_a_header_items_and_a_footer() -> None:
    async with serve_script(text=TEXT, repeats=1) as worker:
        before = time.time()
        messages = await worker.generate(text="Go", request_id="r-1", max_tokens=100)
    assert [message.sequence_number for message in messages] == list(range(len(messages)))
    assert kinds(messages)[0] == "started"
    assert kinds(messages)[-1] == "finished"
    assert set(kinds(messages)[1:-1]) == {"delta"}
    assert texts(messages) == {0: TEXT}
    started, finished = messages[0].started, messages[-1].finished
    assert (started.request_id, started.n, started.max_tokens) == ("r-1", 1, 100)
    assert started.prompt_tokens > 0
    assert before - 1 < started.created_at.ToNanoseconds() / 1e9 < time.time() + 1
    assert finished.finish_reason == pb.FINISH_REASON_STOP
    assert finished.HasField("stop_token_id")
    usage = finished.usage
    assert usage.prompt_tokens == started.prompt_tokens
    deltas = sum(message.delta.token_count for message in messages)
    assert usage.completion_tokens == deltas + 1  # the end-of-sequence token counts
    timings = finished.timings
    ttft = timings.time_to_first_token.ToNanoseconds()
    assert ttft == pytest.approx(
        timings.queued.ToNanoseconds() + timings.prefill.ToNanoseconds(), abs=10
    )


async def test_the_creation_time_is_that_of_admission(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenized_at: list[int] = []
    async with serve_script() as worker:
        encode = worker.served.tokenizer.encode

        def note_time(text: str, **options: Any) -> list[int]:
            tokenized_at.append(time.time_ns())
            return encode(text, **options)

        monkeypatch.setattr(worker.served.tokenizer, "encode", note_time)
        messages = await worker.generate()
    assert messages[0].started.created_at.ToNanoseconds() <= tokenized_at[0]


async def test_unset_fields_are_resolved_and_told() -> None:
    async with serve_script(context_length=64, text=TEXT, repeats=1) as worker:
        request = pb.GenerateRequest(prompt=pb.Prompt(token_ids=pb.TokenIds(ids=[5] * 10)))
        messages = [message async for message in worker.stub.Generate(request)]
        others = [message async for message in worker.stub.Generate(request)]
    started = messages[0].started
    assert started.request_id
    assert started.request_id != others[0].started.request_id
    assert (started.max_tokens, started.n) == (54, 1)
    sampling = started.sampling
    for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"):
        assert sampling.HasField(name)
    assert sampling.seed != others[0].started.sampling.seed
    assert 0 <= sampling.seed < 2**53  # passes through JSON unharmed


async def test_given_sampling_comes_back() -> None:
    wanted = pb.Sampling(
        temperature=0.5,
        top_k=3,
        top_p=0.25,
        min_p=0.125,
        repetition_penalty=1.5,
        presence_penalty=-1,
        frequency_penalty=2,
        logit_bias={7: -100.0},
        seed=-(2**63),
    )
    async with serve_script() as worker:
        messages = await worker.generate(sampling=wanted)
    assert messages[0].started.sampling == wanted


async def test_the_limits_of_every_range_are_allowed() -> None:
    edges = [
        pb.Sampling(temperature=0, top_p=1, min_p=0, repetition_penalty=100, seed=2**63 - 1),
        pb.Sampling(temperature=100, min_p=1, presence_penalty=-2, frequency_penalty=-2),
        pb.Sampling(top_k=2**32 - 1, presence_penalty=2, logit_bias={0: 100.0, 1: -100.0}),
    ]
    async with serve_script() as worker:
        for sampling in edges:
            messages = await worker.generate(sampling=sampling, n=16, request_id="a.B_1:-" * 18)
            assert reasons(messages) == ["LENGTH"] * 16


async def test_choices_end_one_by_one_and_usage_comes_last() -> None:
    async with serve_script(text=TEXT) as worker:
        messages = await worker.generate(n=3, max_tokens=3)
    footers = [message.finished for message in messages if message.HasField("finished")]
    assert sorted(footer.choice_index for footer in footers) == [0, 1, 2]
    assert [footer.HasField("usage") for footer in footers] == [False, False, True]
    assert footers[-1].usage.completion_tokens == 9
    assert len(texts(messages)) == 3


async def test_stop_sequences_and_stop_tokens_end_a_choice() -> None:
    async with serve_script(text=TEXT) as worker:
        stopping = pb.Stopping(stop_sequences=["never", " three"])
        messages = await worker.generate(stopping=stopping, max_tokens=100)
        assert texts(messages) == {0: "One two"}
        assert messages[-1].finished.finish_reason == pb.FINISH_REASON_STOP_SEQUENCE
        assert messages[-1].finished.stop_sequence == " three"

        tokens = await worker.stub.Tokenize(pb.TokenizeRequest(prompt=pb.Prompt(text=TEXT)))
        stop_id = tokens.token_ids[-1]
        stopping = pb.Stopping(stop_token_ids=[stop_id])
        messages = await worker.generate(stopping=stopping, max_tokens=100)
        assert messages[-1].finished.finish_reason == pb.FINISH_REASON_STOP
        assert messages[-1].finished.stop_token_id == stop_id


@pytest.mark.parametrize(
    "stopping",
    [
        pb.Stopping(stop_sequences=["wo th"]),  # begins and ends inside a token
        pb.Stopping(stop_sequences=["never"]),  # the end-of-sequence token ends it
        pb.Stopping(ignore_eos=True, max_tokens=7),
    ],
)
async def test_deltas_and_footer_together_have_every_token(stopping: pb.Stopping) -> None:
    async with serve_script(text=TEXT, repeats=1) as worker:
        script = await worker.stub.Tokenize(pb.TokenizeRequest(prompt=pb.Prompt(text=TEXT)))
        output = pb.Output(token_ids=True, logprobs=0)
        messages = await worker.generate(stopping=stopping, output=output, max_tokens=100)
        silent = await worker.generate(stopping=stopping, max_tokens=100)
        eos_token_ids = (await worker.stub.GetModel(pb.GetModelRequest())).eos_token_ids
    footer = messages[-1].finished
    ids = [token_id for message in messages for token_id in message.delta.token_ids]
    ids += footer.withheld_token_ids
    ended = [*script.token_ids, *eos_token_ids, *eos_token_ids]  # the script's end, again and again
    assert ids == ended[: footer.completion_tokens]
    withholds = footer.finish_reason != pb.FINISH_REASON_LENGTH
    assert bool(footer.withheld_token_ids) == withholds
    scored = [logprob.token.token_id for logprob in footer.withheld_logprobs]
    assert scored == list(footer.withheld_token_ids)
    assert not silent[-1].finished.withheld_token_ids
    assert not silent[-1].finished.withheld_logprobs


async def test_ignore_eos_goes_on() -> None:
    async with serve_script(text=TEXT, repeats=1) as worker:
        stopping = pb.Stopping(ignore_eos=True)
        messages = await worker.generate(stopping=stopping, max_tokens=20)
    assert reasons(messages) == ["LENGTH"]
    assert messages[-1].finished.usage.completion_tokens == 20


async def test_token_ids_and_logprobs_come_only_when_asked_for() -> None:
    async with serve_script(text=TEXT) as worker:
        plain = await worker.generate()
        rich = await worker.generate(output=pb.Output(token_ids=True, logprobs=1))
    for message in plain:
        assert not message.delta.token_ids
        assert not message.delta.logprobs
    deltas = [message.delta for message in rich if message.HasField("delta")]
    ids = [token_id for delta in deltas for token_id in delta.token_ids]
    scored = [logprob for delta in deltas for logprob in delta.logprobs]
    assert len(ids) == len(scored) == 4
    assert [logprob.token.token_id for logprob in scored] == ids
    joined = b"".join([logprob.token.token for logprob in scored])
    assert joined.decode() == texts(rich)[0]
    assert all(logprob.token.logprob == 0.0 and len(logprob.top) == 1 for logprob in scored)


async def test_echo_sends_the_prompt_first_and_scores_it_if_asked() -> None:
    async with serve_script(text=TEXT) as worker:
        output = pb.Output(echo=True, token_ids=True, logprobs=0)
        messages = await worker.generate(text="Once upon", output=output, n=2)
        first = dict.fromkeys(range(2), True)
        for delta in (message.delta for message in messages if message.HasField("delta")):
            assert delta.is_prompt == first[delta.choice_index]
            first[delta.choice_index] = False
            if delta.is_prompt:
                assert delta.text == "Once upon"
                assert len(delta.token_ids) == messages[0].started.prompt_tokens
                assert not delta.logprobs

        output = pb.Output(echo=True, logprobs=1, prompt_logprobs=True)
        messages = await worker.generate(text="Once upon", output=output, max_tokens=0)
        assert kinds(messages) == ["started", "delta", "finished"]
        prompt = messages[1].delta
        assert len(prompt.logprobs) == prompt.token_count == messages[0].started.prompt_tokens
        assert not prompt.logprobs[0].token.HasField("logprob")
        assert all(logprob.token.HasField("logprob") for logprob in prompt.logprobs[1:])
        assert messages[-1].finished.usage.completion_tokens == 0


async def test_an_item_without_text_is_not_sent_and_its_tokens_count_in_the_next() -> None:
    async with serve_script(text="a🦊b", repeats=5) as worker:
        messages = await worker.generate(max_tokens=100)
        rich = await worker.generate(max_tokens=100, output=pb.Output(token_ids=True))
    deltas = [message.delta for message in messages if message.HasField("delta")]
    assert all(delta.text for delta in deltas)
    assert len(deltas) < sum(len(message.delta.token_ids) for message in rich)
    for stream in (messages, rich):
        counted = sum(message.delta.token_count for message in stream)
        assert counted == stream[-1].finished.usage.completion_tokens - 1  # all but the end
        assert texts(stream) == {0: "a🦊b" * 5}


async def test_a_silent_stream_sends_heartbeats() -> None:
    async with serve_script(step_milliseconds=250, heartbeat_seconds=0.05) as worker:
        call = worker.stub.Generate(generate_request(max_tokens=4000))
        messages: list[pb.GenerateResponse] = []
        while kinds(messages).count("heartbeat") < 4 or "delta" not in kinds(messages):
            message = await call.read()
            assert isinstance(message, pb.GenerateResponse)
            messages.append(message)
        call.cancel()
    assert kinds(messages)[0] == "started"
    assert [message.sequence_number for message in messages] == list(range(len(messages)))
    assert texts(messages)[0]


async def test_tokens_without_a_message_are_silence_too() -> None:
    stopping = pb.Stopping(stop_sequences=["a" * 1000 + "b"])  # holds every "a" back
    async with serve_script(text="a", step_milliseconds=10, heartbeat_seconds=0.1) as worker:
        request = generate_request(request_id="r", max_tokens=900, stopping=stopping)
        call = worker.stub.Generate(request)
        messages = await read_until(call, "heartbeat")
        assert kinds(messages) == ["started", "heartbeat"]
        await worker.stub.Abort(pb.AbortRequest(request_id="r"))
        messages += await read_rest(call)
    assert texts(messages) == {0: "a" * messages[-1].finished.completion_tokens}


async def test_heartbeats_come_in_the_queue_too() -> None:
    async with serve_script(max_running=1, step_milliseconds=10, heartbeat_seconds=0.05) as worker:
        first = worker.stub.Generate(generate_request(max_tokens=1000))
        await read_until(first, "delta")
        second = worker.stub.Generate(generate_request())
        messages = await read_until(second, "heartbeat")
        assert kinds(messages) == ["started", "heartbeat"]
        first.cancel()
        second.cancel()


async def test_the_queue_position_counts_the_requests_before() -> None:
    async with serve_script(max_running=1, step_milliseconds=5) as worker:
        calls = [worker.stub.Generate(generate_request(max_tokens=1000))]
        await read_until(calls[0], "delta")
        positions = []
        for _ in range(3):
            calls.append(worker.stub.Generate(generate_request(n=1)))
            positions.append((await read_until(calls[-1], "started"))[0].started.queue_position)
        assert positions == [0, 1, 2]
        for call in calls:
            call.cancel()


async def test_a_slow_reader_gets_few_large_items() -> None:
    async with (
        serve_script(**LONG_STREAMS) as worker,
        stalled_call(worker, output=pb.Output(token_ids=True)) as slow,
    ):
        # The engine does not wait for the reader, and its blocks are free before the reader has gone on.
        await worker.wait_for(running=0, waiting=0, free_blocks=1024, requests=1)
        messages = await read_rest(slow)
    ids = [token_id for message in messages for token_id in message.delta.token_ids]
    assert len(ids) == 8000
    assert len(messages) < 2000
    assert messages[-1].finished.usage.completion_tokens == 8000


async def test_a_reader_that_does_not_read_gives_its_place_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    handlers: list[str] = []  # those that have not ended
    generate = GenerationService.Generate

    async def count(self: GenerationService, request: pb.GenerateRequest, context: Context) -> None:
        handlers.append(request.request_id)
        try:
            await generate(self, request, context)
        finally:
            handlers.remove(request.request_id)

    monkeypatch.setattr(GenerationService, "Generate", count)
    async with (
        serve_script(**LONG_STREAMS, send_timeout_seconds=0.2) as worker,
        stalled_call(worker) as stalled,
    ):
        await worker.wait_for(requests=0, running=0, free_blocks=1024)
        async with asyncio.timeout(PATIENCE):
            while handlers:  # though the client still does not read
                await asyncio.sleep(0.01)
        refusal = await refusal_of_rest(stalled)
    assert (refusal.code, refusal.info.reason) == (grpc.StatusCode.ABORTED, "SLOW_READER")


async def test_a_stalled_reader_that_goes_away_is_no_slow_reader(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with (
        serve_script(**LONG_STREAMS, send_timeout_seconds=30) as worker,
        stalled_call(worker) as stalled,
    ):
        await worker.wait_for(generated_tokens=8000, running=0, free_blocks=1024, requests=1)
        stalled.cancel()
        await worker.wait_idle()
    output = capsys.readouterr().out
    assert "status=CANCELLED" in output
    assert "SLOW_READER" not in output


async def test_a_stalled_reader_holds_no_slot_once_the_engine_is_done() -> None:
    settings = {"max_running": 1, "max_waiting": 0}
    async with (
        serve_script(**settings, **LONG_STREAMS) as worker,
        stalled_call(worker, request_id="stalled") as stalled,
    ):
        await worker.wait_for(generated_tokens=8000, running=0, free_blocks=1024, requests=1)
        assert reasons(await worker.generate()) == ["LENGTH"]  # the only slot is free
        response = await worker.stub.Abort(pb.AbortRequest(request_id="stalled"))
        assert response.outcome == pb.ABORT_OUTCOME_ALREADY_FINISHED
        assert reasons(await read_rest(stalled)) == ["LENGTH"]


async def refusal_of_rest(call: Call) -> Refusal:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read_rest(call)
    return Refusal(caught.value)


async def test_a_large_prompt_leaves_the_event_loop_alone() -> None:
    async with serve_script(context_length=2**17) as worker:
        # as much as may be tokenized at all
        size = 2**17 * (worker.served.tokenizer.max_token_bytes or 16)
        text = ("many words " * size)[:size]
        gaps: list[float] = []

        async def tick() -> None:
            while True:
                before = time.monotonic()
                await asyncio.sleep(0.001)
                gaps.append(time.monotonic() - before)

        # A machine that stalls makes a gap too, but hardly each time; a loop that tokenizes has one that is all of it.
        shares: list[float] = []
        while not shares or (shares[-1] >= 0.5 and len(shares) < 5):
            gaps.clear()
            ticking = asyncio.create_task(tick())
            began = time.monotonic()
            await refusal_of(worker.stub.Generate(generate_request(text=text)))
            took = time.monotonic() - began
            ticking.cancel()
            shares.append(max(gaps) / took)
    assert min(shares) < 0.5


async def test_chat_is_rendered_by_the_template() -> None:
    async with serve_script(text=TEXT) as worker:
        chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="Hi", name="ann")])
        prompt = pb.Prompt(chat=chat)
        tokens = await worker.stub.Tokenize(pb.TokenizeRequest(prompt=prompt))
        messages = await worker.generate(prompt=prompt)
        assert messages[0].started.prompt_tokens == len(tokens.token_ids)
