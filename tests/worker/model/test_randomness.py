"""Counter-based uniform numbers."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from inference_worker.model.randomness import uniforms

INT64 = st.integers(-(2**63), 2**63 - 1)


def splitmix(value: int) -> int:
    """The finalizer in plain integers."""
    word = (1 << 64) - 1
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & word
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & word
    return value ^ (value >> 31)


def plain_uniform(seed: int, choice: int, position: int) -> float:
    word, golden = (1 << 64) - 1, 0x9E3779B97F4A7C15
    state = seed & word
    for value in (choice, position):
        state = splitmix((state + golden) & word) ^ value
    state = splitmix((state + golden) & word)
    state = splitmix((state + golden) & word)
    return (state >> 11) * 2.0**-53


@given(st.lists(st.tuples(INT64, st.integers(0, 127), st.integers(0, 10**6)), min_size=1))
def test_vectorised_numbers_are_those_of_plain_integers(keys: list[tuple[int, int, int]]) -> None:
    seeds, choices, positions = zip(*keys, strict=True)
    numbers = uniforms(seeds, choices, positions)
    assert numbers.tolist() == [plain_uniform(*key) for key in keys]
    assert ((numbers >= 0) & (numbers < 1)).all()


def test_signed_and_unsigned_seeds_are_the_same_word() -> None:
    assert uniforms([-1], [0], [0]) == uniforms([2**64 - 1], [0], [0])


def test_numbers_are_uniform_and_unrelated_along_every_axis() -> None:
    count = 20_000
    zeros, up = [0] * count, list(range(count))
    for keys in ((up, zeros, zeros), (zeros, up, zeros), (zeros, zeros, up)):
        numbers = uniforms(*keys)
        observed = np.histogram(numbers, bins=100, range=(0, 1))[0]
        chi_square = ((observed - count / 100) ** 2 / (count / 100)).sum()
        assert 50 < chi_square < 160  # 99 degrees of freedom
        assert abs(np.asarray(np.corrcoef(numbers[1:], numbers[:-1]))[0, 1]) < 0.03
    axes = [uniforms(up, zeros, zeros), uniforms(zeros, up, zeros), uniforms(zeros, zeros, up)]
    assert np.abs(np.asarray(np.corrcoef(axes))[np.triu_indices(3, 1)]).max() < 0.03


def test_choices_and_positions_do_not_trade_places() -> None:
    assert uniforms([7], [1], [2]) != uniforms([7], [2], [1])
    assert uniforms([1], [7], [2]) != uniforms([7], [1], [2])
