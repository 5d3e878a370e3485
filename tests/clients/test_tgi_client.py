"""huggingface_hub's text_generation, unchanged, and TGI's error body, before a scripted worker."""

from collections.abc import AsyncIterator
from typing import Any

import grpc
import httpx
import pytest
import pytest_asyncio
from huggingface_hub import AsyncInferenceClient
from huggingface_hub.errors import (
    GenerationError,
    IncompleteGenerationError,
    OverloadedError,
    ValidationError,
)

from protos.sluice.v1 import generation_pb2 as pb
from tests.edge.edge_process import EdgeProcess
from tests.edge.scripted_worker import ScriptedCall, ScriptedWorker, bad_field, failing
from tests.patience import PATIENCE


@pytest_asyncio.fixture(loop_scope="session")
async def client(edge: EdgeProcess) -> AsyncIterator[AsyncInferenceClient]:
    async with AsyncInferenceClient(model=edge.url, timeout=PATIENCE) as client:
        yield client


@pytest.mark.parametrize("stream", [False, True])
async def test_overload_raises_the_clients_own_class(
    client: AsyncInferenceClient, worker: ScriptedWorker, stream: bool
) -> None:
    worker.script = failing(grpc.StatusCode.RESOURCE_EXHAUSTED)
    with pytest.raises(OverloadedError):
        await client.text_generation("x", stream=stream)


async def test_a_bad_field_and_a_bug_raise_theirs(
    client: AsyncInferenceClient, worker: ScriptedWorker
) -> None:
    refusal = bad_field("sampling.top_p")
    message = "sampling.top_p: must be above 0 to 1, got 7"
    worker.script = failing(grpc.StatusCode.INVALID_ARGUMENT, message, refusal)
    with pytest.raises(ValidationError, match=r"parameters\.top_p: must be above 0 to 1"):
        await client.text_generation("x", top_p=7)
    worker.script = failing(grpc.StatusCode.INTERNAL)
    with pytest.raises(GenerationError, match="failed to process"):
        await client.text_generation("x")


async def test_a_failure_midway_raises(
    client: AsyncInferenceClient, worker: ScriptedWorker
) -> None:
    async def script(call: ScriptedCall) -> None:
        await call.started()
        await call.delta("partly", logprobs=[logprob(5, b"partly")])
        await call.fail(grpc.StatusCode.INTERNAL)

    worker.script = script
    stream = aiter(await client.text_generation("x", stream=True))
    assert await anext(stream) == "partly"
    with pytest.raises(IncompleteGenerationError):
        await anext(stream)


def logprob(token_id: int, token: bytes) -> pb.TokenLogprob:
    return pb.TokenLogprob(token=pb.Candidate(token_id=token_id, token=token, logprob=-0.5))


async def test_text_is_given_to_the_tokens_that_make_it(
    client: AsyncInferenceClient, worker: ScriptedWorker
) -> None:
    """Held text, split characters and joined deltas: what is streamed is the whole text, one event a token."""
    wave = "👋".encode()

    async def script(call: ScriptedCall) -> None:
        await call.started()
        await call.delta("a")  # its token is not certain yet
        await call.delta("b", logprobs=[logprob(1, b"ab")])
        await call.delta("👋", logprobs=[logprob(2, wave[:2]), logprob(3, wave[2:])])
        await call.delta(" c", logprobs=[logprob(4, b"c")])
        await call.delta("tail")
        await call.finished(completion_tokens=5, stop_token_id=9)

    worker.script = script
    stream = await client.text_generation("x", stream=True, details=True)
    events = [event async for event in stream]
    assert [(e.index, e.token.id, e.token.text) for e in events] == [
        (1, 1, "ab"),
        (2, 2, ""),
        (3, 3, "👋"),
        (4, 4, " c"),
        (5, 9, "tail"),
    ]
    assert [e.token.special for e in events] == [False] * 4 + [True]
    assert events[-1].generated_text == "ab👋 ctail"
    assert all(event.generated_text is None for event in events[:-1])


@pytest.mark.parametrize(
    ("parameters", "sampling"),
    [
        ({}, pb.Sampling(temperature=0)),
        ({"temperature": 1, "top_p": 1.0}, pb.Sampling(temperature=0, top_p=1)),
        ({"do_sample": True}, pb.Sampling(temperature=1)),
        ({"temperature": 0.5}, pb.Sampling(temperature=0.5)),
        ({"top_k": 5, "seed": 3}, pb.Sampling(temperature=1, top_k=5, seed=3)),
        (
            {"repetition_penalty": 1.5, "frequency_penalty": 0.5},
            pb.Sampling(temperature=0, repetition_penalty=1.5, frequency_penalty=0.5),
        ),
    ],
)
async def test_it_draws_where_tgi_draws(
    http: httpx.AsyncClient,
    worker: ScriptedWorker,
    parameters: dict[str, Any],
    sampling: pb.Sampling,
) -> None:
    answer = await http.post("/generate", json={"inputs": "x", "parameters": parameters})
    assert answer.json() == {"generated_text": "Hello wörld"}
    assert worker.call.request.sampling == sampling
    assert worker.call.request.stopping.max_tokens == 100


@pytest.mark.parametrize(
    ("grammar", "constraint"),
    [
        ({"type": "regex", "value": "a+"}, pb.Constraint(regex="a+")),
        ({"type": "json", "value": {"a": 1}}, pb.Constraint(json_schema='{"a":1}')),
        ({"type": "json", "value": '{"a": 1}'}, pb.Constraint(json_schema='{"a": 1}')),
        (
            {"type": "json_schema", "value": {"name": "n", "schema": {"a": 1}}},
            pb.Constraint(json_schema='{"a":1}'),
        ),
    ],
)
async def test_a_grammar_is_a_constraint(
    http: httpx.AsyncClient, worker: ScriptedWorker, grammar: Any, constraint: pb.Constraint
) -> None:
    await http.post("/generate", json={"inputs": "x", "parameters": {"grammar": grammar}})
    assert worker.call.request.constraint == constraint


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("/generate", {}, "inputs is required"),
        ("/generate", {"inputs": "x", "parameters": {"watermark": True}}, "parameters.watermark"),
        ("/generate", {"inputs": "x", "parameters": {"truncate": 5}}, "parameters.truncate"),
        ("/generate", {"inputs": "x", "parameters": {"typical_p": 0.5}}, "parameters.typical_p"),
        ("/generate", {"inputs": "x", "parameters": {"adapter_id": "a"}}, "parameters.adapter_id"),
        ("/generate", {"inputs": "x", "parameters": {"nonsense": 5}}, "parameters.nonsense"),
        ("/generate", {"inputs": "x", "parameters": {"top_k": -1}}, "parameters.top_k"),
        ("/generate", {"inputs": "x", "stream": True}, "stream"),
        ("/generate_stream", {"inputs": "x", "parameters": {"best_of": 2}}, "parameters.best_of"),
        (
            "/",
            {"inputs": "x", "stream": True, "parameters": {"decoder_input_details": True}},
            "parameters.decoder_input_details",
        ),
        ("/generate", {"inputs": "x", "parameters": {"grammar": {"type": "regex", "value": 1}}},
         "grammar.value"),
        ("/tokenize", {"inputs": 5}, "inputs"),
    ],
)  # fmt: skip
async def test_what_cannot_be_had_is_refused_by_name(
    http: httpx.AsyncClient, worker: ScriptedWorker, path: str, body: Any, named: str
) -> None:
    answer = await http.post(path, json=body)
    assert answer.status_code == 400
    assert answer.json()["error_type"] == "validation"
    assert named in answer.json()["error"]
    assert worker.calls == []
