"""Drawing tokens, against a naive implementation of the same formulas."""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Sequence as Rows
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

from inference_worker.engine.event import Token
from inference_worker.engine.request import OutputParams, SamplingParams
from inference_worker.engine.sequence import Sequence
from inference_worker.model import sampler
from inference_worker.model.candidates import draw_from_candidates
from inference_worker.model.native.scans import NativeScans
from inference_worker.model.randomness import uniforms
from inference_worker.model.sampler import BadLogits, SamplingFailed
from inference_worker.model.scans import NUMPY, Scans, Wanted
from inference_worker.model.truncation import Truncation
from tests.worker.model.c_library import c_library
from tests.worker.model.driver import new_sequence

VOCABULARY = 700  # more than two groups of the inverse CDF, and no multiple of one


_scans: Scans = NUMPY


@pytest.fixture(scope="module", params=["numpy", "C"], autouse=True)
def scans(request: pytest.FixtureRequest) -> Iterator[Scans]:
    """What every test here goes through the logits with."""
    global _scans
    if request.param == "C":
        _scans = NativeScans(c_library())
    yield _scans
    _scans = NUMPY


def sample(logits: torch.Tensor, sequences: Rows[Sequence]) -> list[Token | Exception]:
    return sampler.sample(logits, sequences, _scans)


def logits_of(
    rows: int, seed: int = 0, scale: float = 3.0, vocabulary: int = VOCABULARY
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocabulary, generator=generator) * scale


def one(logits: torch.Tensor, sequence: Sequence) -> Token:
    [result] = sample(logits[None], [sequence])
    assert isinstance(result, Token), result
    return result


def token_ids(results: list[Token | Exception]) -> list[int]:
    tokens = [result for result in results if isinstance(result, Token)]
    assert len(tokens) == len(results)
    return [token.token_id for token in tokens]


def reference_weights(logits: torch.Tensor, sequence: Sequence) -> np.ndarray:
    """The distribution [vocabulary] to draw from, one plain step after the other, in float64."""
    params = sequence.request.sampling
    x = logits.double().numpy().copy()
    for token_id, bias in params.logit_bias.items():
        x[token_id] += bias
    for token_id in set(sequence.token_ids):
        x[token_id] = (
            x[token_id] / params.repetition_penalty
            if x[token_id] > 0
            else x[token_id] * params.repetition_penalty
        )
    completion = sequence.token_ids[sequence.num_prompt_tokens :]
    for token_id in set(completion):
        x[token_id] -= params.presence_penalty
        x[token_id] -= params.frequency_penalty * completion.count(token_id)
    x = (x - x.max()) / params.temperature
    order = np.argsort(-x, kind="stable")
    keep = order[: params.top_k]
    mass = np.exp(x[keep])
    before = np.concatenate([[0], np.cumsum(mass)[:-1]]) / mass.sum()
    keep = keep[(before < params.top_p) | (np.arange(len(keep)) == 0)]
    keep = keep[np.exp(x[keep]) >= params.min_p]
    weights = np.zeros_like(x)
    weights[keep] = np.exp(x[keep])
    normalised: np.ndarray = weights / weights.sum()
    return normalised


def reference_draw(weights: np.ndarray, sequence: Sequence) -> int:
    """Inverse CDF in the order of token ids."""
    u = uniforms(
        [sequence.request.sampling.seed], [sequence.choice_index], [sequence.num_completion_tokens]
    )[0]
    return int(np.searchsorted(np.cumsum(weights), u, side="right"))


PARAMETERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "hot": {"temperature": 1.7},
    "cold": {"temperature": 0.3},
    "top-k": {"top_k": 20},
    "top-k of one": {"top_k": 1},
    "top-k above the vocabulary": {"top_k": 10**6},
    "top-p": {"top_p": 0.8},
    "top-p that needs many": {"top_p": 0.98, "temperature": 4.0},
    "top-p near nothing": {"top_p": 1e-6},
    "min-p": {"min_p": 0.05},
    "min-p of one": {"min_p": 1.0},
    "all three": {"top_k": 50, "top_p": 0.9, "min_p": 0.02, "temperature": 1.3},
    "top-k and top-p": {"top_k": 300, "top_p": 0.95, "temperature": 3.0},
    "bias": {"logit_bias": {3: 6.0, 699: -100.0, 0: 100.0, 8: -3.0}},
    "repetition": {"repetition_penalty": 1.8},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": -0.9},
    "everything": {
        "temperature": 0.8,
        "top_k": 100,
        "top_p": 0.97,
        "min_p": 0.001,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.7,
        "logit_bias": {5: 4.0},
    },
}
PROMPT, COMPLETION = [5, 5, 9, 200], [8, 8, 8, 9, 650, 3]


