"""The real engine on real models: its output is the model's own, whatever happens on the way."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from inference_worker.engine.detokenizer import ByteDetokenizer
from inference_worker.engine.engine import Engine, EngineOptions
from inference_worker.engine.event import Delta, Event, Failed, Token
from inference_worker.engine.request import OutputParams, Request, SamplingParams, StoppingParams
from inference_worker.model.loader import make_runner
from inference_worker.settings import WorkerSettings

CONTEXT_LENGTH = 512
VOCABULARY = 320


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.set_num_threads(1)  # matrices this small gain nothing from more
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_LENGTH,
        initializer_range=0.5,  # sharp logits: the model is never indifferent between two tokens
        eos_token_id=None,
        bos_token_id=None,
    )
    model: PreTrainedModel = LlamaForCausalLM(config)
    model.eval()  # type: ignore[no-untyped-call]
    return model


@pytest.fixture(scope="module")
def references(model: PreTrainedModel) -> dict[tuple[int, ...], list[int]]:
    """Prompts of many lengths, and 40 greedy tokens of the model's own `generate` for each, alone."""
    generator = torch.Generator().manual_seed(1)
    prompts = [
        torch.randint(VOCABULARY, (length,), generator=generator).tolist()
        for length in (1, 2, 15, 16, 17, 33, 64, 100, 150)
    ]
    return {tuple(prompt): generate(model, prompt, 40) for prompt in prompts}


def generate(model: PreTrainedModel, prompt: Sequence[int], num_tokens: int) -> list[int]:
    model.set_attn_implementation("eager")
    ids = torch.tensor([list(prompt)])
    output = model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=num_tokens,
        pad_token_id=0,
    )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


