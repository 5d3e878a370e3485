"""A forward pass whose result for a token does not depend, not by a bit, on what else is computed with it.

Products of matrices round differently for different numbers of rows, and attention for different numbers of keys. So
the tokens of a step, of prefill and decode alike, go through the model in passes of exactly `ROWS`. Every operation
then has the same shape in every pass, and treats a row alike wherever it stands; attention is that of `row_attention`.
Whether this suffices is up to the libraries underneath: `self_check.check_steady` tries it on the model and machine at
hand.
"""

from __future__ import annotations

import torch

from inference_worker.model.batch import Batch, TokenRows
from inference_worker.model.forward import Forward
from inference_worker.model.native.decoder import NativeDecoder

# Few rows waste little where few sequences run, many cost little each. Eight rows of a 1024 x 4096 product were seen to
# take 3 times as long as one in float32 and 1.6 times in bfloat16, 32 rows 6 and 3 times.
ROWS = 8


def steady(forward: Forward) -> Forward:
    """The same forward pass without that dependence; one that has none is left as it is."""
    return forward if isinstance(forward, NativeDecoder) else FixedPasses(forward)


class FixedPasses:
    """Runs a decoder in passes of `ROWS` tokens: a `Forward`."""

    def __init__(self, forward: Forward) -> None:
        self._forward = forward

    def __call__(self, batch: Batch, wanted: torch.Tensor) -> torch.Tensor:
        """See Forward."""
        num_tokens = len(batch.input_ids)
        tables = batch.block_tables()
        everything = torch.arange(ROWS, device=wanted.device)
        which: list[int] = wanted.tolist()
        needed = {index // ROWS for index in which}
        logits: dict[int, torch.Tensor] = {}
        for number, first in enumerate(range(0, num_tokens, ROWS)):
            part = _part(batch, tables, first)
            if number in needed:
                logits[number] = self._forward(part, everything)
            else:  # a head's product of another shape, of which nothing is used
                self._forward(part, everything[:1])
        return torch.stack([logits[index // ROWS][index % ROWS] for index in which])


def _part(batch: Batch, tables: torch.Tensor, first: int) -> Batch:
    """`ROWS` tokens from `first` on. Where there are fewer, the last is computed again, alike, to the same place."""
    last = len(batch.input_ids) - 1
    rows = torch.arange(first, first + ROWS, device=tables.device).clamp_max_(last)
    positions = batch.positions[rows]
    return Batch(
        cache=batch.cache,
        input_ids=batch.input_ids[rows],
        positions=positions,
        slots=batch.slots[rows],
        decode=[],
        chunks=[],
        rows=TokenRows(batch.cache, positions, tables[rows]),
    )