def sequences_of(fields: dict[str, Any], count: int) -> list[Sequence]:
    """The same row under different seeds."""
    return [
        new_sequence(PROMPT, SamplingParams(seed=seed, **fields), completion=COMPLETION)
        for seed in range(count)
    ]


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


LARGE = 32_000
LARGE_KINDS: dict[str, dict[str, Any]] = {
    **{name: PARAMETERS[name] for name in ("plain", "top-k", "top-p", "min-p", "all three")},
    "top-k of many": {"top_k": 3000, "top_p": 0.9},
    "top-p and min-p": {"top_p": 0.97, "min_p": 0.01},
    "min-p of many": {"min_p": 1e-6},
}


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


def test_candidates_are_certain_where_few_survive_and_left_open_where_many_do(scans: Scans) -> None:
    sharp, flat = (logits_of(1, seed=5, scale=x, vocabulary=LARGE).numpy() for x in (6.0, 0.5))
    equal = np.zeros((1, LARGE), dtype=np.float32)
    rows = np.concatenate([sharp, sharp, sharp, sharp, flat, flat, flat, equal])
    truncation = Truncation(
        top_k=np.array([40, LARGE, LARGE, LARGE, 40, LARGE, LARGE, 40]),
        top_p=np.array([1.0, 0.95, 1.0, 1.0, 1.0, 0.95, 1.0, 1.0]),
        min_p=np.array([0.0, 0.0, 0.05, 0.0, 0.0, 0.0, 0.05, 0.0]),
    )
    ones = np.ones(len(rows), dtype=np.float32)
    u = np.full(len(rows), 0.5)
    _ids, is_certain, peaks = draw_from_candidates(rows, ones, truncation, u, scans)
    assert peaks.tolist() == rows.max(1).tolist()
    assert is_certain.tolist() == [True, True, True, False, True, False, False, False]


