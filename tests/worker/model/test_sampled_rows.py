"""A row draws what it draws alone, whatever else is in the batch, and fails alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from inference_worker.engine.event import Token
from inference_worker.engine.request import OutputParams, SamplingParams
from inference_worker.model.sampler import BadLogits, SamplingFailed
from tests.worker.model.draws import (
    COMPLETION,
    LARGE,
    LARGE_KINDS,
    PARAMETERS,
    PROMPT,
    VOCABULARY,
    logits_of,
    one,
    sample,
    sequences_of,
    token_ids,
)
from tests.worker.model.driver import new_sequence

pytestmark = pytest.mark.usefixtures("scans")


def test_rows_of_a_large_vocabulary_draw_alone_as_in_a_batch() -> None:
    kinds = [*LARGE_KINDS.values(), {"temperature": 0.0}]
    sequences = [
        new_sequence(PROMPT, SamplingParams(seed=i, **kinds[i % len(kinds)])) for i in range(36)
    ]
    logits = logits_of(len(sequences), seed=6, vocabulary=LARGE)
    logits[::2] *= torch.linspace(0.2, 3.0, 18)[:, None]
    logits[1::4] = logits[1::4].round()  # ties
    logits[3::4, 20:] = -math.inf
    together = token_ids(sample(logits, sequences))
    assert together == [one(row, s).token_id for row, s in zip(logits, sequences, strict=True)]


def test_a_batch_of_different_rows_draws_as_each_alone() -> None:
    kinds = [*PARAMETERS.values(), {"temperature": 0.0}, {"temperature": 0.0, "top_k": 3}]
    sequences = [
        new_sequence(PROMPT, SamplingParams(seed=i, **fields), completion=COMPLETION[: i % 7])
        for i, fields in enumerate(kinds * 3)
    ]
    logits = logits_of(len(sequences), seed=3)
    together = token_ids(sample(logits, sequences))
    assert together == [one(row, s).token_id for row, s in zip(logits, sequences, strict=True)]


def test_rounded_logits_with_ties_draw_alike_alone_and_in_a_batch() -> None:
    kinds = [{"top_k": k} for k in (2, 5, 40)] + [{"top_p": p} for p in (0.2, 0.6, 0.9)]
    sequences = [
        new_sequence([1], SamplingParams(seed=i, **fields)) for i, fields in enumerate(kinds * 20)
    ]
    logits = logits_of(len(sequences), seed=4).round()
    together = token_ids(sample(logits, sequences))
    assert together == [one(row, s).token_id for row, s in zip(logits, sequences, strict=True)]


def test_swapped_near_ties_draw_the_same() -> None:
    logits = torch.full((1, 50), -30.0)
    logits[0, [7, 20, 33]] = torch.tensor([1.0, 1.0, 0.5])
    nudged = logits.clone()
    nudged[0, 20] = torch.nextafter(nudged[0, 20], torch.tensor(2.0))
    for fields in ({}, {"top_k": 3}, {"top_p": 0.999}):
        for seed in range(200):
            sequence = new_sequence([1], SamplingParams(seed=seed, **fields))
            assert one(logits[0], sequence) == one(nudged[0], sequence)


def test_greedy_takes_the_first_of_equal_logits() -> None:
    logits = torch.zeros(2, VOCABULARY)
    logits[:, [300, 41, 699]] = 2.0
    greedy = new_sequence([1], SamplingParams(temperature=0))
    assert token_ids(sample(logits, [greedy, greedy])) == [41, 41]
    mixed = [greedy, new_sequence([1], SamplingParams(temperature=1.0, top_k=1))]
    assert token_ids(sample(logits, mixed))[0] == 41


@pytest.mark.parametrize("bad", [math.nan, math.inf, "all forbidden"])
def test_bad_logits_fail_their_row_alone(bad: float | str) -> None:
    logits = logits_of(4)
    if isinstance(bad, str):
        logits[1] = -math.inf
    else:
        logits[1, 5] = bad
    for fields in (
        {"temperature": 0.0},
        {},
        {"top_p": 0.5},
        {"min_p": 0.1, "presence_penalty": 1.0},
    ):
        sequences = sequences_of(fields, 4)
        results = sample(logits, sequences)
        assert isinstance(results[1], BadLogits)
        healthy = [0, 2, 3]
        alone = [one(logits[i], sequences[i]) for i in healthy]
        assert [results[i] for i in healthy] == alone


def test_overflowing_parameters_fail_their_row_alone() -> None:
    logits = logits_of(3)
    greedy = SamplingParams(temperature=0)
    results = sample(
        logits,
        [
            new_sequence([1], greedy),
            new_sequence(list(range(700)), SamplingParams(repetition_penalty=1e-40)),
            new_sequence([1], SamplingParams()),
        ],
    )
    assert isinstance(results[1], SamplingFailed)
    assert isinstance(results[0], Token)
    assert isinstance(results[2], Token)


def test_an_exception_fails_its_row_alone() -> None:
    logits = logits_of(3)
    sequences = sequences_of({}, 3)
    sequences[1] = new_sequence([1], SamplingParams(logit_bias={700: 1.0}))
    results = sample(logits, sequences)
    assert isinstance(results[1], ValueError)
    assert results[0] == one(logits[0], sequences[0])
    assert results[2] == one(logits[2], sequences[2])


def test_logits_are_the_same_after_the_draw() -> None:
    sequences = sequences_of(PARAMETERS["everything"], 3)
    logits = logits_of(len(sequences))
    before = logits.clone()
    token_ids(sample(logits, sequences))
    assert logits.equal(before)


def test_logprobs_are_those_before_any_change() -> None:
    logits = logits_of(3)
    untouched = logits.clone()
    fields: dict[str, Any] = {
        "temperature": 0.5,
        "top_k": 5,
        "logit_bias": {9: 50.0},
        "presence_penalty": 2.0,
    }
    sequences = [
        new_sequence([1], SamplingParams(**fields), OutputParams(logprobs=k), completion=[2, 2])
        for k in (0, 4)
    ]
    results = sample(logits, [*sequences, new_sequence([1])])
    assert torch.equal(logits, untouched)
    expected = logits.log_softmax(-1)
    for i, count in enumerate((0, 4)):
        token = results[i]
        assert isinstance(token, Token)
        assert token.token_id == 9
        assert token.logprob == pytest.approx(float(expected[i, 9]), abs=1e-5)
        values, ids = expected[i].topk(count)
        assert [c.token_id for c in token.top] == ids.tolist()
        assert [c.logprob for c in token.top] == pytest.approx(values.tolist(), abs=1e-5)
    assert results[2] == Token(int(logits[2].argmax()))


def test_equal_candidates_are_ordered_by_token() -> None:
    logits = torch.zeros(1, VOCABULARY)
    logits[0, [600, 13, 77]] = 5.0
    greedy = SamplingParams(temperature=0)
    token = one(logits[0], new_sequence([1], greedy, OutputParams(logprobs=2)))
    assert token.token_id == 13
    assert [candidate.token_id for candidate in token.top] == [13, 77]


def test_more_candidates_than_tokens() -> None:
    sequence = new_sequence([1], SamplingParams(), OutputParams(logprobs=20))
    assert len(one(logits_of(1, vocabulary=6)[0], sequence).top) == 6
