"""Counter-based randomness: one uniform number for each (seed, choice, position), and no generator state.

So a choice draws the same numbers alone, in a batch, after a preemption, or continued elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

# Constants of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014).
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_WORD = (1 << 64) - 1


def uniforms(
    seeds: Sequence[int], choices: Sequence[int], positions: Sequence[int]
) -> npt.NDArray[np.float64]:
    """Uniform numbers [n] in [0, 1), float64 with 53 random bits.

    `seeds` are any 64-bit integers, signed or not; `positions` count the completion tokens drawn before.
    """
    state = _words(seeds)
    # each input is absorbed by a full round, so neighbouring seeds, choices and positions are unrelated
    for values in (choices, positions):
        state = _mix(state + _GOLDEN) ^ _words(values)
    bits = _mix(_mix(state + _GOLDEN) + _GOLDEN)
    top_bits: npt.NDArray[np.float64] = (bits >> np.uint64(11)).astype(np.float64)
    return top_bits * 2.0**-53


def _words(values: Sequence[int]) -> npt.NDArray[np.uint64]:
    return np.array([value & _WORD for value in values], dtype=np.uint64)


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finalizer, a bijection of 64-bit words (Stafford's variant 13 of MurmurHash3's)."""
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return z ^ (z >> np.uint64(31))
