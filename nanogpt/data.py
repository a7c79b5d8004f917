"""Datasets: token files and how to write them, and rows as a pure function of (seed, sample index).

A dataset is a folder with `train.bin` and `val.bin` (headerless little-endian uint16, or uint32 above 65,536 ids),
`tokenizer.json` and `meta.json`. A large split is cut into shards, `train-00000.bin` and so on; beside each file may
stand a loss mask, `train.mask`: a byte a token, 0 where the loss does not look at it. nanoGPT's own folders, with
`meta.pkl` or nothing beside the `.bin` files, will do.
"""

import argparse
import bisect
import contextlib
import difflib
import hashlib
import http.client
import itertools
import json
import math
import mmap
import os
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nanogpt import InputError
from nanogpt.files import matches_schema, read_json
from nanogpt.tokenizer import Tokenizer, atomic_write

if TYPE_CHECKING:
    import torch

    Batch = tuple[torch.Tensor, torch.Tensor]

FORMAT = 1  # of meta.json
PARTS = 10**6  # into which the rows of a mixture are divided


def token_dtype(vocab_size: int | None) -> np.dtype:
    """The type of ids on disk."""
    return np.dtype("<u4" if vocab_size and vocab_size > 65_536 else "<u2")


# ---- reading


def _homes() -> list[Path]:
    """Where datasets are looked for by name."""
    return [Path("data"), Path(__file__).resolve().parent.parent / "data"]


def resolve(dataset: str | Path) -> Path:
    """The folder of `dataset`: a path, or a name under `data/` here or beside the package.

    Raises InputError where no prepared dataset is found, with the command that prepares it.
    """
    homes = _homes()
    folders = [Path(dataset), *(home / dataset for home in homes)]
    for folder in folders:
        if any(os.path.exists(folder / f"{split}.bin") for split in ("train", "val", "train-00000", "val-00000")):
            return folder
    for folder in folders:
        if os.path.exists(folder / "prepare.py"):
            raise InputError(f"dataset {str(dataset)!r} is not prepared yet: run `python {folder / 'prepare.py'}`")
    names = sorted({path.name for home in homes if home.is_dir() for path in home.iterdir() if path.is_dir()})
    close = difflib.get_close_matches(str(dataset), names, n=1)
    hint = f"did you mean {close[0]}?" if close else f"give a folder's path, or of data/ {', '.join(names) or 'none'}"
    raise InputError(f"there is no dataset {str(dataset)!r} (a folder with train.bin and val.bin): {hint}")


class Shard(NamedTuple):
    """A piece of a split: its ids and their loss mask (None: all count), opened when a row needs them."""

    name: str
    tokens: int
    ids: Callable[[], np.ndarray]
    mask: Callable[[], np.ndarray] | None = None


class MixturePart(NamedTuple):
    """A range of a split's tokens, and how many parts of the rows come from there."""

    first: int
    tokens: int
    weight: int


