"""Datasets: token files and how to write them, and rows as a pure function of (seed, sample index).

A dataset is a folder with `train.bin` and `val.bin` (headerless little-endian uint16, or uint32 above 65,536 ids),
`tokenizer.json` and `meta.json`. A large split is cut into shards, `train-00000.bin` and so on; beside each file may
stand a loss mask, `train.mask`: a byte a token, 0 where the loss does not look at it. nanoGPT's own folders, with
`meta.pkl` or nothing beside the `.bin` files, will do.
"""

import bisect
import difflib
import itertools
import math
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nanogpt.errors import InputError
from nanogpt.files import file_sha256, matches_schema, read_json
from nanogpt.text.tokenizer import Tokenizer

FORMAT = 1  # of meta.json
PARTS = 10**6  # into which the rows of a mixture are divided


def token_dtype(vocab_size: int | None) -> np.dtype:
    """The type of ids on disk."""
    return np.dtype("<u4" if vocab_size and vocab_size > 65_536 else "<u2")


def _homes() -> list[Path]:
    """Where datasets are looked for by name."""
    return [Path("data"), Path(__file__).resolve().parents[2] / "data"]


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
