"""Going through the logits in C, in numpy and as on a GPU: the same is found."""

from __future__ import annotations

import math

import numpy as np
import pytest

from inference_worker.engine.request import SamplingParams
from inference_worker.model import sampler
from inference_worker.model.candidates import draw_from_candidates
from inference_worker.model.randomness import uniforms
from inference_worker.model.scans import NUMPY, Scans, Wanted
from inference_worker.model.truncation import Truncation
from tests.worker.model.draws import LARGE, PARAMETERS, logits_of

pytestmark = pytest.mark.usefixtures("scans")


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