class Tokens:
    """A split's ids, numbered through over all its shards and, in a mixture, over all its sources.

    `tokens[first:last]` (uint16 or uint32) and `tokens.mask(first, last)` (uint8) read these alone. Files are
    memory-mapped, only so many at a time as the system lets a process open.

    Attributes: `sources`; `masked`, whether there is a loss mask; `bytes_per_token` of the text, None where unknown.
    """

    def __init__(self, shards: Sequence[Shard]):
        self.shards, self.ends = shards, [*itertools.accumulate(shard.tokens for shard in shards)]
        self.sources = [MixturePart(0, len(self), 1)]
        self.masked = any(shard.mask for shard in shards)
        self.bytes_per_token: float | None = None
        self._opened = lru_cache(_most_maps())(lambda read: read())

    @classmethod
    def of(cls, ids: "np.ndarray | Tokens") -> "Tokens":
        """Ids in memory, (tokens,), as a split."""
        name = getattr(ids, "filename", None) or "the dataset"
        return ids if isinstance(ids, Tokens) else cls([Shard(name, len(ids), lambda: np.asarray(ids))])

    @classmethod
    def mixed(cls, parts: "Sequence[Tokens]", weights: Sequence[int]) -> "Tokens":
        """Several splits as one, whose rows come from them in shares of these weights."""
        mixture = cls([shard for part in parts for shard in part.shards])
        firsts = itertools.accumulate(map(len, parts), initial=0)
        mixture.sources = [MixturePart(*facts) for facts in zip(firsts, map(len, parts), weights, strict=False)]
        sizes = [part.bytes_per_token for part in parts]
        if None not in sizes:
            mixture.bytes_per_token = float(np.average(np.array(sizes, float), weights=weights))
        return mixture

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, span: slice) -> np.ndarray:
        first, last, _ = span.indices(len(self))
        return _joined([self._opened(shard.ids)[a:b] for shard, a, b in self.pieces(first, last)])

    def mask(self, first: int, last: int) -> np.ndarray:
        """1 for each token that counts as a target, else 0."""
        ones = partial(np.ones, dtype=np.uint8)
        found = self.pieces(first, last)
        return _joined([self._opened(shard.mask)[a:b] if shard.mask else ones(b - a) for shard, a, b in found])

    def pieces(self, first: int, last: int) -> Iterator[tuple[Shard, int, int]]:
        """The shards that hold the tokens from first to last, each with the range of them in it."""
        k = bisect.bisect_right(self.ends, first)
        while first < last:
            begin, end = self.ends[k] - self.shards[k].tokens, min(last, self.ends[k])
            yield self.shards[k], first - begin, end - begin
            first, k = end, k + 1

    def bits_per_byte(self, loss: float) -> float | None:
        """What a mean loss in nats per token is in bits per byte of text, by which tokenizers compare; None where
        the bytes are not known, or the loss looks at a part of the tokens alone."""
        return loss / math.log(2) / self.bytes_per_token if self.bytes_per_token and not self.masked else None


def _joined(pieces: list[np.ndarray]) -> np.ndarray:
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _most_maps() -> int:
    """How many files a split may hold open: each map keeps a descriptor, and a run has other uses for them."""
    try:
        import resource

        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    except ImportError:  # Windows
        most = 512
    return min(most if most > 0 else 2**14, 2**14) // 4  # negative: without limit


def _map(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    """A file's numbers, read from the disk where they are looked at. Raises InputError where they are gone."""
    try:
        with path.open("rb", buffering=0) as file:  # as np.memmap does, in half the time
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype, count)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read any more ({error}): put it back, or prepare the data again") from error


class Dataset:
    """An opened dataset, or several mixed.

    Attributes: `name`, `folder` (of a mixture, the first's), `meta` (of meta.json, {} without one), `train` and `val`
    (`Tokens`; only those opened), `tokenizer` (None where the folder has none), `vocab_size` (None where nothing tells
    it: then the ids are GPT-2's by nanoGPT's convention).
    """

    train: Tokens
    val: Tokens

    def __init__(self, folder: Path, meta: dict[str, Any]):
        self.name, self.folder, self.meta = folder.resolve().name, folder, meta

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """Read at first use. Raises InputError for a damaged file."""
        return Tokenizer.load(self.folder)

    @cached_property
    def vocab_size(self) -> int | None:
        return self.meta["vocab_size"] if self.meta else self.tokenizer.vocab_size if self.tokenizer else None

    @property
    def end_of_text(self) -> int | None:
        """The id that ends each document; None where there is none."""
        known = self.meta.get("end_of_text")
        return known if known is not None else self.tokenizer.end_of_text if self.tokenizer else None


