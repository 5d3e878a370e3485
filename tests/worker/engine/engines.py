"""Engines on a HashRunner, requests to them, and what came of these."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from inference_worker.engine.detokenizer import ByteDetokenizer
from inference_worker.engine.engine import Engine, EngineOptions
from inference_worker.engine.event import (
    Delta,
    Event,
    Finished,
)
from inference_worker.engine.request import OutputParams, Request, SamplingParams, StoppingParams
from tests.worker.engine.hash_runner import VOCABULARY, HashRunner

TOKEN_BYTES = [f"<{token_id}>".encode() for token_id in range(VOCABULARY)]


def new_detokenizer(*, at_start: bool = False) -> ByteDetokenizer:
    return ByteDetokenizer(TOKEN_BYTES)


def make_engine(runner: HashRunner, **options: int | bool) -> Engine:
    limits = {"max_running": 4, "max_batch_tokens": 16, "context_length": 1000, **options}
    return Engine(runner, new_detokenizer, EngineOptions(**limits))  # type: ignore[arg-type]


def make_request(
    request_id: str,
    prompt: Sequence[int],
    max_tokens: int = 8,
    *,
    n: int = 1,
    seed: int = 0,
    stop_sequences: tuple[str, ...] = (),
    stop_token_ids: frozenset[int] = frozenset(),
    frequency_penalty: float = 0,
    output: OutputParams | None = None,
) -> Request:
    return Request(
        request_id=request_id,
        prompt=tuple(prompt),
        stopping=StoppingParams(max_tokens, stop_sequences, stop_token_ids),
        sampling=SamplingParams(seed=seed, frequency_penalty=frequency_penalty),
        output=output or OutputParams(),
        n=n,
    )


def run(engine: Engine) -> dict[str, list[Event]]:
    """Step until nothing is left, checking the blocks after each step."""
    events: dict[str, list[Event]] = defaultdict(list)
    while engine.has_work:
        engine.step()
        engine.check()
        for request, event in engine.take_events():
            events[request.request_id].append(event)
    return events


def completion(events: list[Event], choice_index: int = 0) -> list[int]:
    return [
        token.token_id
        for event in events
        if isinstance(event, Delta) and event.choice_index == choice_index and not event.is_prompt
        for token in event.tokens
    ]


def text(events: list[Event], choice_index: int = 0) -> str:
    return "".join(
        event.text
        for event in events
        if isinstance(event, Delta) and event.choice_index == choice_index and not event.is_prompt
    )


def footers(events: list[Event]) -> list[Finished]:
    return [event for event in events if isinstance(event, Finished)]


def assert_idle(engine: Engine) -> None:
    load = engine.load()
    assert (load.running, load.waiting, load.free_blocks) == (0, 0, load.total_blocks)
    engine.check()
