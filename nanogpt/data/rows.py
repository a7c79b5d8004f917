"""Rows as a pure function of (seed, sample index), and windows for evaluation."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from nanogpt.data.dataset import MixturePart, Tokens
from nanogpt.errors import InputError
from nanogpt.hashing import derive_seed, hash64, permute

if TYPE_CHECKING:
    import torch

    Batch = tuple[torch.Tensor, torch.Tensor]


class Windows:
    """Windows of a split by where they start, each id checked on the host so that no bad one reaches the device."""

    def __init__(self, tokens: np.ndarray | Tokens, block_size: int, vocab_size: int):
        self.tokens, self.block_size, self.vocab_size = Tokens.of(tokens), block_size, vocab_size
        self.sources, self.masked = self.tokens.sources, self.tokens.masked

    def read(self, starts: np.ndarray) -> "Batch":
        """Inputs and, one token on, targets, −1 where the loss mask is 0: int64, (len(starts), block_size). Raises
        InputError for a bad id."""
        import torch

        T = self.block_size
        x, y = np.empty((2, len(starts), T), dtype=np.int64)
        for row, start in enumerate(starts.tolist()):
            ids = self.tokens[start : start + T + 1]
            x[row], y[row] = ids[:-1], ids[1:]
        if len(starts) and max(x.max(), y[:, -1].max()) >= self.vocab_size:
            self._report(starts)
        if self.masked:
            y[self.target_mask(starts) == 0] = -1
        return torch.from_numpy(x), torch.from_numpy(y)

    def target_mask(self, starts: np.ndarray) -> np.ndarray:
        """0 for each target in the windows that does not count: uint8, (len(starts), block_size)."""
        found = np.empty((len(starts), self.block_size), dtype=np.uint8)
        for row, start in zip(found, starts.tolist(), strict=True):
            row[:] = self.tokens.mask(start + 1, start + 1 + self.block_size)
        return found

    def _report(self, starts: np.ndarray) -> None:
        for start in starts.tolist():
            for shard, first, last in self.tokens.pieces(start, start + self.block_size + 1):
                ids = shard.ids()[first:last]
                if len(bad := np.flatnonzero(ids >= self.vocab_size)):
                    raise InputError(
                        f"{shard.name} holds id {ids[bad[0]]} at token {first + bad[0]:,}, but the model's vocab_size "
                        f"is {self.vocab_size}: use the dataset that the model was made for, or prepare it again"
                    )


def _part_counts(index: np.ndarray, weights: Sequence[int]) -> np.ndarray:
    """How many of the first `index` rows come from each source: int64, (sources, len(index)).

    Each source takes its share of what those before it leave, rounded down, so that after any number of rows no
    source is more than a row for each of them away from its share.
    """
    left, counts = index.astype(np.int64), []
    for k, weight in enumerate(weights):
        counts.append(left * weight // sum(weights[k:]))
        left = left - counts[-1]
    return np.stack(counts)


def _assign_rows(rows: slice, sources: Sequence[MixturePart]) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each source, which of these rows are its own (a mask), and their numbers among all of its own (uint64)."""
    assert 0 <= rows.start <= rows.stop, rows
    counts = _part_counts(np.arange(rows.start, rows.stop + 1), [source.weight for source in sources])
    return [(np.diff(own) > 0, np.arange(own[0], own[-1], dtype=np.uint64)) for own in counts]


