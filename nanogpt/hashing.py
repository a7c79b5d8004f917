"""Counter-based random numbers: hashes of integers in place of a generator's state."""

from typing import Any

import numpy as np


def hash64(*values: Any) -> np.ndarray:
    """Hash integers, or arrays of uint64, to 64 random bits (uint64).

    SplitMix64 (Steele, Lea and Flood 2014; its constants are the golden ratio's and David Stafford's "Mix13"),
    absorbing one value after another.
    """
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
    """Uniform random numbers in [0, 1), (n,), one for each set of integers; arrays among them are (n,) of uint64."""
    return (hash64(*values) >> np.uint64(11)) * 2.0**-53


def permute(positions: np.ndarray, keys: np.ndarray, n: int) -> np.ndarray:
    """Map each position of range(n) to its place in the shuffle that its key selects, without building the shuffle.

    A Feistel network permutes a power of four that is at least n; results outside of range(n) pass through it again
    until they are inside ("cycle walking", Black and Rogaway 2002). positions, keys: arrays of uint64.
    """
    half = np.uint64(max(4, ((n - 1).bit_length() + 1) // 2))  # with fewer than 4 bits orders are not equally likely
    low = (np.uint64(1) << half) - np.uint64(1)
    shuffled = positions.copy()
    outside = np.arange(len(shuffled))
    while len(outside):
        left = shuffled[outside] >> half
        right = shuffled[outside] & low
        for round_number in range(6):
            mixed = left ^ (hash64(round_number, keys[outside], right) & low)
            left, right = right, mixed
        shuffled[outside] = left << half | right
        outside = outside[shuffled[outside] >= n]
    return shuffled
