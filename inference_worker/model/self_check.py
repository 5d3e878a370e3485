"""Compares the paged forward pass with the model's own before anything is served."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from inference_worker.model.batch import Span
from inference_worker.model.errors import UnsupportedModel
from inference_worker.model.runner import ModelRunner

# Tokens of a check; more where a window is short enough for the check to reach past it.
_LENGTH, _PAST_WINDOW, _LONGEST = 40, 16, 1024
_NUM_DECODED = 3
# Largest relative difference of logits. Half precision rounds at every layer, in another order on each path; what an
# attention that does something else gives differs by far more.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}


@dataclass(frozen=True, slots=True)
class Sample:
    """One checked sequence and the steps that its tokens are computed in."""

    token_ids: list[int]
    block_table: list[int]
    ends: list[int]  # of the steps, ascending

    def span(self, step: int) -> Span | None:
        if step < 0 or step >= len(self.ends):
            return None
        start = self.ends[step - 1] if step else 0
        return Span(self.token_ids, start, self.ends[step], self.block_table)


def reference_logits(model: PreTrainedModel, samples: list[Sample]) -> list[torch.Tensor]:
    """The model's own logits [tokens, vocabulary] of each sample, with its plain attention."""
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        return [
            model(
                input_ids=torch.tensor([sample.token_ids], device=model.device), use_cache=False
            ).logits[0]
            for sample in samples
        ]


def make_samples(
    *,
    vocabulary_size: int,
    windows: list[int],
    context_length: int,
    num_blocks: int,
    block_size: int,
) -> list[Sample]:
    """Two pseudo-random sequences of different lengths in blocks that are not in order.

    The first reaches past every window that is short enough.
    """
    near = [window + _PAST_WINDOW for window in windows if window + _PAST_WINDOW <= _LONGEST]
    room = min(context_length, num_blocks // 2 * block_size)
    longest = min(max([_LENGTH, *near]), room)
    samples = []
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randperm(num_blocks, generator=generator).tolist()
    for length in (longest, max(1, longest - 5)):
        token_ids = torch.randint(vocabulary_size, (length,), generator=generator).tolist()
        num_mine = -(-length // block_size)
        mine, blocks = blocks[:num_mine], blocks[num_mine:]
        decoded = min(_NUM_DECODED, length - 1)
        prefilled = length - decoded
        ends = sorted({max(1, prefilled // 2), *range(prefilled, length + 1)})
        samples.append(Sample(token_ids, mine, ends))
    return samples


def check(runner: ModelRunner, samples: list[Sample], references: list[torch.Tensor]) -> None:
    """Run the samples through the runner, one step behind each other, and compare every token's logits.

    Their steps are two prefill chunks and some single tokens, so that a step has decode rows of different lengths, or
    decode rows and a chunk.

    Raises: UnsupportedModel if they differ by more than the dtype explains.
    """
    tolerance = _TOLERANCE.get(runner.cache.dtype, 0.1)
    for running in _steps(samples):
        num_tokens = sum(span.stop - span.start for _, span in running)
        logits = runner.logits([span for _, span in running], range(num_tokens))
        expected = torch.cat([references[i][span.start : span.stop] for i, span in running])
        _compare(logits, expected, tolerance)


def check_steady(runner: ModelRunner, samples: list[Sample]) -> None:
    """Check that a token's logits are the same to the last bit alone in one step, and in steps of any other kind.

    Raises: UnsupportedModel.
    """
    alone = [
        runner.logits(
            [Span(x.token_ids, 0, len(x.token_ids), x.block_table)], range(len(x.token_ids))
        )
        for x in samples
    ]
    for running in _steps(samples):
        num_tokens = sum(span.stop - span.start for _, span in running)
        logits = runner.logits([span for _, span in running], range(num_tokens))
        expected = torch.cat([alone[i][span.start : span.stop] for i, span in running])
        if not torch.equal(logits, expected):
            raise UnsupportedModel(
                "its logits depend on what is computed beside them, in experts perhaps; "
                "it cannot be served with --deterministic"
            )


def _steps(samples: list[Sample]) -> Iterator[list[tuple[int, Span]]]:
    """The samples' steps, one sample a step behind the other: (index of the sample, span), decode rows first."""
    for step in range(max(len(sample.ends) for sample in samples) + len(samples)):
        running = [
            (i, span)
            for i, sample in enumerate(samples)
            if (span := sample.span(step - i)) is not None
        ]
        running.sort(key=lambda pair: not pair[1].is_decode)
        if running:
            yield running


def _compare(logits: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Compare logits [tokens, vocabulary]; the median token decides in half precision, any token in full."""
    logits, expected = logits.float(), expected.float()
    if not bool(expected.isfinite().any(1).all()) or bool(expected.isnan().any()):
        raise UnsupportedModel(
            "its own forward pass gives logits that are not finite; try another dtype"
        )
    differences = _difference(logits, expected)
    worst = float(differences.max() if tolerance < 0.01 else differences.median())
    if not worst <= tolerance:
        raise UnsupportedModel(
            f"its logits with paged attention differ from its own by {worst:.2g} of their size "
            f"({tolerance:.2g} is allowed); it would be served wrongly"
        )


def _difference(logits: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Euclidean distance relative to the expected logits' spread, by token [tokens]."""
    is_finite = expected.isfinite()  # some models forbid unused tokens with minus infinity
    expected = expected.where(is_finite, 0)
    logits = logits.where(is_finite, 0)
    spread = (expected - expected.mean(1, keepdim=True)).norm(dim=1)
    distance: torch.Tensor = (logits - expected).norm(dim=1)
    relative: torch.Tensor = distance / spread.clamp_min(1e-6)
    return relative
