"""Constraints through the contract: a real model, the real server, hostile callers beside honest ones."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import jsonschema
import pytest

from inference_worker.engine.fair_queue import Share
from inference_worker.grammar.compiled import CompiledGrammar
from inference_worker.grammar.compiler import GrammarCompiler
from inference_worker.grammar.source import GrammarSource
from inference_worker.grammar.trial import Trial
from protos.sluice.v1 import generation_pb2 as pb
from tests.patience import PATIENCE
from tests.worker.grammar.hostile import ENDLESS
from tests.worker.served_models import serve_random, tiny_llama
from tests.worker.served_worker import (
    ServedWorker,
    generate_request,
    read_until,
    reasons,
    refusal_of,
    serve,
    serve_script,
    texts,
)
from tests.worker.stream_record import StreamRecord

SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["é", "🦊"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 999},
        "words": {"type": "array", "items": {"type": "string", "maxLength": 4}, "maxItems": 2},
    },
    "required": ["kind", "count", "words"],
    "additionalProperties": False,
}
JSON = pb.Constraint(json_schema=json.dumps(SCHEMA | {"x-guidance": {"whitespace_pattern": " ?"}}))


@pytest.fixture
async def random_worker() -> AsyncIterator[ServedWorker]:
    async with serve(*serve_random(tiny_llama(), max_running=6, kv_cache_mib=1)) as worker:
        yield worker


def hot(seed: int) -> pb.Sampling:
    return pb.Sampling(temperature=5, seed=seed)


async def test_json_from_a_random_model(random_worker: ServedWorker) -> None:
    """Three choices each, of which some are cut by the length; the others obey the schema."""
    streams = await asyncio.gather(
        *(
            random_worker.generate(
                constraint=JSON,
                n=3,
                max_tokens=100,
                sampling=hot(seed),
                output=pb.Output(logprobs=2),
            )
            for seed in range(6)
        )
    )
    whole = 0
    for stream in streams:
        record = StreamRecord().add(stream)
        for choice in record.choices.values():
            assert choice.finished is not None
            assert len(choice.logprobs) == choice.num_tokens
            if choice.finished.finish_reason == pb.FINISH_REASON_STOP:
                assert choice.finished.WhichOneof("matched") is None
                jsonschema.validate(json.loads(choice.text), SCHEMA)
                whole += 1
    assert whole >= 9


@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        (pb.Constraint(regex="[0-9]{2}:[0-9]{2}"), "[0-9]{2}:[0-9]{2}"),
        (
            pb.Constraint(choice=pb.ChoiceList(texts=["ja", "nein", "vielleicht"])),
            "ja|nein|vielleicht",
        ),
        (pb.Constraint(lark='start: "<" /[a-c]{1,4}/ ">"'), "<[a-c]{1,4}>"),
    ],
    ids=["regex", "choice", "lark"],
)
async def test_the_other_kinds(
    random_worker: ServedWorker, constraint: pb.Constraint, pattern: str
) -> None:
    stream = await random_worker.generate(
        constraint=constraint,
        n=4,
        max_tokens=50,
        sampling=hot(7),
        stopping=pb.Stopping(ignore_eos=True),
    )
    assert reasons(stream) == ["STOP"] * 4
    assert all(re.fullmatch(pattern, text) for text in texts(stream).values())


async def test_a_constrained_stream_goes_on_elsewhere(random_worker: ServedWorker) -> None:
    """Cut after any of its messages, down to the last token of a text that is whole."""
    request = generate_request(
        constraint=pb.Constraint(regex="(ab|c)*[0-9]{9}"),
        n=2,
        max_tokens=60,
        sampling=pb.Sampling(temperature=1, seed=3, logit_bias={}),
        output=pb.Output(token_ids=True),
    )
    uncut = [message async for message in random_worker.stub.Generate(request)]
    expected = StreamRecord().add(uncut)
    assert (
        len(uncut) >= 5
    )  # a header, a delta and a footer of each choice; a slow reader gets no more
    for cut in range(1, len(uncut)):
        record = StreamRecord().add(uncut[:cut])
        if record.usage is None:
            going_on = record.going_on(request)
            record.add([m async for m in random_worker.stub.Generate(going_on)])
        for index, choice in expected.choices.items():
            assert record.choices[index].text == choice.text
            assert record.choices[index].token_ids == choice.token_ids
            assert record.choices[index].finished is not None


async def test_what_was_delivered_must_be_of_the_constraint(random_worker: ServedWorker) -> None:
    delivered = pb.DeliveredChoice(choice_index=0, token_ids=[51, 60, 60])
    call = random_worker.stub.Generate(
        generate_request(
            constraint=pb.Constraint(regex="[a-z]{40}"),
            sampling=pb.Sampling(seed=1),
            max_tokens=50,
            continuation=pb.Continuation(choices=[delivered]),
        )
    )
    refusal = await refusal_of(call)
    assert refusal.code == grpc.StatusCode.INVALID_ARGUMENT
    assert refusal.field == "continuation.choices[0].token_ids[0]"


async def test_hostile_schemas_delay_nobody() -> None:
    """A stream goes on, and an honest constraint is served, while hostile ones are being found out."""
    async with serve_script(step_milliseconds=2, context_length=8192, blocks=2048) as worker:
        running = worker.stub.Generate(generate_request(max_tokens=8000))
        await read_until(running, "delta")
        before = await worker.load()
        hostile = [
            asyncio.create_task(refusal_of(worker.stub.Generate(generate_request(**fields))))
            for source in ENDLESS.values()
            for fields in [_constrained(source.text)]
        ]
        honest = await worker.generate(constraint=pb.Constraint(regex="(.|\\n)*"), max_tokens=5)
        assert reasons(honest) == ["LENGTH"]
        assert not all(task.done() for task in hostile)
        for refusal in await asyncio.gather(*hostile):
            assert refusal.code == grpc.StatusCode.INVALID_ARGUMENT
            assert refusal.field == "constraint.json_schema"
            assert "compile" in refusal.message
        after = await worker.load()
        assert after.generated_tokens > before.generated_tokens + 100
        running.cancel()


async def test_a_constraint_waits_for_its_turn_as_its_keys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shares: list[Share] = []
    compile_ = GrammarCompiler.compile

    async def noted(
        compiler: GrammarCompiler, source: GrammarSource, share: Share
    ) -> CompiledGrammar:
        shares.append(share)
        return await compile_(compiler, source, share)

    monkeypatch.setattr(GrammarCompiler, "compile", noted)
    async with serve_script() as worker:
        constraint = pb.Constraint(regex="(.|\\n)*")
        caller = pb.Caller(key_id="alice", weight=2)
        await worker.generate(constraint=constraint, caller=caller, priority=3)
        await worker.generate(constraint=constraint)
    assert shares == [Share("alice", 2.0, 3), Share()]


def _constrained(schema: str) -> dict[str, Any]:
    return {"constraint": pb.Constraint(json_schema=schema)}


async def test_what_becomes_too_complex_is_the_callers_fault(random_worker: ServedWorker) -> None:
    lark = "start: (" + "|".join(f"T{i}" for i in range(1500)) + ")*\n"
    lark += "\n".join(f"T{i}: /[a-z]*{i}[a-z]*{i}/" for i in range(1500))
    refusal = await refusal_of(
        random_worker.stub.Generate(generate_request(constraint=pb.Constraint(lark=lark)))
    )
    assert refusal.code == grpc.StatusCode.INVALID_ARGUMENT
    assert refusal.field == "constraint.lark"


async def test_what_takes_too_long_to_compile_is_refused() -> None:
    async with serve_script(grammar_seconds=0.05) as worker:
        schema = pb.Constraint(json_schema=ENDLESS["definitions that double"].text)
        refusal = await refusal_of(worker.stub.Generate(generate_request(constraint=schema)))
        assert (refusal.code, refusal.field) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "constraint.json_schema",
        )
        assert "0.05" in refusal.message


async def test_what_takes_too_long_at_its_tokens_fails_alone() -> None:
    """A budget that no grammar can keep to: told in the stream, and the rows beside it go on."""
    stingy = serve_random(tiny_llama(), max_running=6, kv_cache_mib=1, grammar_token_ms=1e-6)
    async with serve(*stingy) as worker:
        free = asyncio.create_task(
            worker.generate(max_tokens=40, stopping=pb.Stopping(ignore_eos=True))
        )
        bound = generate_request(constraint=pb.Constraint(regex="[0-9]{30}"), n=2, max_tokens=40)
        refusal = await refusal_of(worker.stub.Generate(bound))
        assert refusal.code == grpc.StatusCode.INVALID_ARGUMENT
        assert refusal.field == "constraint.regex"
        assert "processor time" in refusal.message
        assert reasons(await free) == ["LENGTH"]


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Whatever is compiled takes until the test is over; the event tells that it has begun."""
    has_begun, is_over = threading.Event(), threading.Event()

    def run(_trial: Trial, _grammar: str) -> str:
        has_begun.set()
        is_over.wait(2 * PATIENCE)
        return "it is over"

    monkeypatch.setattr(Trial, "run", run)
    yield has_begun
    is_over.set()


async def test_a_caller_who_leaves_while_it_compiles_leaves_nothing(
    compiling: threading.Event,
) -> None:
    async with serve_script() as worker:
        leaving = worker.stub.Generate(generate_request(constraint=pb.Constraint(regex="a+")))
        assert await asyncio.to_thread(compiling.wait, PATIENCE)
        leaving.cancel()
        await worker.wait_idle()


async def test_an_abort_while_it_compiles_is_told(compiling: threading.Event) -> None:
    async with serve_script() as worker:
        fields: dict[str, Any] = {"constraint": pb.Constraint(regex="a+")}
        stream = asyncio.create_task(worker.generate(request_id="gone", n=2, **fields))
        assert await asyncio.to_thread(compiling.wait, PATIENCE)
        await worker.stub.Abort(pb.AbortRequest(request_id="gone"))
        assert reasons(await stream) == ["CANCELLED", "CANCELLED"]