@pytest.mark.parametrize("vocabulary", [1, 15, 511, 700, 4109, LARGE])
def test_both_scans_find_the_same(vocabulary: int, scans: Scans) -> None:
    """Numpy's are the reference of those in C."""
    rows = 24
    logits = logits_of(rows, seed=vocabulary, scale=6.0, vocabulary=vocabulary).numpy()
    logits[::5] = logits[::5].round()  # ties
    logits[1::5, vocabulary // 2 + 1 :] = -math.inf
    for row, bad in ((3, math.nan), (9, math.inf), (15, -math.inf)):
        logits[row, vocabulary // 3 :] = bad
        logits[row, : vocabulary // 3] = bad if math.isinf(bad) else 1.0
    temperatures = np.linspace(0.3, 2.0, rows, dtype=np.float32)
    temperatures[::3] = 1.0
    wanted = Wanted(
        first=np.array([0, 5, 40, -1] * 6),
        depth=np.array([1.5, math.inf, 3.0, math.inf] * 6),
        share=np.array([0.0, 0.3, 0.9, 0.0] * 6),
    )
    found, expected = (s.survey(logits, temperatures, wanted, 1024) for s in (scans, NUMPY))
    np.testing.assert_array_equal(found.peaks, expected.peaks)
    has_mass = found.masses > 0
    np.testing.assert_allclose(found.masses[has_mass], expected.masses[has_mass], rtol=1e-6)
    assert (has_mass | (expected.masses == 0) | (found.counts == 0) | (found.counts > 1024)).all()
    for row in np.flatnonzero((found.counts <= 1024) & (expected.counts <= 1024)).tolist():
        # the one bound that does not depend on how a row is cut into groups
        if found.is_floor[row]:
            expected_ids = expected.ids[row, : expected.counts[row]]
            assert expected.is_floor[row]
            assert found.ids[row, : found.counts[row]].tolist() == expected_ids.tolist()
        ids = found.ids[row, : found.counts[row]]
        assert found.logits[row, : len(ids)].tolist() == logits[row, ids].tolist()
        if len(ids):  # all that are as great as the least
            assert ids.tolist() == np.flatnonzero(logits[row] >= logits[row, ids].min()).tolist()
            at_least = 1 if found.is_floor[row] else wanted.first[row]
            assert len(ids) >= min(at_least, np.isfinite(logits[row]).sum())


@pytest.mark.parametrize("vocabulary", [1, 15, 511, 700, 4109, LARGE])
@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0, 6.0])
def test_both_scans_draw_the_same_from_whole_rows(
    vocabulary: int, scale: float, scans: Scans
) -> None:
    """Numpy's are the reference of those in C; top-p's last survivor is found by each in its own way."""
    rows = 36
    logits = logits_of(rows, seed=vocabulary, scale=scale, vocabulary=vocabulary).numpy()
    logits[::5] = logits[::5].round()  # ties
    logits[1::5, vocabulary // 2 + 1 :] = -math.inf
    temperatures = np.linspace(0.3, 2.0, rows, dtype=np.float32)
    temperatures[::3] = 1.0
    truncation = Truncation(
        top_k=np.array([vocabulary, vocabulary, vocabulary, vocabulary, vocabulary, 600] * 6),
        top_p=np.array([1.0, 0.95, 0.5, 1.0, 1e-9, 0.9] * 6),
        min_p=np.array([0.0, 0.0, 0.01, 0.2, 0.0, 0.001] * 6),
    )
    u = np.linspace(0, 1 - 2**-53, rows)
    everyone = np.ones(rows, dtype=np.bool_)
    peaks = logits.max(axis=1)
    drawn, expected = (
        s.draw_from_rows(logits, peaks, temperatures, truncation, u, everyone)
        for s in (scans, NUMPY)
    )
    assert drawn.tolist() == expected.tolist()
    assert not np.isneginf(logits[np.arange(rows), drawn]).any()
    few = everyone & (np.arange(rows) % 2 == 0)
    some = scans.draw_from_rows(logits, peaks, temperatures, truncation, u, few)
    assert some.tolist() == np.where(few, drawn, 0).tolist()


def test_candidates_that_surely_lack_their_share_are_told_without_a_mass(scans: Scans) -> None:
    flat, sharp = (logits_of(1, seed=5, scale=x, vocabulary=LARGE).numpy() for x in (0.5, 6.0))
    wanted = Wanted(np.array([128, 128]), np.full(2, math.inf), np.array([0.95, 0.95]))
    found = scans.survey(np.concatenate([flat, sharp]), np.ones(2, np.float32), wanted, 1024)
    is_open = (found.counts == 0) | (found.counts > 1024)
    assert found.counts[1] >= 128
    assert found.masses[1] > 1.0
    if scans is not NUMPY:
        assert is_open.tolist() == [True, False]
        assert found.masses[0] == 0.0


@pytest.mark.parametrize("vocabulary", [700, 5000])
def test_a_gpu_would_draw_what_a_cpu_draws(vocabulary: int, scans: Scans) -> None:
    kinds = [fields for fields in PARAMETERS.values() if not {"logit_bias"} & fields.keys()]
    params = [SamplingParams(**fields) for fields in kinds * 8]
    logits = logits_of(len(params), seed=8, vocabulary=vocabulary)
    truncation = Truncation(
        top_k=np.array([p.top_k or vocabulary for p in params]),
        top_p=np.array([p.top_p for p in params]),
        min_p=np.array([p.min_p for p in params]),
    )
    temperatures = np.array([p.temperature for p in params], dtype=np.float32)
    u = uniforms(range(len(params)), [0] * len(params), [0] * len(params))
    peaks = logits.amax(1)
    there = sampler.draw_on_device(logits, peaks, temperatures, truncation, u).tolist()
    here, _peaks = sampler.draw_on_cpu(logits.numpy(), temperatures, truncation, u, scans)
    assert sum(a != b for a, b in zip(there, here.tolist(), strict=True)) <= 1


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
