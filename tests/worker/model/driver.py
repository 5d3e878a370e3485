"""A minimal scheduler: runs sequences on a runner in chunks and batches of chosen sizes."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import cast

import torch
from transformers import PreTrainedModel

from inference_worker.engine.choice_output import ChoiceOutput
from inference_worker.engine.event import Token
from inference_worker.engine.request import OutputParams, Request, SamplingParams, StoppingParams
from inference_worker.engine.runner import Row, RowOutput
from inference_worker.engine.sequence import Sequence
from inference_worker.model.loader import make_runner
from inference_worker.model.runner import ModelRunner
from tests.worker.model.tiny_models import CONTEXT

GREEDY = SamplingParams(temperature=0)


@dataclass(frozen=True)
class Settings:
    """The settings of a loader in tests."""

    model: str = "unused"
    served_name: str = "tiny"
    dtype: str = "auto"
    device: str = "cpu"
    threads: int | None = None
    native: bool = False
    context_length: int | None = None
    max_running: int = 8
    max_batch_tokens: int = 64
    block_size: int = 4
    deterministic: bool = False
    kv_cache_mib: int | None = None
    kv_cache_fraction: float = 0.5
    log_level: str = "info"


def new_runner(
    model: PreTrainedModel,
    block_size: int = 4,
    *,
    deterministic: bool = False,
    native: bool = False,
) -> ModelRunner:
    """A runner that passed its own check."""
    settings = Settings(block_size=block_size, deterministic=deterministic, native=native)
    return make_runner(model, CONTEXT, settings)


def new_sequence(
    prompt: Rows[int],
    sampling: SamplingParams = GREEDY,
    output: OutputParams | None = None,
    completion: Rows[int] = (),
    choice_index: int = 0,
) -> Sequence:
    """A sequence whose output is never looked at."""
    request = Request(
        "request", tuple(prompt), StoppingParams(1), sampling, output or OutputParams()
    )
    unused = cast(ChoiceOutput, None)
    return Sequence(request, choice_index, unused, [*prompt, *completion], CONTEXT)


def prompt_of(length: int, seed: int = 0, vocabulary: int = 199) -> list[int]:
    """Pseudo-random tokens."""
    generator = torch.Generator().manual_seed(1000 * length + seed)
    return torch.randint(vocabulary, (length,), generator=generator).tolist()


class Driver:
    """Runs sequences together until each has its tokens."""

    def __init__(self, runner: ModelRunner, max_chunk: int = 1000, budget: int = 1000) -> None:
        self.runner = runner
        self.max_chunk = max_chunk  # prompt tokens of one sequence in a step
        self.budget = budget  # tokens of a step
        # high ids first and never in order, so that a mistaken block shows
        self.free = [i for i in range(runner.num_blocks) if i % 2] + [
            i for i in range(runner.num_blocks) if i % 2 == 0
        ]

    def reserve(self, sequence: Sequence, upto: int) -> None:
        while len(sequence.block_table) * self.runner.block_size < upto:
            sequence.block_table.append(self.free.pop())

    def release(self, sequence: Sequence) -> None:
        """Preempt: the blocks go back and everything is computed again."""
        self.free = [*sequence.block_table, *self.free]
        sequence.block_table.clear()
        sequence.num_computed_tokens = 0

    def step(self, sequences: Rows[Sequence]) -> list[tuple[Sequence, RowOutput]]:
        """One step over the sequences, within the budget; drawn tokens are appended."""
        rows: list[Row] = []
        budget = self.budget
        for sequence in sequences:
            count = min(self.max_chunk, budget, sequence.num_uncomputed_tokens)
            if count:
                self.reserve(sequence, sequence.num_computed_tokens + count)
                rows.append(Row(sequence, count))
                budget -= count
        rows.sort(key=lambda row: row.num_tokens > 1 or row.start == 0)
        outputs = self.runner.execute(rows)
        for row, output in zip(rows, outputs, strict=True):
            if output.error is None:
                row.sequence.num_computed_tokens += row.num_tokens
            if output.token is not None:
                row.sequence.token_ids.append(output.token.token_id)
        return [(row.sequence, output) for row, output in zip(rows, outputs, strict=True)]

    def run(self, sequences: Rows[Sequence], num_tokens: int) -> dict[Sequence, list[Token]]:
        """Step until every sequence has `num_tokens` drawn tokens; what was drawn."""
        drawn: dict[Sequence, list[Token]] = {sequence: [] for sequence in sequences}
        while left := [s for s in sequences if s.num_completion_tokens < num_tokens]:
            for sequence, output in self.step(left):
                if output.error is not None:
                    raise output.error
                if output.token is not None:
                    drawn[sequence].append(output.token)
        return drawn


def generate(model: PreTrainedModel, prompt: Rows[int], num_tokens: int) -> list[int]:
    """Prompt and greedy completion by transformers itself, with its plain attention."""
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        ids = model.generate(  # type: ignore[operator]
            torch.tensor([prompt], device=model.device),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=model.device),
            max_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
        )
    result: list[int] = ids[0].tolist()
    return result
