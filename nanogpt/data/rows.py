"""Rows as a pure function of (seed, sample index), and windows for evaluation."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from nanogpt.data.dataset import MixturePart, Tokens
from nanogpt.hashing import derive_seed, hash64, permute

if TYPE_CHECKING:
    import torch

    from nanogpt.distributed import World

    Batch = tuple[torch.Tensor, torch.Tensor]
    SoftTargets = Sequence[torch.Tensor]  # ids and probabilities, each (rows, T, K)
    MakeSoftTargets = Callable[[torch.Tensor, torch.Tensor], SoftTargets]  # of inputs and targets (rows, T)


class Windows:
    """Read windows of a split by their start. Ids are checked on the host, before a bad one reaches the device."""

    def __init__(self, tokens: np.ndarray | Tokens, block_size: int, vocab_size: int):
        self.tokens = Tokens.of(tokens)
        self.block_size = block_size
        self.vocab_size = vocab_size

    def read(self, starts: np.ndarray) -> "Batch":
        """Inputs, and targets one token later, −1 where the loss mask is 0: int64, (len(starts), block_size).

        Raises InputError for an id outside of the vocabulary.
        """
        import torch

        T = self.block_size
        x, y = np.empty((2, len(starts), T), dtype=np.int64)
        for row, start in enumerate(starts.tolist()):
            ids = self.tokens[start : start + T + 1]
            x[row] = ids[:-1]
            y[row] = ids[1:]
        unsigned = x.view(np.uint64)  # where negative ids are large
        if len(starts) and max(unsigned.max(), y[:, -1].view(np.uint64).max()) >= self.vocab_size:
            for start in starts.tolist():
                self.tokens.check_ids(start, start + T + 1, self.vocab_size)
        if self.tokens.has_mask:
            y[self.target_mask(starts) == 0] = -1
        return torch.from_numpy(x), torch.from_numpy(y)

    def target_mask(self, starts: np.ndarray) -> np.ndarray:
        """1 for each target that counts in the windows, else 0: uint8, (len(starts), block_size)."""
        T = self.block_size
        mask = np.empty((len(starts), T), dtype=np.uint8)
        for row, start in enumerate(starts.tolist()):
            mask[row] = self.tokens.mask(start + 1, start + 1 + T)
        return mask


def _rows_per_part(rows: np.ndarray, weights: Sequence[int]) -> np.ndarray:
    """Of the first `rows` rows, the number that comes from each part: int64, (parts, len(rows)).

    Each part takes its share of what the parts before it leave, rounded down. A part is off its share by fewer
    rows than there are parts.
    """
    left = rows.astype(np.int64)
    counts = []
    for k, weight in enumerate(weights):
        counts.append(left * weight // sum(weights[k:]))
        left = left - counts[-1]
    return np.stack(counts)


def _assign_rows(rows: slice, parts: Sequence[MixturePart]) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each part a mask of the rows that are its own, and their numbers among all of its own (uint64)."""
    assert 0 <= rows.start <= rows.stop, rows
    counts = _rows_per_part(np.arange(rows.start, rows.stop + 1), [part.weight for part in parts])
    return [(np.diff(own) > 0, np.arange(own[0], own[-1], dtype=np.uint64)) for own in counts]


class Rows:
    """Endless training rows, each a pure function of (seed, sample index): `x, y = rows[first:last]`.

    x and y: int64, (last - first, block_size), y one token ahead. Order "random" starts each window anywhere; "epoch"
    visits every window at a multiple of block_size once per epoch, in an order of that epoch. In a mixture that holds
    for the rows of each part.
    """

    def __init__(
        self,
        tokens: np.ndarray | Tokens,
        block_size: int,
        vocab_size: int,
        seed: int,
        order: str = "random",
        soft_targets: "MakeSoftTargets | None" = None,
    ):
        assert order in ("random", "epoch"), order
        self._windows = Windows(tokens, block_size, vocab_size)
        self.block_size = block_size
        self.seed = seed
        self.order = order
        self.soft_targets = soft_targets
        self.has_mask = self._windows.tokens.has_mask

    def __getitem__(self, rows: slice) -> "Batch":
        """Raises InputError where the split holds an id outside of the vocabulary."""
        return self._windows.read(self.starts(rows))

    def num_targets(self, rows: slice) -> int:
        """The number of targets of these rows that count in the loss."""
        return int(np.count_nonzero(self._windows.target_mask(self.starts(rows))))

    def starts(self, rows: slice) -> np.ndarray:
        """The token of the split at which each row starts: int64, (last - first,)."""
        parts = self._windows.tokens.parts
        starts = np.empty(rows.stop - rows.start, dtype=np.int64)
        for k, (own, index) in enumerate(_assign_rows(rows, parts)):
            seed = self.seed if k == 0 else derive_seed(self.seed, k)
            if self.order == "random":
                start = hash64(seed, index) % np.uint64(parts[k].tokens - self.block_size)
            else:
                per_epoch = (parts[k].tokens - 1) // self.block_size  # windows that do not overlap
                epoch, position = np.divmod(index, np.uint64(per_epoch))
                start = permute(position, hash64(seed, epoch), per_epoch) * np.uint64(self.block_size)
            starts[own] = parts[k].first + start.astype(np.int64)
        return starts