def open_dataset(
    dataset: str | Path,
    *,
    block_size: int,
    vocab_size: int | None = None,
    splits: Sequence[str] = ("train", "val"),
    verify: bool = False,
) -> Dataset:
    """Open and check a dataset: a name under `data/` or a path; or several in shares, "mine:0.7,data/other:0.3".

    `vocab_size` is the model's, where it is known. The files' sizes are always checked; `verify` also reads them whole
    and compares their SHA-256 with meta.json's, where there is one (that takes seconds a gigabyte). In a mixture
    rows and evaluation windows alike come from its sources in these shares.
    Raises InputError with a line for each fault: no such dataset; files missing, empty, cut short, or not those that
    meta.json describes; ids too large for the model; a split with no room for one block and the token after it;
    sources of a mixture whose tokenizers differ.
    """
    if shares := _shares(str(dataset)):
        return _mixture(
            str(dataset), shares, block_size=block_size, vocab_size=vocab_size, splits=splits, verify=verify
        )
    found = Dataset(resolve(dataset), {})
    path = found.folder / "meta.json"
    if path.exists():
        try:
            found.meta = _read_meta(path)
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is damaged ({error!r}): prepare the dataset again") from error
    faults = []
    dtype = token_dtype(found.vocab_size)
    for split in splits:
        facts = found.meta.get("splits", {}).get(split, {})
        shards = []
        for listed in facts.get("shards") or [{"file": f"{split}.bin"} | facts]:
            path = found.folder / listed["file"]
            fault = _fault(path, dtype, listed.get("tokens"), listed.get("sha256") if verify else None)
            count = 0 if fault else path.stat().st_size // dtype.itemsize
            shard = Shard(str(path), count, partial(_map, path, dtype, count))
            if found.meta.get("loss_mask") and not fault:
                path, byte = path.with_suffix(".mask"), np.dtype(np.uint8)
                fault = _fault(path, byte, count, listed.get("mask_sha256") if verify else None)
                shard = shard._replace(mask=partial(_map, path, byte, count))
            if fault:
                faults.append(fault)
                break  # where one is missing, a thousand may be
            shards.append(shard)
        else:
            tokens = Tokens(shards)
            if len(tokens) < block_size + 1:
                faults.append(
                    f"{path} is shorter than one block: {len(tokens):,} tokens, block_size {block_size} needs "
                    f"{block_size + 1:,}; set --block_size={max(len(tokens) - 1, 1)} or less, or prepare a longer text"
                )
            tokens.bytes_per_token = facts.get("bytes", 0) / len(tokens) or None
            setattr(found, split, tokens)
    largest = found.meta.get("largest_id", 0)
    if vocab_size is not None and largest >= vocab_size:
        faults.append(
            f"{found.folder} holds id {largest}, but the model's vocab_size is {vocab_size}: "
            "use the dataset that the model was made for, or a new model"
        )
    if faults:
        raise InputError("\n".join(faults))
    return found


def _fault(path: Path, dtype: np.dtype, tokens: int | None, sha256: str | None) -> str | None:
    """What is wrong with a file that should hold so many tokens of a dtype and have this hash, each if known; None
    where nothing is."""
    again = "prepare the dataset again"
    if not os.path.isfile(path) or not os.access(path, os.R_OK):
        return f"{path} is {'unreadable' if os.path.exists(path) else 'missing'}: {again}"
    size = path.stat().st_size
    there = size // dtype.itemsize
    if size == 0:
        return f"{path} is empty: {again}"
    if size % dtype.itemsize:
        return f"{path} is cut short: {size} bytes are not whole {dtype.name} tokens; {again}"
    if tokens is not None and tokens != there:
        return f"{path} holds {there:,} tokens where meta.json counts {tokens:,}: {again}"
    if sha256 and file_sha256(path) != sha256:
        return f"{path} is not the file that meta.json describes (its SHA-256 differs): {again}"
    return None


