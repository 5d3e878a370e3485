"""Drawing tokens, against a naive implementation of the same formulas and that of transformers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from inference_worker.engine.request import SamplingParams
from inference_worker.model import sampler
from tests.worker.model.draws import (
    LARGE,
    LARGE_KINDS,
    PARAMETERS,
    VOCABULARY,
    logits_of,
    one,
    reference_draw,
    reference_weights,
    sample,
    sequences_of,
    token_ids,
)
from tests.worker.model.driver import new_sequence

pytestmark = pytest.mark.usefixtures("scans")


@pytest.mark.parametrize("fields", PARAMETERS.values(), ids=PARAMETERS.keys())
def test_draws_what_the_plain_formulas_draw(fields: dict[str, Any]) -> None:
    count = 300
    logits = logits_of(1).expand(count, -1)
    sequences = sequences_of(fields, count)
    weights = reference_weights(logits[0], sequences[0])
    expected = [reference_draw(weights, sequence) for sequence in sequences]
    drawn = token_ids(sample(logits, sequences))
    # float32 against float64 may move a boundary across a number, but hardly ever
    assert sum(a != b for a, b in zip(drawn, expected, strict=True)) <= 1
    assert all(weights[token_id] > 0 for token_id in drawn)


@pytest.mark.parametrize("scale", [1.0, 6.0], ids=["flat", "sharp"])
@pytest.mark.parametrize("fields", LARGE_KINDS.values(), ids=LARGE_KINDS.keys())
def test_a_large_vocabulary_draws_what_the_plain_formulas_draw(
    fields: dict[str, Any], scale: float
) -> None:
    count = 40
    logits = logits_of(1, seed=5, scale=scale, vocabulary=LARGE)
    logits[0, 7::50] = -math.inf  # forbidden, as by a grammar
    sequences = sequences_of(fields, count)
    weights = reference_weights(logits[0], sequences[0])
    expected = [reference_draw(weights, sequence) for sequence in sequences]
    drawn = token_ids(sample(logits.expand(count, -1), sequences))
    assert sum(a != b for a, b in zip(drawn, expected, strict=True)) <= 1
    assert all(weights[token_id] > 0 for token_id in drawn)


@pytest.mark.parametrize("name", ["plain", "top-p", "all three", "everything"])
def test_frequencies_follow_the_distribution(name: str) -> None:
    count = 20_000
    logits = logits_of(1, scale=1.0, vocabulary=40)
    fields = {**PARAMETERS[name], "logit_bias": {}}
    sequences = [
        new_sequence([1, 2], SamplingParams(seed=i, **fields), completion=[3, 4])
        for i in range(count)
    ]
    weights = reference_weights(logits[0], sequences[0])
    drawn = token_ids(sample(logits.expand(count, -1), sequences))
    observed = np.bincount(drawn, minlength=40)
    possible = weights > 0
    assert observed[~possible].sum() == 0
    expected = weights[possible] * count
    chi_square = ((observed[possible] - expected) ** 2 / expected).sum()
    degrees = possible.sum() - 1
    # mean `degrees`, standard deviation sqrt(2 degrees); the seeds are fixed, so this is decided once
    assert chi_square < degrees + 4 * math.sqrt(2 * degrees) + 4


def test_survivors_are_those_of_transformers() -> None:
    logits = logits_of(1, seed=9, vocabulary=90)
    fields: dict[str, Any] = {"temperature": 1.4, "top_k": 30, "top_p": 0.85, "min_p": 0.04}
    ids = torch.tensor([[4, 5, 6, 6]])
    chain = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.3),
            TemperatureLogitsWarper(1.4),
            TopKLogitsWarper(30),
            TopPLogitsWarper(0.85),
            MinPLogitsWarper(0.04),
        ]
    )
    theirs = chain(ids, logits.clone())[0].isfinite()  # type: ignore[arg-type]
    ours = reference_weights(
        logits[0],
        new_sequence([4, 5], SamplingParams(repetition_penalty=1.3, **fields), completion=[6, 6]),
    )
    assert theirs.tolist() == (ours > 0).tolist()


@given(st.lists(st.integers(0, 49), min_size=1, max_size=30), st.floats(0.1, 5.0))
@settings(max_examples=30, deadline=None)
def test_repetition_penalty_is_that_of_transformers(tokens: list[int], penalty: float) -> None:
    logits = logits_of(1, seed=len(tokens), vocabulary=50)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([tokens]), logits.clone())
    sampling = SamplingParams(temperature=0, repetition_penalty=penalty)
    half = len(tokens) // 2 + 1
    sequence = new_sequence(tokens[:half], sampling, completion=tokens[half:])
    assert one(logits[0], sequence).token_id == int(theirs.argmax())


@given(
    seed=st.integers(-(2**63), 2**64 - 1),
    temperature=st.sampled_from([0.0, 1e-300, 1e-30, 1e-6, 0.5, 1.0, 2.0, 1e30]),
    top_k=st.sampled_from([None, 1, 2, 50, 129, 700, 2**40]),
    top_p=st.sampled_from([1e-12, 0.1, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 1e-9, 0.5, 1.0]),
    repetition_penalty=st.sampled_from([0.01, 1.0, 2.0]),
    penalty=st.sampled_from([-2.0, 0.0, 2.0]),
    bias=st.sampled_from([-100.0, 0.0, 100.0]),
    forbidden=st.sampled_from([0, 1, 650, 699]),
    scale=st.sampled_from([0.0, 1.0, 1e3, 1e30]),
)
@settings(max_examples=150, deadline=None)
def test_no_parameters_draw_a_forbidden_token(
    seed: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    penalty: float,
    bias: float,
    forbidden: int,
    scale: float,
) -> None:
    logits = logits_of(1, seed=1, scale=scale)
    logits[0, :forbidden] = -math.inf
    params = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=penalty,
        frequency_penalty=penalty,
        logit_bias={0: bias, 699: bias},
        seed=seed,
    )
    token = one(logits[0], new_sequence([5, 699], params, completion=[7, 7]))
    assert forbidden <= token.token_id < VOCABULARY


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53, 0.5])
def test_inversion_never_leaves_the_survivors(u: float) -> None:
    weights = torch.rand(50, VOCABULARY, generator=torch.Generator().manual_seed(2))
    weights[:, ::2] = 0
    weights[:, 500:] = 0
    weights[:, :3] = 0
    weights *= torch.logspace(-30, 30, 50)[:, None]
    drawn = sampler.invert(weights, torch.full((50,), u, dtype=torch.float64))
    assert bool((weights.gather(1, drawn[:, None]) > 0).all())
    if u == 0:
        assert drawn.tolist() == [3] * 50
    if u > 0.9:
        assert drawn.tolist() == [499] * 50
