"""Log-probabilities of tokens under the model's own distribution."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np
import torch

from inference_worker.engine.event import Candidate, Token
from inference_worker.model.transfer import Download, upload

# Rows scored at once: the logits of a long prompt are large, and so are temporaries of their size.
_ROWS_AT_ONCE = 128
# Further candidates looked at, so that equal ones at the end of the list are told apart by token id.
_SLACK = 8


def score(logits: torch.Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[Token]:
    """Each row's token with its log-probability and the `num_top` likeliest candidates; see `Scores`."""
    ids = upload(np.array(token_ids, dtype=np.int64), logits.device)
    return Scores(logits, ids, num_top).read(token_ids)


class Scores:
    """Log-probabilities of one token a row, and of the `num_top` likeliest candidates, on their way to the host.

    `logits` [rows, vocabulary] of any float type; the log-probability is the natural logarithm of the softmax, in
    float32. Candidates are ordered by probability, equal ones by token id.
    """

    def __init__(
        self,
        logits: torch.Tensor,
        token_ids: torch.Tensor,
        num_top: Sequence[int],
        rows_at_once: int = _ROWS_AT_ONCE,
    ) -> None:
        """`token_ids` is [rows]. Nothing waits for the device."""
        self._num_top = num_top
        self._parts = [
            _Part(logits[rows], token_ids[rows], max(num_top[rows]))
            for rows in (
                slice(first, first + rows_at_once) for first in range(0, len(num_top), rows_at_once)
            )
        ]

    @classmethod
    def one_by_one(
        cls, logits: torch.Tensor, token_ids: torch.Tensor, num_top: Sequence[int]
    ) -> Scores:
        """The same, where a sum's rounding must not depend on what else is scored."""
        return cls(logits, token_ids, num_top, rows_at_once=1)

    def read(self, token_ids: Sequence[int]) -> list[Token]:
        """The rows' tokens, whose ids the caller has read."""
        rows = chain.from_iterable(part.read() for part in self._parts)
        return [
            Token(token_id, logprob, _candidates(top_ids, top_logprobs, k))
            for token_id, k, (logprob, top_ids, top_logprobs) in zip(
                token_ids, self._num_top, rows, strict=True
            )
        ]


class _Part:
    """Rows that are scored at once."""

    def __init__(self, logits: torch.Tensor, token_ids: torch.Tensor, most: int) -> None:
        logits = logits.float()
        normaliser = logits.logsumexp(1, keepdim=True)
        self._logprobs = Download((logits.gather(1, token_ids[:, None]) - normaliser)[:, 0])
        self._top: tuple[Download, Download] | None = None
        if most:
            values, ids = logits.topk(min(logits.shape[1], most + _SLACK))
            self._top = Download(ids), Download(values - normaliser)

    def read(self) -> Iterator[tuple[float, list[int], list[float]]]:
        """Log-probability, and the likeliest tokens with theirs, of each row."""
        logprobs: list[float] = self._logprobs.tolist()
        if self._top is None:
            return ((logprob, [], []) for logprob in logprobs)
        ids, values = (download.tolist() for download in self._top)
        return zip(logprobs, ids, values, strict=True)


def _candidates(ids: list[int], logprobs: list[float], count: int) -> tuple[Candidate, ...]:
    ranked = sorted(zip(ids, logprobs, strict=True), key=lambda pair: (-pair[1], pair[0]))
    return tuple(Candidate(token_id, logprob) for token_id, logprob in ranked[:count])