class Rows:
    """Training rows without end, each a pure function of (seed, sample index): `x, y = rows[first:last]`.

    x and y: int64, (last - first, block_size), y one token ahead. Order "random" starts each window anywhere; "epoch"
    visits every window at a multiple of block_size once, in an order of its own each epoch, before any comes again.
    In a mixture that holds for the rows of each source, which take turns.
    """

    def __init__(self, tokens: np.ndarray | Tokens, block_size: int, vocab_size: int, seed: int, order: str = "random"):
        assert order in ("random", "epoch"), order
        self._windows = Windows(tokens, block_size, vocab_size)
        self.block_size, self.seed, self.order = block_size, seed, order
        self.masked = self._windows.masked

    def __getitem__(self, rows: slice) -> "Batch":
        """Raises InputError where the split holds an id outside of the vocabulary."""
        return self._windows.read(self.starts(rows))

    def num_targets(self, rows: slice) -> int:
        """How many targets of the rows the loss looks at."""
        return int(np.count_nonzero(self._windows.target_mask(self.starts(rows))))

    def starts(self, rows: slice) -> np.ndarray:
        """The token of the split at which each row begins: int64, (last - first,)."""
        starts = np.empty(rows.stop - rows.start, dtype=np.int64)
        for k, (own, index) in enumerate(_assign_rows(rows, self._windows.sources)):
            seed, (first, tokens, _) = self.seed if k == 0 else derive_seed(self.seed, k), self._windows.sources[k]
            if self.order == "random":
                start = hash64(seed, index) % np.uint64(tokens - self.block_size)
            else:
                per_epoch = (tokens - 1) // self.block_size  # windows that do not overlap
                epoch, position = np.divmod(index, np.uint64(per_epoch))
                start = permute(position, hash64(seed, epoch), per_epoch) * np.uint64(self.block_size)
            starts[own] = first + start.astype(np.int64)
        return starts


class EvalWindows:
    """Fixed windows for evaluation: `batches` × `batch_size` of them, evenly spaced over the split, never overlapping
    and so never more than the split holds; `batches` = 0 takes every full window. In a mixture its sources have their
    shares of the windows, and the first to come to its end ends them. `len()` counts them; `x, y = windows[first:last]`
    as in `Rows`, cut off at the end."""

    def __init__(self, tokens: np.ndarray | Tokens, block_size: int, batches: int, batch_size: int, vocab_size: int):
        self._windows = Windows(tokens, block_size, vocab_size)
        sources = self._windows.sources
        full, weights = [(source.tokens - 1) // block_size for source in sources], [s.weight for s in sources]
        most = min(-(-n * sum(weights) // weight) for n, weight in zip(full, weights, strict=True)) + len(sources)
        while (_part_counts(np.array([most]), weights)[:, 0] > full).any():
            most -= 1
        count = min(most, batches * batch_size) or most
        self._starts = np.empty(count, dtype=np.int64)
        for (own, index), n, source in zip(_assign_rows(slice(0, count), sources), full, sources, strict=True):
            self._starts[own] = source.first + index.astype(np.int64) * n // max(len(index), 1) * block_size

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, windows: slice) -> "Batch":
        return self._windows.read(self._starts[windows])


class SlidingWindows:
    """All of a source in windows that advance by `stride` tokens (1 to block_size), in batches of so many rows:
    iterating gives where in the source they start, (B,), and `x, y` as `Rows` has them, (B, block_size) and at the end
    one shorter row. In y only the last `stride` targets of a window count, of the first all, so that each token after
    the source's first is a target once; the others are −1. `len()` counts the batches."""

    def __init__(self, tokens: Tokens, source: MixturePart, block_size: int, stride: int, vocab_size: int, rows: int):
        self._of = partial(Windows, tokens, vocab_size=vocab_size)
        self.source, self.block_size, self.stride = source, block_size, stride
        starts = np.arange(0, max(source.tokens - 1 - block_size, 0) + stride, stride)
        self._batches = [starts[:-1][first : first + rows] for first in range(0, len(starts) - 1, rows)] + [starts[-1:]]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> "Iterator[tuple[np.ndarray, torch.Tensor, torch.Tensor]]":
        """Raises InputError where the split holds an id outside of the vocabulary."""
        for starts in self._batches:
            length = min(self.block_size, self.source.tokens - 1 - int(starts[0]))
            x, y = self._of(block_size=length).read(self.source.first + starts)
            for row in y[int(starts[0] == 0) :]:
                row[: self.block_size - self.stride] = -1
            yield starts, x, y
