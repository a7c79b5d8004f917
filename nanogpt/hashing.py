"""Counter-based random numbers: hashes of integers in place of a generator's state."""

from typing import Any

import numpy as np


def hash64(*values: Any) -> np.ndarray:
    """64 well mixed bits, uint64, of integers or arrays of them: SplitMix64 (Steele, Lea and Flood 2014; its constants
    are the golden ratio's and David Stafford's "Mix13") absorbing one value after another."""
    state = np.zeros(1, dtype=np.uint64)
    for value in values:
        if not isinstance(value, np.ndarray):
            value = np.array([value & (2**64 - 1)], dtype=np.uint64)
        state = (state + np.uint64(0x9E3779B97F4A7C15)) ^ value
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


def derive_seed(*ints: int) -> int:
    """One seed, 0 to 2**63 - 1, from several integers."""
    return int(hash64(*ints)[0] >> np.uint64(1))


def hashed_uniform(*values: Any) -> np.ndarray:
    """A number of [0, 1) for each set of integers, of which some or all are given as arrays (n,) of uint64."""
    return (hash64(*values) >> np.uint64(11)) * 2.0**-53


def permute(positions: np.ndarray, keys: np.ndarray, n: int) -> np.ndarray:
    """Where a shuffle of range(n), one for each key, puts each position, without building the shuffle.

    A Feistel network permutes a power of four that holds n; what falls outside of n goes through it again until it
    falls inside ("cycle walking", Black and Rogaway 2002). Arrays of uint64.
    """
    half = np.uint64(max(4, ((n - 1).bit_length() + 1) // 2))  # below four bits not every order is as likely
    low = (np.uint64(1) << half) - np.uint64(1)
    out = positions.copy()
    outside = np.arange(len(out))
    while len(outside):
        left, right = out[outside] >> half, out[outside] & low
        for turn in range(6):
            left, right = right, left ^ (hash64(turn, keys[outside], right) & low)
        out[outside] = left << half | right
        outside = outside[out[outside] >= n]
    return out
