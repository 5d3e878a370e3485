"""Log-probabilities of tokens under the model's own distribution."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from inference_worker.engine.event import Candidate, Token

# Rows scored at once: the logits of a long prompt are large, and so are temporaries of their size.
_ROWS_AT_ONCE = 128
# Further candidates looked at, so that equal ones at the end of the list are told apart by token id.
_SLACK = 8


def score(logits: torch.Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[Token]:
    """Each row's token with its log-probability and the `num_top` likeliest candidates.

    `logits` [rows, vocabulary] of any float type; the log-probability is the natural logarithm of the softmax, in
    float32. Candidates are ordered by probability, equal ones by token id.
    """
    tokens: list[Token] = []
    for first in range(0, len(token_ids), _ROWS_AT_ONCE):
        rows = slice(first, first + _ROWS_AT_ONCE)
        tokens += _score(logits[rows].float(), token_ids[rows], num_top[rows])
    return tokens


def _score(logits: torch.Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[Token]:
    normaliser = logits.logsumexp(1, keepdim=True)
    drawn = torch.tensor(token_ids, device=logits.device)[:, None]
    logprobs: list[float] = (logits.gather(1, drawn) - normaliser)[:, 0].tolist()
    most = max(num_top)
    if most == 0:
        return [Token(i, x) for i, x in zip(token_ids, logprobs, strict=True)]
    values, ids = logits.topk(min(logits.shape[1], most + _SLACK))
    top_logprobs: list[list[float]] = (values - normaliser).tolist()
    top_ids: list[list[int]] = ids.tolist()
    return [
        Token(token_id, logprob, _candidates(row_ids, row_logprobs, k))
        for token_id, logprob, row_ids, row_logprobs, k in zip(
            token_ids, logprobs, top_ids, top_logprobs, num_top, strict=True
        )
    ]


def _candidates(ids: list[int], logprobs: list[float], count: int) -> tuple[Candidate, ...]:
    ranked = sorted(zip(ids, logprobs, strict=True), key=lambda pair: (-pair[1], pair[0]))
    return tuple(Candidate(token_id, logprob) for token_id, logprob in ranked[:count])