def _shares(dataset: str) -> dict[str, float]:
    """The sources of "mine:0.7,other:0.3" with their shares; {} for what is one dataset: a path may hold a colon.
    Raises InputError where only a part of it reads like a share."""
    if ":" not in dataset or any(os.path.isdir(home / dataset) for home in (Path(), *_homes())):
        return {}
    shares: dict[str, float] = {}
    for source in dataset.split(","):
        name, _, share = source.strip().rpartition(":")
        try:
            value = float(share)
        except ValueError:
            value = math.nan
        if not (name and 0 < value < math.inf) or name in shares:
            raise InputError(
                f"dataset={dataset}: {source.strip()!r} is no source of a mixture; write each once with its share, "
                "as in --dataset=mine:0.7,other:0.3"
            )
        shares[name] = value
    return shares


def _mixture(dataset: str, shares: dict[str, float], **options: Any) -> Dataset:
    """The mixture of datasets in these shares; options are those of `open_dataset`."""
    found, faults = [], []
    for name in shares:
        try:
            found.append(open_dataset(name, **options))
        except InputError as error:
            faults.append(str(error))
    if faults:
        raise InputError("\n".join(faults))
    first = found[0]
    for other in found[1:]:
        ours, theirs = first.tokenizer, other.tokenizer
        if first.vocab_size != other.vocab_size or (ours and theirs and not ours.same_as(theirs)):
            raise InputError(
                f"dataset={dataset}: {first.folder} and {other.folder} have different tokenizers; "
                "prepare them with the same"
            )
    weights = [max(round(share * PARTS / sum(shares.values())), 1) for share in shares.values()]
    mixture = Dataset(first.folder, first.meta)
    mixture.name = dataset
    known = [one.tokenizer for one in found if one.tokenizer]
    if known:  # the one with a chat template, if there is one
        mixture.tokenizer = max(known, key=lambda tokenizer: tokenizer.template is not None)
    for split in options["splits"]:
        setattr(mixture, split, Tokens.mixed([getattr(one, split) for one in found], weights))
    return mixture


def _read_meta(path: Path) -> dict[str, Any]:
    """meta.json, with what the code relies on checked. Raises OSError, and ValueError where that is not there."""
    meta = read_json(path)
    if meta.get("format") != FORMAT:
        raise ValueError(f"format {meta.get('format')!r} is not {FORMAT}, so another version of nanogpt wrote it")
    known = {"tokenizer": str, "vocab_size": int, "largest_id": int, "dtype": str, "splits": dict}
    complete = matches_schema(meta, known) and matches_schema(meta.get("end_of_text"), (int, None))
    complete = complete and all(_listed(facts, bool(meta.get("loss_mask"))) for facts in meta["splits"].values())
    if not complete or not meta["largest_id"] < meta["vocab_size"] <= 2**32:  # ids have four bytes at most
        raise ValueError("its numbers do not fit together")
    if meta["dtype"] != token_dtype(meta["vocab_size"]).name:
        raise ValueError("its numbers do not fit together")
    return meta


def _listed(facts: Any, masked: bool) -> bool:
    """Whether meta.json's facts of a split name its file, or its shards, as the code relies on it."""
    file = {"tokens": int, "sha256": str} | ({"mask_sha256": str} if masked else {})
    if not isinstance(facts, dict) or not matches_schema(facts.get("bytes", 0), int):
        return False
    if "shards" not in facts:
        return matches_schema(facts, file)
    return (
        matches_schema(facts, {"tokens": int, "shards": [{"file": str} | file]})
        and sum(shard["tokens"] for shard in facts["shards"]) == facts["tokens"]
        and all(shard["file"] == Path(shard["file"]).name for shard in facts["shards"])
    )


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- rows


def _hash(*values: Any) -> np.ndarray:
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


def mix(*ints: int) -> int:
    """One seed, 0 to 2**63 - 1, from several integers."""
    return int(_hash(*ints)[0] >> np.uint64(1))


def hashed_uniform(*values: Any) -> np.ndarray:
    """A number of [0, 1) for each set of integers, of which some or all are given as arrays (n,) of uint64."""
    return (_hash(*values) >> np.uint64(11)) * 2.0**-53