class StepBatch:
    """The rows of one update that a rank reads, in micro-batches."""

    def __init__(
        self,
        rows: Rows,
        first_row: int,
        num_rows: int,  # of the update, over all ranks
        micro_batch: int,  # rows of a forward pass
        world: "World",
        seed: int,
        step: int,
        dropout: float,
    ):
        self.rows = rows
        self.micro_batch = micro_batch
        self.world = world
        self.noise_key = (seed, step) if dropout else None
        rows_per_rank = num_rows // world.size
        self.begin = first_row + world.rank * rows_per_rank
        self.end = self.begin + rows_per_rank
        self.last = rows_per_rank // micro_batch - 1  # number of the last micro-batch
        self.num_targets = num_rows * rows.block_size
        if rows.has_mask:
            self.num_targets = max(rows.num_targets(slice(first_row, first_row + num_rows)), 1)

    def micro_batches(self) -> "Iterator[tuple[torch.Tensor, torch.Tensor, SoftTargets | None, float]]":
        """Inputs, targets and soft targets of micro_batch rows on the device, and the weight of their mean loss.

        The weight is their share of the update's targets, so that every target counts the same in whichever
        micro-batch it is; times the number of ranks, over which the gradients are averaged.
        """
        make_soft_targets = self.rows.soft_targets
        for row in range(self.begin, self.end, self.micro_batch):
            x, y = self.rows[row : row + self.micro_batch]
            num_targets = int((y >= 0).sum()) if self.rows.has_mask else y.numel()
            weight = num_targets * self.world.size / self.num_targets
            soft_targets = self.world.to_device(*make_soft_targets(x, y)) if make_soft_targets else None
            x, y = self.world.to_device(x, y)
            yield x, y, soft_targets, weight

    def seed_dropout(self, i: int) -> None:
        """Make the dropout of micro-batch i a function of seed, step, micro-batch and rank."""
        if self.noise_key:
            import torch

            torch.manual_seed(derive_seed(*self.noise_key, i, self.world.rank))


class EvalWindows:
    """Fixed windows for evaluation, evenly spaced over the split and never overlapping: `x, y = windows[first:last]`.

    `batches` × `batch_size` of them, at most all that the split holds; `batches` = 0 takes all. In a mixture each
    part gets its share of the windows, and the first part to run out limits them all. A slice past the end is shorter.
    """

    def __init__(self, tokens: np.ndarray | Tokens, block_size: int, batches: int, batch_size: int, vocab_size: int):
        self._windows = Windows(tokens, block_size, vocab_size)
        self.block_size = block_size
        self.vocab_size = vocab_size
        parts = self._windows.tokens.parts
        weights = [part.weight for part in parts]
        available = [(part.tokens - 1) // block_size for part in parts]

        # The most windows of which each part can give its share. Rounding moves a share by less than len(parts) rows:
        # begin above, and step down. In integers, as a product may exceed the 53 bits of a float.
        limit = min(-(-n * sum(weights) // weight) for n, weight in zip(available, weights, strict=True)) + len(parts)
        while (_rows_per_part(np.array([limit]), weights)[:, 0] > available).any():
            limit -= 1
        count = min(limit, batches * batch_size) or limit

        self._starts = np.empty(count, dtype=np.int64)
        for part, n, (own, index) in zip(parts, available, _assign_rows(slice(0, count), parts), strict=True):
            self._starts[own] = part.first + index.astype(np.int64) * n // max(len(index), 1) * block_size

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, windows: slice) -> "Batch":
        return self._windows.read(self._starts[windows])


class SlidingWindows:
    """All of a part in windows that advance by `stride` tokens (1 to block_size), in batches of `rows` rows.

    Iterating gives the starts of the rows in the part, (B,), and `x, y` as `Rows` has them, (B, block_size); the last
    batch is a single row, perhaps shorter. Only the last `stride` targets of a window count, the others are −1; of the
    first window all count. So each token after the first is a target once. `len()` counts the batches.
    """

    def __init__(self, tokens: Tokens, part: MixturePart, block_size: int, stride: int, vocab_size: int, rows: int):
        self._make_windows = partial(Windows, tokens, vocab_size=vocab_size)
        self.part = part
        self.block_size = block_size
        self.stride = stride
        starts = np.arange(0, max(part.tokens - 1 - block_size, 0) + stride, stride)
        full = starts[:-1]
        self._batches = [full[first : first + rows] for first in range(0, len(full), rows)] + [starts[-1:]]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> "Iterator[tuple[np.ndarray, torch.Tensor, torch.Tensor]]":
        """Raises InputError where the split holds an id outside of the vocabulary."""
        for starts in self._batches:
            length = min(self.block_size, self.part.tokens - 1 - int(starts[0]))
            x, y = self._make_windows(block_size=length).read(self.part.first + starts)
            is_first = int(starts[0]) == 0
            y[int(is_first) :, : self.block_size - self.stride] = -1
            yield starts, x, y
