"""Memory is given back, and its lack ends one request at most."""

from __future__ import annotations

import gc

import pytest
import torch
from transformers import LlamaConfig

from inference_worker.engine.detokenizer import ByteDetokenizer
from inference_worker.engine.engine import Engine, EngineOptions
from inference_worker.engine.event import Delta, Failed, Finished, FinishReason
from inference_worker.engine.request import OutputParams, Request, SamplingParams, StoppingParams
from inference_worker.model.loader import load_model, make_runner
from inference_worker.settings import WorkerSettings
from tests.worker.model.tiny_models import build_from

VOCABULARY = 50_000
CONTEXT = 4096
_MIB = 2**20


def new_detokenizer(*, at_start: bool = False) -> ByteDetokenizer:
    return ByteDetokenizer([b"x"] * VOCABULARY)


def allocated() -> int:
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


@pytest.fixture
def engine() -> Engine:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = build_from(config).to("cuda")  # type: ignore[arg-type]
    runner = make_runner(model, CONTEXT, WorkerSettings(device="cuda", kv_cache_mib=64))
    options = EngineOptions(max_running=8, max_batch_tokens=CONTEXT, context_length=CONTEXT)
    return Engine(runner, new_detokenizer, options)


def request(name: str, length: int, num_tokens: int, output: OutputParams | None = None) -> Request:
    prompt = tuple(range(7, 7 + length))
    sampling = SamplingParams(temperature=0)
    return Request(name, prompt, StoppingParams(num_tokens), sampling, output or OutputParams())


def test_a_step_too_big_for_memory_is_made_in_smaller_ones(engine: Engine) -> None:
    """And a request that finds no memory for the smallest ends PREEMPTED; either way the others go on."""
    small = request("small", 20, 60)
    engine.add(small)
    for _ in range(10):
        engine.step()
    assert engine.load().generated_tokens > 0
    # scoring the prompt takes 4000 rows of 50,000 logits, several times over
    total = torch.cuda.get_device_properties(0).total_memory
    limit = torch.cuda.memory_reserved() + 256 * _MIB
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
    scored = OutputParams(logprobs=1, echo=True, prompt_logprobs=True)
    engine.add(request("big", 4000, 5, scored))
    engine.add(request("after", 30, 10))
    tokens = {"small": 0, "big": 0, "after": 0}
    reasons: dict[str, FinishReason] = {}
    while engine.has_work:
        engine.step()
        engine.check()
        for of, event in engine.take_events():
            assert not isinstance(event, Failed), event
            if isinstance(event, Delta) and not event.is_prompt:
                tokens[of.request_id] += len(event.tokens)
            elif isinstance(event, Finished):
                reasons[of.request_id] = event.reason
    assert engine.load().preemptions > 0  # it did not fit
    assert reasons.pop("big") in (FinishReason.LENGTH, FinishReason.PREEMPTED)
    assert reasons == {"small": FinishReason.LENGTH, "after": FinishReason.LENGTH}
    assert (tokens["small"], tokens["after"]) == (60, 10)
    load = engine.load()
    assert load.free_blocks == load.total_blocks


def finish(engine: Engine) -> None:
    while engine.has_work:
        engine.step()


def test_a_cancelled_request_leaves_no_block_and_no_tensor_behind(engine: Engine) -> None:
    engine.add(request("first", 50, 20))  # the first steps allocate what stays
    finish(engine)
    before = allocated()
    for number in range(20):
        cancelled = request(f"r{number}", 50 + number, 200)
        engine.add(cancelled)
        for _ in range(number):
            engine.step()
        engine.cancel(cancelled, None)
        load = engine.load()
        assert load.free_blocks == load.total_blocks
    finish(engine)
    assert allocated() - before < 4 * _MIB  # what the latest step drew


def test_closing_gives_everything_back() -> None:
    settings = WorkerSettings(device="cuda", kv_cache_mib=256)
    load_model(settings).runner.close()  # libraries keep their workspaces
    before = allocated()
    served = load_model(settings)
    assert allocated() - before > 256 * _MIB
    served.runner.close()
    del served
    assert allocated() - before < 4 * _MIB
