"""Changes to the logits before a token is drawn: bias and penalties."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Rows
from contextlib import contextmanager
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch

from inference_worker.engine.request import SamplingParams
from inference_worker.engine.sequence import Sequence
from inference_worker.model.transfer import upload

Integers = npt.NDArray[np.int64]


def changes_logits(params: SamplingParams) -> bool:
    """Whether any of this module applies."""
    return bool(params.logit_bias) or params.has_penalties


@contextmanager
def adjusted(logits: torch.Tensor, rows: Rows[Sequence]) -> Iterator[torch.Tensor]:
    """Logits [rows, vocabulary] with each row's bias, then its repetition, presence and frequency penalties.

    Inside the context alone: the few logits that change do so in place, for a copy of all costs more than the draw's
    other work, and they are put back at its end. The repetition penalty (Keskar et al., CTRL, arXiv 1909.05858, in
    transformers' form) divides positive and multiplies negative logits of every token of prompt and completion.
    Presence and frequency penalties (OpenAI API reference) subtract `presence + frequency * count` for tokens of the
    completion.

    Raises: ValueError for a biased token outside the vocabulary.
    """
    if not any(changes_logits(row.request.sampling) for row in rows):
        yield logits
        return
    changes = _Changes(logits.contiguous())
    try:
        _add_bias(changes, rows)
        _penalise_repetition(changes, rows)
        _penalise_frequency(changes, rows)
        yield changes.logits
    finally:
        changes.undo()


class _Changes:
    """Changes of single logits, by flat index, that can be undone."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits
        self._flat = logits.view(-1)
        self._before: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def vocabulary(self) -> int:
        return self.logits.shape[1]

    def apply(
        self,
        index: Integers,
        amounts: npt.NDArray[np.float64],
        change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> None:
        """Set the logits at `index` [n] to what `change` makes of them and the amounts [n].

        An index may occur twice if its amount is the same: both are made of the value before.
        """
        if not len(index):
            return
        where = upload(index, self._flat.device)
        values = self._flat[where]
        self._before.append((where, values))
        by = upload(amounts.astype(np.float32), self._flat.device)
        self._flat[where] = change(values, by)

    def undo(self) -> None:
        """Put the values before all changes back, to the bit."""
        for where, values in reversed(self._before):
            self._flat[where] = values


def _add_bias(changes: _Changes, rows: Rows[Sequence]) -> None:
    index: list[int] = []
    bias: list[float] = []
    vocabulary = changes.vocabulary
    for row, sequence in enumerate(rows):
        for token_id, value in sequence.request.sampling.logit_bias.items():
            if not 0 <= token_id < vocabulary:
                raise ValueError(f"logit_bias: no token {token_id} in a vocabulary of {vocabulary}")
            index.append(row * vocabulary + token_id)
            bias.append(value)
    changes.apply(np.array(index, dtype=np.int64), np.array(bias), torch.add)


def _penalise_repetition(changes: _Changes, rows: Rows[Sequence]) -> None:
    penalty = np.array([s.request.sampling.repetition_penalty for s in rows])
    row, token_id = _tokens(rows, penalty != 1, changes.vocabulary, lambda s: s.token_ids)
    changes.apply(row * changes.vocabulary + token_id, penalty[row], _divide_or_multiply)


def _divide_or_multiply(values: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    return torch.where(values > 0, values / by, values * by)


def _penalise_frequency(changes: _Changes, rows: Rows[Sequence]) -> None:
    presence = np.array([s.request.sampling.presence_penalty for s in rows])
    frequency = np.array([s.request.sampling.frequency_penalty for s in rows])
    row, token_id = _tokens(
        rows,
        (presence != 0) | (frequency != 0),
        changes.vocabulary,
        lambda s: s.token_ids[s.num_prompt_tokens :],
    )
    if not len(row):
        return
    index, counts = np.unique(row * changes.vocabulary + token_id, return_counts=True)
    row = index // changes.vocabulary
    changes.apply(index, presence[row] + frequency[row] * counts, torch.sub)


def _tokens(
    rows: Rows[Sequence],
    concerned: npt.NDArray[np.bool_],
    vocabulary: int,
    token_ids: Callable[[Sequence], list[int]],
) -> tuple[Integers, Integers]:
    """The tokens of the concerned rows, as often as they occur: rows [n] and token ids [n]."""
    if not concerned.any():
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    numbers = np.flatnonzero(concerned)
    lists = [token_ids(rows[number]) for number in numbers.tolist()]
    row = np.repeat(numbers, [len(ids) for ids in lists])
    ids = np.fromiter(chain.from_iterable(lists), dtype=np.int64, count=len(row))
    inside = ids < vocabulary  # an embedding may have more rows than the head has columns
    return row[inside], ids[inside]
