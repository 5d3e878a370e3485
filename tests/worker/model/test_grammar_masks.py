"""What a mask does to logits; that masks are right is tested with the grammars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from inference_worker.engine.grammar import GrammarFailed, Masks
from inference_worker.engine.sequence import Sequence as Row
from inference_worker.model.grammar_masks import penalties_on_device, restrict
from tests.worker.model.driver import new_sequence


@dataclass
class Fixed:
    """A grammar that allows the same tokens always, and its own state."""

    allowed: list[list[bool]]  # by state
    width: int  # tokens of a mask
    failures: dict[int, Exception]

    def masks(self, states: Sequence[Any]) -> Masks:
        flags = np.zeros((len(states), self.width), dtype=np.bool_)
        for row, state in enumerate(states):
            flags[row, : len(self.allowed[state])] = self.allowed[state]
        return Masks(np.packbits(flags, axis=1, bitorder="little").tobytes(), self.failures)


def rows_of(grammar: Any, states: list[int | None]) -> list[Row]:
    rows = [new_sequence([1]) for _ in states]
    for row, state in zip(rows, states, strict=True):
        if state is not None:
            row.request = replace(row.request, grammar=grammar)
            row.grammar = state  # type: ignore[assignment]
    return rows


@pytest.mark.parametrize("vocabulary", [7, 8, 61, 64])
@pytest.mark.parametrize("states", [[0, 1, 2], [None, 2, None, 0]])
def test_what_is_forbidden_is_minus_infinity(vocabulary: int, states: list[int | None]) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(len(states), vocabulary, generator=generator)
    before = logits.clone()
    allowed = (torch.rand(3, vocabulary, generator=generator) < 0.4).tolist()
    grammar = Fixed(allowed, width=96, failures={})
    restricted, failures = restrict(logits, rows_of(grammar, states))
    assert failures == {}
    assert torch.equal(logits, before)
    for row, state in enumerate(states):
        for token in range(vocabulary):
            is_allowed = state is None or allowed[state][token]
            expected = float(logits[row, token]) if is_allowed else -math.inf
            assert float(restricted[row, token]) == expected


@pytest.mark.parametrize("vocabulary", [7, 8, 61, 64])
def test_a_device_reads_the_packed_form_alike(vocabulary: int) -> None:
    random = np.random.default_rng(vocabulary)
    packed = random.integers(256, size=(3, -(-vocabulary // 8)), dtype=np.uint8)
    is_allowed = np.unpackbits(packed, axis=1, count=vocabulary, bitorder="little")
    for dtype in (torch.float32, torch.bfloat16):
        found = penalties_on_device(packed, torch.randn(3, vocabulary).to(dtype))
        assert found.dtype == dtype
        assert (found == 0).tolist() == is_allowed.astype(bool).tolist()
        assert (found == -math.inf).tolist() == (is_allowed == 0).tolist()


def test_broken_logits_show_behind_a_mask() -> None:
    logits = torch.tensor([[1.0, math.nan, math.inf, -math.inf]])
    grammar = Fixed([[True, False, False, False]], width=32, failures={})
    restricted, _ = restrict(logits, rows_of(grammar, [0]))
    assert restricted[0].isnan().tolist() == [False, True, True, False]


def test_a_failure_is_told_of_its_own_row() -> None:
    failure = GrammarFailed("over")
    grammar = Fixed([[True] * 4], width=32, failures={1: failure})
    logits = torch.zeros(3, 4)
    _, failures = restrict(logits, rows_of(grammar, [None, 0, 0]))
    assert failures == {2: failure}


def test_without_a_grammar_nothing_is_copied() -> None:
    logits = torch.zeros(2, 4)
    restricted, failures = restrict(logits, rows_of(None, [None, None]))
    assert restricted is logits
    assert failures == {}