def make_engine(
    model: PreTrainedModel,
    *,
    kv_tokens: int = 8192,
    max_running: int = 16,
    max_batch_tokens: int = 64,
) -> Engine:
    """An engine whose KV cache holds `kv_tokens` tokens."""
    settings = WorkerSettings(max_running=-(-kv_tokens // CONTEXT_LENGTH))
    runner = make_runner(model, CONTEXT_LENGTH, settings)
    runner.num_blocks = kv_tokens // runner.block_size
    options = EngineOptions(max_running, max_batch_tokens, CONTEXT_LENGTH)
    return Engine(runner, new_detokenizer, options)


def new_detokenizer(*, at_start: bool = False) -> ByteDetokenizer:
    return ByteDetokenizer([b"."] * VOCABULARY)


def request(
    request_id: str,
    prompt: Sequence[int],
    num_tokens: int,
    sampling: SamplingParams | None = None,
    output: OutputParams | None = None,
    n: int = 1,
) -> Request:
    return Request(
        request_id,
        tuple(prompt),
        StoppingParams(num_tokens),
        sampling or SamplingParams(temperature=0),
        output or OutputParams(),
        n=n,
    )


def run(engine: Engine, requests: Sequence[Request]) -> dict[tuple[str, int], list[Token]]:
    """Tokens by request id and choice; echoed prompts under choice -1 - index."""
    for each in requests:
        engine.add(each)
    tokens: dict[tuple[str, int], list[Token]] = defaultdict(list)
    while engine.has_work:
        engine.step()
        engine.check()
        for of, event in engine.take_events():
            add(tokens, of.request_id, event)
    assert engine.load().free_blocks == engine.load().total_blocks
    return tokens


def add(tokens: dict[tuple[str, int], list[Token]], request_id: str, event: Event) -> None:
    if isinstance(event, Failed):
        raise event.error
    if isinstance(event, Delta):
        index = -1 - event.choice_index if event.is_prompt else event.choice_index
        tokens[request_id, index] += event.tokens


def ids(tokens: Sequence[Token]) -> list[int]:
    return [token.token_id for token in tokens]


def as_requests(references: dict[tuple[int, ...], list[int]]) -> list[Request]:
    return [request(f"r{len(prompt)}", prompt, 40) for prompt in references]


@pytest.mark.parametrize(
    ("max_running", "max_batch_tokens"),
    [(16, 4096), (16, 16), (2, 7)],
    ids=["whole", "chunked", "tight"],
)
def test_greedy_equals_generate_for_mixed_lengths_batched(
    model: PreTrainedModel,
    references: dict[tuple[int, ...], list[int]],
    max_running: int,
    max_batch_tokens: int,
) -> None:
    engine = make_engine(model, max_running=max_running, max_batch_tokens=max_batch_tokens)
    tokens = run(engine, as_requests(references))
    for prompt, expected in references.items():
        assert ids(tokens[f"r{len(prompt)}", 0]) == expected


def test_greedy_equals_generate_from_the_prefix_cache(
    model: PreTrainedModel, references: dict[tuple[int, ...], list[int]]
) -> None:
    engine = make_engine(model)
    for _ in range(2):
        tokens = run(engine, as_requests(references))
        for prompt, expected in references.items():
            assert ids(tokens[f"r{len(prompt)}", 0]) == expected
    longest = max(references, key=len)
    turn = [*longest, *references[longest], 7, 8, 9]
    tokens = run(engine, [request("turn", turn, 20)])
    assert ids(tokens["turn", 0]) == generate(model, turn, 20)


def test_greedy_equals_generate_after_preemption(
    model: PreTrainedModel, references: dict[tuple[int, ...], list[int]]
) -> None:
    engine = make_engine(model, kv_tokens=256)
    tokens = run(engine, as_requests(references))
    assert engine.load().preemptions > 0
    for prompt, expected in references.items():
        assert ids(tokens[f"r{len(prompt)}", 0]) == expected


SAMPLED = SamplingParams(
    temperature=0.9, top_k=40, top_p=0.95, repetition_penalty=1.1, presence_penalty=0.3, seed=-12345
)


def test_a_seed_gives_the_same_tokens_alone_batched_and_preempted(
    model: PreTrainedModel, references: dict[tuple[int, ...], list[int]]
) -> None:
    prompts = list(references)
    requests = [request(f"r{i}", prompt, 40, SAMPLED, n=2) for i, prompt in enumerate(prompts)]
    batched = run(make_engine(model, max_running=32), requests)
    tight = make_engine(model, kv_tokens=320, max_batch_tokens=20)
    preempted = run(tight, requests)
    assert tight.load().preemptions > 0
    assert preempted.keys() == batched.keys()
    for i, alone in enumerate(requests):
        tokens = run(make_engine(model), [alone])
        for choice in range(2):
            assert len(tokens[f"r{i}", choice]) == 40
            assert ids(tokens[f"r{i}", choice]) == ids(batched[f"r{i}", choice])
            assert ids(tokens[f"r{i}", choice]) == ids(preempted[f"r{i}", choice])
        assert ids(tokens[f"r{i}", 0]) != ids(tokens[f"r{i}", 1])


def test_logprobs_are_the_models_own(
    model: PreTrainedModel, references: dict[tuple[int, ...], list[int]]
) -> None:
    prompt = max(references, key=len)
    scored = request(
        "a", prompt, 5, SAMPLED, OutputParams(logprobs=3, echo=True, prompt_logprobs=True)
    )
    tokens = run(make_engine(model, max_batch_tokens=20), [scored])
    whole = ids(tokens["a", -1]) + ids(tokens["a", 0])
    assert whole[: len(prompt)] == list(prompt)
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        expected = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    first, *rest = tokens["a", -1] + tokens["a", 0]
    assert first.logprob is None
    for position, token in enumerate(rest):
        assert token.logprob == pytest.approx(expected[position, token.token_id].item(), abs=1e-3)
        best = expected[position].topk(3)
        assert [candidate.token_id for candidate in token.top] == best.indices.tolist()
        assert [candidate.logprob for candidate in token.top] == pytest.approx(
            best.values.tolist(), abs=1e-3
        )