def _permuted(positions: np.ndarray, keys: np.ndarray, n: int) -> np.ndarray:
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
            left, right = right, left ^ (_hash(turn, keys[outside], right) & low)
        out[outside] = left << half | right
        outside = outside[out[outside] >= n]
    return out


class _Windows:
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


def _counts(index: np.ndarray, weights: Sequence[int]) -> np.ndarray:
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
    counts = _counts(np.arange(rows.start, rows.stop + 1), [source.weight for source in sources])
    return [(np.diff(own) > 0, np.arange(own[0], own[-1], dtype=np.uint64)) for own in counts]


class Rows:
    """Training rows without end, each a pure function of (seed, sample index): `x, y = rows[first:last]`.

    x and y: int64, (last - first, block_size), y one token ahead. Order "random" starts each window anywhere; "epoch"
    visits every window at a multiple of block_size once, in an order of its own each epoch, before any comes again.
    In a mixture that holds for the rows of each source, which take turns.
    """

    def __init__(self, tokens: np.ndarray | Tokens, block_size: int, vocab_size: int, seed: int, order: str = "random"):
        assert order in ("random", "epoch"), order
        self._windows = _Windows(tokens, block_size, vocab_size)
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
            seed, (first, tokens, _) = self.seed if k == 0 else mix(self.seed, k), self._windows.sources[k]
            if self.order == "random":
                start = _hash(seed, index) % np.uint64(tokens - self.block_size)
            else:
                per_epoch = (tokens - 1) // self.block_size  # windows that do not overlap
                epoch, position = np.divmod(index, np.uint64(per_epoch))
                start = _permuted(position, _hash(seed, epoch), per_epoch) * np.uint64(self.block_size)
            starts[own] = first + start.astype(np.int64)
        return starts


