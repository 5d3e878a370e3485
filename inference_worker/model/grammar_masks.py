"""Keeps the logits of rows that obey a grammar to the tokens that it allows."""

from __future__ import annotations

import math
from collections.abc import Sequence as Rows
from typing import Final

import numpy as np
import numpy.typing as npt
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
    packed = np.frombuffer(masks.bits, dtype=np.uint8).reshape(len(concerned), -1)
    where = upload(np.array(concerned), logits.device)
    # adding keeps NaN and makes plus infinity NaN, so that broken logits are found behind the mask, too
    restricted = logits.index_add(0, where, _penalties(packed, logits))
    return restricted, {concerned[i]: error for i, error in masks.failures.items()}


def _penalties(packed: npt.NDArray[np.uint8], logits: torch.Tensor) -> torch.Tensor:
    """Minus infinity where the mask's bit is not set, else 0: [rows, vocabulary] like the logits."""
    vocabulary = logits.shape[1]
    packed = packed[:, : -(-vocabulary // 8)]
    if logits.device.type == "cpu":  # in one pass, several times as fast as by way of booleans
        table = _PENALTIES.take(packed, axis=0).reshape(len(packed), -1)
        return torch.from_numpy(table[:, :vocabulary]).to(logits.dtype)
    return penalties_on_device(packed, logits)


def penalties_on_device(packed: npt.NDArray[np.uint8], logits: torch.Tensor) -> torch.Tensor:
    """The same of the bytes that hold the vocabulary's bits, where the logits are: an eighth of the bytes travels."""
    bits = torch.arange(8, dtype=torch.uint8, device=logits.device)
    shifted = upload(~packed, logits.device)[:, :, None] >> bits
    forbidden = (shifted & 1).bool().flatten(1)[:, : logits.shape[1]]
    return logits.new_zeros(forbidden.shape).masked_fill_(forbidden, -math.inf)


def _penalties_of_bytes() -> npt.NDArray[np.float32]:
    """Of each byte of a mask [256, 8]."""
    is_allowed = np.unpackbits(
        np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"
    ).astype(np.bool_)
    return np.where(is_allowed, 0, -np.inf).astype(np.float32)


_PENALTIES: Final = _penalties_of_bytes()
