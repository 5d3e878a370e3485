"""Changes to the logits before a token is drawn: bias and penalties."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Rows

import numpy as np
import numpy.typing as npt
import torch

from inference_worker.engine.request import SamplingParams
from inference_worker.engine.sequence import Sequence
from inference_worker.model.transfer import upload


def changes_logits(params: SamplingParams) -> bool:
    """Whether any of this module applies."""
    return bool(params.logit_bias) or params.has_penalties


def adjust(logits: torch.Tensor, rows: Rows[Sequence]) -> torch.Tensor:
    """Logits [rows, vocabulary] with each row's bias, then its repetition, presence and frequency penalties.

    The input is left as it is. The repetition penalty (Keskar et al., CTRL, arXiv 1909.05858, in transformers' form)
    divides positive and multiplies negative logits of every token of prompt and completion. Presence and frequency
    penalties (OpenAI API reference) subtract `presence + frequency * count` for tokens of the completion.

    Raises: ValueError for a biased token outside the vocabulary.
    """
    adjusted = logits.clone()
    flat = adjusted.view(-1)
    _add_bias(flat, logits.shape[1], rows)
    _penalise_repetition(flat, logits.shape[1], rows)
    _penalise_frequency(flat, logits.shape[1], rows)
    return adjusted


def _add_bias(flat: torch.Tensor, vocabulary: int, rows: Rows[Sequence]) -> None:
    index: list[int] = []
    bias: list[float] = []
    for row, sequence in enumerate(rows):
        for token_id, value in sequence.request.sampling.logit_bias.items():
            if not 0 <= token_id < vocabulary:
                raise ValueError(f"logit_bias: no token {token_id} in a vocabulary of {vocabulary}")
            index.append(row * vocabulary + token_id)
            bias.append(value)
    if index:
        where = upload(np.array(index), flat.device)
        flat[where] += upload(np.array(bias, dtype=np.float32), flat.device)


def _penalise_repetition(flat: torch.Tensor, vocabulary: int, rows: Rows[Sequence]) -> None:
    penalty = np.array([s.request.sampling.repetition_penalty for s in rows])
    index, _ = _tokens(rows, penalty != 1, vocabulary, lambda s: s.token_ids)
    if not len(index):
        return
    where = upload(index, flat.device)
    by = upload(penalty[index // vocabulary], flat.device).to(flat.dtype)
    values = flat[where]
    flat[where] = torch.where(values > 0, values / by, values * by)


def _penalise_frequency(flat: torch.Tensor, vocabulary: int, rows: Rows[Sequence]) -> None:
    presence = np.array([s.request.sampling.presence_penalty for s in rows])
    frequency = np.array([s.request.sampling.frequency_penalty for s in rows])
    index, counts = _tokens(
        rows,
        (presence != 0) | (frequency != 0),
        vocabulary,
        lambda s: s.token_ids[s.num_prompt_tokens :],
    )
    if not len(index):
        return
    row = index // vocabulary
    amount = presence[row] + frequency[row] * counts
    where = upload(index, flat.device)
    flat[where] -= upload(amount, flat.device).to(flat.dtype)


def _tokens(
    rows: Rows[Sequence],
    concerned: npt.NDArray[np.bool_],
    vocabulary: int,
    token_ids: Callable[[Sequence], list[int]],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The distinct tokens of the concerned rows as flat indices [n] into the logits, and how often each occurs [n]."""
    parts = [np.empty(0, dtype=np.int64)]
    for row in np.flatnonzero(concerned).tolist():
        ids = np.array(token_ids(rows[row]), dtype=np.int64)
        # an embedding may have more rows than the head has columns
        parts.append(ids[ids < vocabulary] + row * vocabulary)
    index, counts = np.unique(np.concatenate(parts), return_counts=True)
    return index, counts
