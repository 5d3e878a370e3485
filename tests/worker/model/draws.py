"""Rows to draw from, how they are drawn, and a naive implementation of the same formulas."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Rows
from typing import Any

import numpy as np
import pytest
import torch

from inference_worker.engine.event import Token
from inference_worker.engine.request import SamplingParams
from inference_worker.engine.sequence import Sequence
from inference_worker.model import sampler
from inference_worker.model.native.scans import NativeScans
from inference_worker.model.randomness import uniforms
from inference_worker.model.scans import NUMPY, Scans
from tests.worker.model.c_library import c_library
from tests.worker.model.driver import new_sequence

VOCABULARY = 700  # more than two groups of the inverse CDF, and no multiple of one


_scans: Scans = NUMPY


@pytest.fixture(scope="module", params=["numpy", "C"])
def scans(request: pytest.FixtureRequest) -> Iterator[Scans]:
    """What `sample` goes through the logits with."""
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


LARGE = 32_000
LARGE_KINDS: dict[str, dict[str, Any]] = {
    **{name: PARAMETERS[name] for name in ("plain", "top-k", "top-p", "min-p", "all three")},
    "top-k of many": {"top_k": 3000, "top_p": 0.9},
    "top-p and min-p": {"top_p": 0.97, "min_p": 0.01},
    "min-p of many": {"min_p": 1e-6},
}