class EvalWindows:
    """Fixed windows for evaluation: `batches` × `batch_size` of them, evenly spaced over the split, never overlapping
    and so never more than the split holds; `batches` = 0 takes every full window. In a mixture its sources have their
    shares of the windows, and the first to come to its end ends them. `len()` counts them; `x, y = windows[first:last]`
    as in `Rows`, cut off at the end."""

    def __init__(self, tokens: np.ndarray | Tokens, block_size: int, batches: int, batch_size: int, vocab_size: int):
        self._windows = _Windows(tokens, block_size, vocab_size)
        sources = self._windows.sources
        full, weights = [(source.tokens - 1) // block_size for source in sources], [s.weight for s in sources]
        most = min(-(-n * sum(weights) // weight) for n, weight in zip(full, weights, strict=True)) + len(sources)
        while (_counts(np.array([most]), weights)[:, 0] > full).any():
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
        self._of = partial(_Windows, tokens, vocab_size=vocab_size)
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


# ---- writing


@contextlib.contextmanager
def output_directory(folder: Path) -> Iterator[None]:
    """Makes `folder`. Raises InputError where that, or what the block writes into it, fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise InputError(
            f"{folder} could not be written ({error}): make room there, or give another folder by --out"
        ) from error


def write_text(folder: str | Path, text: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """Make a dataset of one text, 90% train and 10% val. Returns its meta. Raises InputError as `write_dataset`."""
    cut = int(len(text) * 0.9)  # of the characters, where nanoGPT cuts
    parts = {"train": text[:cut], "val": text[cut:]}
    return write_dataset(
        folder,
        {split: [tokenizer.encode_ordinary(part)] for split, part in parts.items()},
        tokenizer,
        {split: len(part.encode()) for split, part in parts.items()},
    )


def write_dataset(
    folder: str | Path,
    splits: Mapping[str, Iterable[np.ndarray]],
    tokenizer: Tokenizer,
    text_bytes: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Write `<split>.bin` of each split's pieces (arrays of ids), `tokenizer.json`, last `meta.json`; return the meta.

    `text_bytes`: bytes of UTF-8 text that went into each split. Old files stay until the new ones are complete, and an
    interruption leaves nothing half new that `open_dataset` would take. Raises InputError for a split without tokens,
    and where the folder or the disk does not take the files.
    """
    folder = Path(folder)
    dtype = token_dtype(tokenizer.vocab_size)
    meta: dict[str, Any] = {"format": FORMAT, "tokenizer": tokenizer.name, "vocab_size": tokenizer.vocab_size}
    meta |= {"largest_id": 0, "dtype": dtype.name, "splits": {}}
    described = ["meta.json", *(f"{split}.bin" for split in splits)]
    with output_directory(folder), contextlib.ExitStack() as together:
        # They take their places in reverse order: the tokenizer first, meta.json last.
        new = {name: together.enter_context(atomic_write(folder / name)) for name in (*described, "tokenizer.json")}
        for split, pieces in splits.items():
            tokens, digest = 0, hashlib.sha256()
            with new[f"{split}.bin"].open("wb") as file:
                for piece in filter(len, pieces):
                    largest = int(piece.max())
                    assert largest < tokenizer.vocab_size, f"id {largest} is not the tokenizer's"
                    meta["largest_id"] = max(meta["largest_id"], largest)
                    data = piece.astype(dtype).tobytes()
                    digest.update(data)
                    file.write(data)
                    tokens += len(piece)
            if not tokens:
                raise InputError(f"the {split} split of {folder} would be empty: give a longer text or more documents")
            meta["splits"][split] = {"tokens": tokens, "sha256": digest.hexdigest()}
            if text_bytes:
                meta["splits"][split]["bytes"] = text_bytes[split]
        tokenizer.save(folder, new["tokenizer.json"].name)
        new["meta.json"].write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        # From here on the folder is no dataset, for want of its .bin files, until the new ones take their places.
        for name in described:
            (folder / name).unlink(missing_ok=True)
    return meta


def summary(meta: Mapping[str, Any]) -> str:
    """What a dataset holds, a line for each split and one for the vocabulary."""
    lines = [f"{split}: {facts['tokens']:,} tokens" for split, facts in meta["splits"].items()]
    return "\n".join([*lines, f"vocabulary: {meta['vocab_size']:,} ({meta['tokenizer']})"])


def read_text(path: str | Path) -> str:
    """A UTF-8 file's text, line ends turned to newlines. Raises InputError, with the offset of what is not UTF-8."""
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text: byte 0x{error.object[error.start]:02x} at offset {error.start}; "
            "convert it first, for example with `iconv -t utf-8`"
        ) from error
    except OSError as error:
        raise InputError(f"{path} could not be read ({error.strerror}): give a text file with --input=FILE") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def fetch(url: str, path: Path, sha256: str) -> Path:
    """Download `url`, of a size for memory, to `path` unless it is there already; return `path`.

    Raises InputError where the network fails or the file is not the one with that SHA-256.
    """
    if not path.exists():
        try:
            with urllib.request.urlopen(url, timeout=60) as response:
                content = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise InputError(f"{url} could not be downloaded ({error}): give a file with --input=FILE") from error
        with output_directory(path.parent), atomic_write(path) as partial:
            partial.write_bytes(content)
    if file_sha256(path) != sha256:
        raise InputError(f"{path} is not the expected file (its SHA-256 differs): delete it, or give --input={path}")
    return path


def tiny_shakespeare(about: str | None, home: Path, **options: str) -> tuple[str, argparse.Namespace]:
    """The command line of the scripts that prepare it: its text, or that of --input, and the flags, of which --out is
    the folder to write to. options: further flags, each with its help."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--input", type=Path, help="any UTF-8 text at hand, instead of the download")
    parser.add_argument("--out", type=Path, default=home, help="folder to write to (default: beside the script)")
    for name, told in options.items():
        parser.add_argument(f"--{name}", help=told)
    args = parser.parse_args()
    url = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
    sha256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    text = read_text(args.input or fetch(url, args.out / "input.txt", sha256))
    print(f"{args.out}: {len(text):,} characters")
    return text, args
