"""Keeps the logits of rows that obey a grammar to the tokens that it allows."""

from __future__ import annotations

import math
from collections.abc import Sequence as Rows

import numpy as np
import torch

from inference_worker.engine.sequence import Sequence
from inference_worker.model.transfer import upload


def restrict(
    logits: torch.Tensor, rows: Rows[Sequence]
) -> tuple[torch.Tensor, dict[int, Exception]]:
    """Logits [rows, vocabulary] without what a row's grammar forbids, and the rows whose grammar failed.

    Forbidden ones are minus infinity. The input is left as it is, and is what comes back if no row has a grammar. A
    logit that is no number stays none.
    """
    concerned = [i for i, row in enumerate(rows) if row.grammar is not None]
    if not concerned:
        return logits, {}
    states = [state for row in rows if (state := row.grammar) is not None]
    grammar = rows[concerned[0]].request.grammar
    assert grammar is not None  # noqa: S101 - its state is there
    masks = grammar.masks(states)
    forbidden = _forbidden(masks.bits, len(concerned), logits.shape[1], logits.device)
    # adding keeps NaN and makes plus infinity NaN, so that broken logits are found behind the mask, too
    restricted = logits.clone()
    where = upload(np.array(concerned), logits.device)
    restricted[where] += logits.new_zeros(forbidden.shape).masked_fill_(forbidden, -math.inf)
    return restricted, {concerned[i]: error for i, error in masks.failures.items()}


def _forbidden(bits: bytes, rows: int, vocabulary: int, device: torch.device) -> torch.Tensor:
    """Whether each token is forbidden, [rows, vocabulary]."""
    packed = np.frombuffer(bits, dtype=np.uint8).reshape(rows, -1)
    packed = ~packed[:, : -(-vocabulary // 8)]
    if device.type == "cpu":  # several times as fast as torch's shifts
        flags = np.unpackbits(packed, axis=1, count=vocabulary, bitorder="little")
        return torch.from_numpy(flags.view(np.bool_))
    # the packed form travels: an eighth of the bytes
    shifted = upload(packed, device)[:, :, None] >> torch.arange(
        8, dtype=torch.uint8, device=device
    )
    return (shifted & 1).bool().flatten(1)[:, :vocabulary]
