"""What is kept free for steps, and that it is the largest steps that are measured for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from inference_worker.engine.runner import OutOfMemory
from inference_worker.model.batch import Batch
from inference_worker.model.decoder import FusedDecoder
from inference_worker.model.forward import TransformersForward
from inference_worker.model.loader import make_runner
from tests.worker.model.driver import Driver, Settings, generate, new_sequence, prompt_of
from tests.worker.model.tiny_models import CONTEXT, build

_KIB = 2**10
FREE = 256 * _KIB
SETTINGS = Settings(max_running=5, max_batch_tokens=64, block_size=4, kv_cache_fraction=0.5)


@dataclass
class FakeMeter:
    """Runs a step and says what it took: `sizes` in turn."""

    sizes: list[int]
    steps: int = 0

    def __call__(self, run: Callable[[], None]) -> int:
        run()
        self.steps += 1
        return self.sizes[self.steps - 1]


@dataclass
class Record:
    """What a forward pass was given: tokens, greatest position, logits wanted."""

    seen: list[tuple[int, int, int]] = field(default_factory=list)

    def watch(self, monkeypatch: pytest.MonkeyPatch, kind: type[Any]) -> None:
        compute = kind.__call__

        def watched(forward: Any, batch: Batch, wanted: torch.Tensor) -> torch.Tensor:
            entry = (len(batch.input_ids), int(batch.positions.max()), len(wanted))
            self.seen.append(entry)
            logits: torch.Tensor = compute(forward, batch, wanted)
            return logits

        monkeypatch.setattr(kind, "__call__", watched)


@pytest.fixture(autouse=True)
def _little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inference_worker.model.cache_room.free_bytes", lambda _device: FREE)


@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama", FusedDecoder), ("gpt2, learned positions", TransformersForward)],
)
def test_the_largest_steps_are_run(
    family: str, kind: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Record()
    record.watch(monkeypatch, kind)
    model = build(family)
    meter = FakeMeter([10, 30 * _KIB, 20])
    runner = make_runner(model, CONTEXT, SETTINGS, meter)
    token_bytes = runner.cache.bytes_per_token
    # no sequence is longer than what the memory could hold
    length = min(CONTEXT, FREE // 2 // token_bytes)
    chunk, prompts, decode = record.seen[:3]
    assert chunk == (64, length - 1, 1)
    assert prompts == (64, 12, 5)  # 13 + 13 + 13 + 13 + 12
    assert decode == (5, length - 1, 5)
    assert meter.steps == 3
    assert runner.step_bytes == 30 * _KIB
    assert "0.0 MiB kept free for a step" in runner.description
    # the fraction is of what the largest step leaves
    assert runner.num_blocks == (FREE - 30 * _KIB) // 2 // (4 * token_bytes)


def test_what_was_run_leaves_no_trace() -> None:
    model = build("llama")
    expected = generate(model, prompt_of(9), 8)
    runner = make_runner(model, CONTEXT, SETTINGS, FakeMeter([0, 0, 0]))
    sequence = new_sequence(prompt_of(9))
    Driver(runner).run([sequence], 8)
    assert sequence.token_ids == expected


def test_nothing_is_kept_free_without_a_meter_or_with_a_given_size() -> None:
    runner = make_runner(build("llama"), CONTEXT, SETTINGS)
    assert runner.step_bytes == 0
    meter = FakeMeter([])
    given = Settings(max_running=5, block_size=4, kv_cache_mib=1)
    assert make_runner(build("llama"), CONTEXT, given, meter).step_bytes == 0
    assert meter.steps == 0


def test_a_step_too_large_for_the_device_is_said_and_served_in_smaller_ones(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def no_memory(run: Callable[[], None]) -> int:
        raise OutOfMemory("no memory")

    runner = make_runner(build("llama"), CONTEXT, SETTINGS, no_memory)
    assert runner.step_bytes == 0
    assert "lower --max-batch-tokens" in caplog.text
    sequence = new_sequence(prompt_of(9))
    Driver(runner).run([sequence], 3)
    assert sequence.num_completion_tokens == 3


def test_a_forward_pass_that_fails_is_measured_by_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object) -> torch.Tensor:
        raise TypeError

    monkeypatch.setattr(FusedDecoder, "__call__", broken)
    runner = make_runner(build("llama"), CONTEXT, SETTINGS, FakeMeter([7, 8, 9]))
    assert runner.step_bytes == 9
