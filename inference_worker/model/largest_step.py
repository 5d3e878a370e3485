"""What the largest step takes beside weights and KV cache, found out by running it before the cache is sized."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from typing import Protocol, cast

import torch

from inference_worker.engine.choice_output import ChoiceOutput
from inference_worker.engine.request import OutputParams, Request, SamplingParams, StoppingParams
from inference_worker.engine.runner import Row
from inference_worker.engine.sequence import Sequence
from inference_worker.model.runner import ModelRunner

# What makes drawing a token take the most memory.
_SAMPLING = SamplingParams(
    temperature=0.8, top_p=0.9, min_p=0.01, repetition_penalty=1.1, frequency_penalty=0.1
)
_OUTPUT = OutputParams(logprobs=20)


class Meter(Protocol):
    """Measures memory."""

    def __call__(self, run: Callable[[], None]) -> int:
        """Most bytes that are allocated at once while it runs, beyond those allocated before."""
        ...


class CudaMeter:
    """Counts what torch allocates on a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, run: Callable[[], None]) -> int:
        """See Meter."""
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        run()
        torch.cuda.synchronize(self._device)
        peak = torch.cuda.max_memory_allocated(self._device) - before
        torch.cuda.empty_cache()  # what a step leaves to torch is free for the cache, too
        return peak


def new_meter(device: torch.device) -> Meter | None:
    """None on a CPU, whose memory is everyone's and is not given out to the last byte."""
    return CudaMeter(device) if device.type == "cuda" else None


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of the largest steps."""

    batch_tokens: int  # of prefill
    rows: int  # of decode
    length: int  # tokens of each sequence, the step's included

    def __str__(self) -> str:
        return f"a step of {self.batch_tokens} tokens, or of {self.rows} sequences of {self.length}"

    def chunk(self) -> list[Row]:
        """The end of a long prompt."""
        return [_row(self.length, min(self.batch_tokens, self.length))]

    def prompts(self) -> list[Row]:
        """Short prompts, each of which draws a token."""
        return [_row(n, n) for n in _shares(self.batch_tokens, self.rows, self.length)]

    def decode(self) -> list[Row]:
        """One token for each of the most sequences."""
        return [_row(self.length, 1) for _ in range(self.rows)]


def measure(runner: ModelRunner, sizes: Sizes, meter: Meter) -> int:
    """Bytes that a step takes at most.

    All rows lie in the same few blocks of the runner's cache: what is computed means nothing, what it takes is what
    real rows take.

    Raises: OutOfMemory.
    """
    steps = (sizes.chunk(), sizes.prompts(), sizes.decode())
    return max(meter(partial(_run, runner, rows)) for rows in steps)


def _run(runner: ModelRunner, rows: list[Row]) -> None:
    num_blocks = runner.num_blocks
    for row in rows:
        count = -(-row.stop // runner.block_size)
        row.sequence.block_table[:] = islice(cycle(range(num_blocks)), count)
    runner.execute(rows)


def _row(length: int, num_tokens: int) -> Row:
    request = Request("largest step", (0,), StoppingParams(1), _SAMPLING, _OUTPUT)
    unused = cast(ChoiceOutput, None)
    sequence = Sequence(request, 0, unused, [0] * length, length + 1)
    sequence.num_computed_tokens = length - num_tokens
    return Row(sequence, num_tokens)


def _shares(tokens: int, rows: int, most: int) -> list[int]:
    """So many tokens for rows of about the same size."""
    rows = min(rows, tokens)
    return [min(most, tokens // rows + (row < tokens % rows)) for row in range(rows)]
