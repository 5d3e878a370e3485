"""Runs the engine's steps on a model."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch

from inference_worker.engine.event import Token
from inference_worker.engine.runner import (
    DeviceLost,
    OutOfMemory,
    Row,
    RowOutput,
    SynchronousRunner,
)
from inference_worker.model.batch import Batch, Span, pack
from inference_worker.model.forward import Forward
from inference_worker.model.kv_cache import KVCache
from inference_worker.model.sampler import BadLogits, greatest, sample
from inference_worker.model.scores import score


class ModelRunner(SynchronousRunner):
    """A forward pass, the KV cache it writes to, and sampling: the engine's `Runner`."""

    def __init__(self, forward: Forward, cache: KVCache) -> None:
        self._forward: Forward | None = forward
        self._cache: KVCache | None = cache
        self.num_blocks = cache.num_blocks
        self.block_size = cache.block_size

    @property
    def cache(self) -> KVCache:
        """The KV cache. Raises: RuntimeError once closed."""
        if self._cache is None:
            raise RuntimeError("the runner is closed")
        return self._cache

    @property
    def description(self) -> str:
        """One line about the memory taken, for the start of the log."""
        return str(self.cache)

    @torch.inference_mode()
    def execute(self, rows: Rows[Row]) -> list[RowOutput]:
        """See Runner."""
        try:
            return self._execute(rows)
        except (
            torch.AcceleratorError
        ) as error:  # such as a CUDA error, after which every call fails
            raise DeviceLost(str(error)) from error
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise OutOfMemory(str(error)) from error
            raise

    @torch.inference_mode()
    def logits(self, spans: Rows[Span], wanted: Rows[int]) -> torch.Tensor:
        """Run the spans and give the logits [wanted, vocabulary] of the packed tokens at indices `wanted`."""
        logits, _batch = self._run(spans, wanted)
        return logits

    def close(self) -> None:
        """See Runner."""
        self._forward = self._cache = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _run(self, spans: Rows[Span], wanted: Rows[int]) -> tuple[torch.Tensor, Batch]:
        batch = pack(spans, self.cache)
        assert self._forward is not None  # noqa: S101 - the cache is there, so this is
        return self._forward(batch, torch.tensor(wanted, device=batch.slots.device)), batch

    def _execute(self, rows: Rows[Row]) -> list[RowOutput]:
        spans = [_span(row) for row in rows]
        # Of every row the last token's logits are looked at, also of a chunk that ends inside a prompt: whatever goes
        # wrong in a row shows there, before its keys and values can be shared or its blocks given to someone else.
        ends = _ends(spans)
        prompts = [_scored_positions(row) for row in rows]
        wanted = [end - 1 for end in ends]
        for end, row, scored in zip(ends, rows, prompts, strict=True):
            wanted.extend(range(end - row.stop + scored.start, end - row.stop + scored.stop))
        logits, batch = self._run(spans, wanted)
        outcomes = _draw(logits[: len(rows)], rows)
        scored_tokens = _score_prompts(logits[len(rows) :], rows, prompts)
        for i, outcome in enumerate(outcomes):
            if isinstance(outcome, BadLogits):
                self.cache.clear(batch.slots[ends[i] - rows[i].num_tokens : ends[i]])
        return [
            RowOutput(error=outcome)
            if isinstance(outcome, Exception)
            else RowOutput(token=outcome, prompt_logprobs=prompt)
            for outcome, prompt in zip(outcomes, scored_tokens, strict=True)
        ]


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch could not allocate; on a CPU only the message tells."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _span(row: Row) -> Span:
    sequence = row.sequence
    return Span(sequence.token_ids, row.start, row.stop, sequence.block_table)


def _ends(spans: Rows[Span]) -> list[int]:
    """Index after the last packed token of each span."""
    ends: list[int] = []
    total = 0
    for span in spans:
        total += span.stop - span.start
        ends.append(total)
    return ends


def _scored_positions(row: Row) -> range:
    """Positions of this row whose logits score the prompt token after them."""
    if not row.sequence.request.output.prompt_logprobs:
        return range(row.start, row.start)
    return range(row.start, max(row.start, min(row.stop, row.sequence.num_prompt_tokens - 1)))


def _draw(logits: torch.Tensor, rows: Rows[Row]) -> list[Token | Exception | None]:
    """The outcome of each row: a token if it is whole, an error, or None."""
    whole = [i for i, row in enumerate(rows) if row.is_whole]
    outcomes: list[Token | Exception | None] = [None] * len(rows)
    chosen = logits if len(whole) == len(rows) else logits[whole]
    if whole:
        drawn = sample(chosen.float(), [rows[i].sequence for i in whole])
        for i, outcome in zip(whole, drawn, strict=True):
            outcomes[i] = outcome
    if len(whole) < len(rows):
        peaks = logits.gather(1, greatest(logits.float())[:, None])[:, 0]
        for i, is_sound in enumerate(peaks.isfinite().tolist()):
            if not is_sound and not rows[i].is_whole:
                outcomes[i] = BadLogits("the model gave logits that are not finite")
    return outcomes


def _score_prompts(
    logits: torch.Tensor, rows: Rows[Row], prompts: Rows[range]
) -> list[tuple[Token, ...]]:
    """Scored prompt tokens of each row; `logits` holds the scoring positions of all rows, one after the other."""
    token_ids: list[int] = []
    num_top: list[int] = []
    for row, scored in zip(rows, prompts, strict=True):
        token_ids += row.sequence.token_ids[scored.start + 1 : scored.stop + 1]
        num_top += [row.sequence.request.output.logprobs or 0] * len(scored)
    if not token_ids:
        return [()] * len(rows)
    tokens = iter(score(logits, token_ids, num_top))
    return [tuple(next(tokens) for _ in scored) for scored in prompts]
