"""Rows are a pure function of (seed, sample index); windows for evaluation are fixed."""

import itertools

import numpy as np
import pytest
import torch

from nanogpt.data.dataset import Tokens
from nanogpt.data.rows import EvalWindows, Rows, SlidingWindows, _rows_per_part
from nanogpt.errors import InputError
from nanogpt.hashing import derive_seed, permute

COUNT = np.arange(1000, dtype=np.uint16)  # each token is its own position


def make_splits(*lengths: int) -> list[Tokens]:
    """Splits that their ids tell apart: the first from 0 on, the second from 10,000 on, and so on."""
    return [Tokens.of(np.arange(n, dtype=np.uint16) + 10_000 * k) for k, n in enumerate(lengths)]


# --- Hashing


def test_permute_draws_all_orders_equally_often():
    keys = np.arange(24_000, dtype=np.uint64)
    orders = np.stack([permute(np.full(len(keys), i, np.uint64), keys, 5) for i in range(5)], axis=1)
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 120
    assert ((counts - 200) ** 2 / 200).sum() < 173.6  # chi-squared with 119 degrees of freedom, p = 0.001


def test_derive_seed_separates_its_arguments():
    seeds = {derive_seed(seed, step, rank) for seed in range(10) for step in range(100) for rank in range(-2, 8)}
    assert len(seeds) == 10_000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, 2) != derive_seed(2, 1)
    assert derive_seed(0) != derive_seed(0, 0)
    # SplitMix64's own first outputs for seed 0 (Vigna, prng.di.unimi.it/splitmix64.c)
    assert derive_seed(0) == 0xE220A8397B1DCDAF >> 1
    assert derive_seed(2**64 - 1) == derive_seed(-1)


# --- Training rows


SPLITS = make_splits(1001, 301, 501)
MIXTURE = Tokens.mix(SPLITS, [5, 3, 2])


@pytest.mark.parametrize("order", ["random", "epoch"])
@pytest.mark.parametrize("tokens", [COUNT, MIXTURE], ids=["one split", "mixture"])
def test_rows_depend_on_seed_and_index_alone(tokens: np.ndarray | Tokens, order: str):
    rows = Rows(tokens, 7, 60_000, seed=1337, order=order)
    x, y = rows[0:1000]
    assert x.shape == y.shape == (1000, 7)
    assert x.dtype == y.dtype == torch.int64
    assert x.is_contiguous()
    assert y.is_contiguous()
    assert torch.equal(x + 1, y)
    again = Rows(tokens, 7, 60_000, 1337, order)
    for cuts in ([0, 1000], [0, 1, 3, 141, 142, 143, 500, 1000], [*range(0, 1000, 37), 1000]):
        pieces = [again[a:b] for a, b in itertools.pairwise(cuts)]
        assert torch.equal(torch.cat([piece[0] for piece in pieces]), x)
        assert torch.equal(torch.cat([piece[1] for piece in pieces]), y)
    assert not torch.equal(Rows(tokens, 7, 60_000, 1338, order)[0:1000][0], x)
    assert rows[5:5][0].shape == (0, 7)
    assert rows[2**40 : 2**40 + 2][0].shape == (2, 7)


@pytest.mark.parametrize(("tokens", "block"), [(2, 1), (9, 8), (17, 8), (25, 8), (1000, 7), (1000, 1)])
def test_an_epoch_visits_each_window_once(tokens: int, block: int):
    rows = Rows(COUNT[:tokens], block, 1000, seed=3, order="epoch")
    n = (tokens - 1) // block
    epochs = rows[0 : 3 * n][0][:, 0].view(3, n)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(0, n * block, block))
    if n > 20:
        assert not torch.equal(epochs[0], epochs[1])
        assert abs(np.corrcoef(epochs[0], np.arange(n))[0, 1]) < 4 / n**0.5


def test_random_starts_are_uniform_and_reach_both_ends():
    starts = Rows(COUNT, 990, 1000, seed=0)[0:5_000][0][:, 0]
    counts = torch.bincount(starts)
    assert len(counts) == 10  # 0 to len - block_size - 1
    assert ((counts - 500) ** 2 / 500).sum() < 27.9  # 9 degrees of freedom, p = 0.001
    assert abs(np.corrcoef(starts[1:], starts[:-1])[0, 1]) < 0.06


def test_a_bad_id_that_is_only_a_target_is_named():
    with pytest.raises(InputError, match="holds id 8 at token 8"):
        Rows(COUNT[:9], 8, vocab_size=8, seed=0)[0:1]
    with pytest.raises(InputError, match="holds id 8 at token 8"):
        EvalWindows(COUNT[:9], 8, 0, 1, vocab_size=8)[0:1]


# --- Mixtures


@pytest.mark.parametrize("weights", [[7, 3], [1, 1, 1], [500_000, 300_000, 199_999, 1], [1, 10**6], [5]])
def test_rows_per_part_are_exact_to_a_row(weights: list[int]):
    counts = _rows_per_part(np.arange(20_000), weights)
    assert (counts.sum(0) == np.arange(20_000)).all()
    assert set(np.unique(np.diff(counts))) <= {0, 1}  # each row comes from one part
    shares = np.arange(20_000) * np.array(weights)[:, None] / sum(weights)
    assert np.abs(counts - shares).max() <= len(weights) - 1
    assert (_rows_per_part(np.array([2**42]), weights) >= 0).all()


@pytest.mark.parametrize("order", ["random", "epoch"])
def test_a_mixture_reads_each_part_in_its_share(order: str):
    x = Rows(MIXTURE, 10, 60_000, 7, order)[0:2000][0]
    part = x[:, 0] // 10_000
    assert (x // 10_000 == part[:, None]).all()  # no window reaches into another part
    assert part.bincount().tolist() == [1000, 600, 400]
    alone = Rows(SPLITS[0], 10, 60_000, 7, order)[0:99][0]
    assert torch.equal(Rows(Tokens.mix(SPLITS[:1], [1]), 10, 60_000, 7, order)[0:99][0], alone)
    if order == "epoch":
        for k, windows in enumerate((100, 30, 50)):
            epochs = x[part == k][:, 0] - 10_000 * k
            for epoch in epochs[: len(epochs) // windows * windows].view(-1, windows):
                assert sorted(epoch.tolist()) == [*range(0, windows * 10, 10)]


# --- Evaluation


@pytest.mark.parametrize(("batches", "expected"), [(0, 142), (1, 4), (10, 40), (36, 142), (1000, 142)])
def test_eval_windows_cover_the_split_at_most_once(batches: int, expected: int):
    windows = EvalWindows(COUNT, 7, batches, 4, 1000)
    assert len(windows) == expected
    x, y = windows[0 : expected + 5]
    assert torch.equal(x + 1, y)
    starts = x[:, 0]
    assert (starts % 7 == 0).all()
    gaps = starts.diff()
    assert gaps.min() >= 7
    assert gaps.max() - gaps.min() <= 7
    assert len(x.unique()) == 7 * expected
    assert torch.equal(torch.cat([windows[i : i + 5][0] for i in range(0, expected, 5)]), x)
    if not batches:
        assert torch.equal(y.flatten(), torch.arange(1, 995))  # the tail shorter than a window is left out


def test_a_mixture_is_evaluated_in_its_shares():
    mixture = Tokens.mix(make_splits(1001, 301), [7, 3])
    for batches, expected in ((5, [14, 6]), (0, [70, 30]), (99, [70, 30])):  # the second has no more than 30
        windows = EvalWindows(mixture, 10, batches, 4, 60_000)
        starts = windows[0 : len(windows)][0][:, 0]
        assert (starts // 10_000).bincount().tolist() == expected
        assert len(starts.unique()) == sum(expected)
    assert (starts[starts < 10_000].max(), starts.max() - 10_000) == (980, 290)


@pytest.mark.parametrize(
    ("block", "stride", "rows"), [(10, 10, 4), (10, 3, 4), (10, 1, 99), (301, 7, 2), (400, 400, 1)]
)
def test_sliding_windows_count_each_token_once(block: int, stride: int, rows: int):
    mixture = Tokens.mix(make_splits(1001, 301), [7, 3])
    windows = SlidingWindows(mixture, mixture.parts[1], block, stride, 60_000, rows)
    batches = list(windows)
    assert len(batches) == len(windows)
    targets = torch.cat([y[y >= 0] for _, _, y in batches])
    assert torch.equal(targets, torch.arange(10_001, 10_301))
    for starts, x, y in batches:
        assert len(x) <= rows
        assert torch.equal(x[:, 0], torch.from_numpy(starts) + 10_000)
        assert ((y == x + 1) | (y == -1)).all()
