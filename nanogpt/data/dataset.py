"""Datasets: open and check token files, one dataset or a mixture of several.

A dataset is a folder with `train.bin` and `val.bin` (headerless little-endian uint16, or uint32 above 65,536 ids),
`tokenizer.json` and `meta.json`. A large split is cut into shards, `train-00000.bin` and so on. Beside each file may be
a loss mask, `train.mask`: a byte per token, 0 where the token is no target of the loss. nanoGPT's own folders, with
`meta.pkl` or nothing beside the `.bin` files, are accepted, and token files of other programs (token_shards.py).
"""

import bisect
import hashlib
import itertools
import math
import os
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NotRequired, TypedDict

import numpy as np

from nanogpt.data.token_shards import (
    AGAIN,
    Layout,
    find_separator,
    is_token_file,
    list_folder,
    open_file,
    raise_for_missing,
    read_layout,
    split_of,
    token_files,
)
from nanogpt.errors import InputError, raise_problems, suggest
from nanogpt.files import read_json
from nanogpt.schema import Count, Limits, check
from nanogpt.text.tokenizer import GPT2_VOCAB, Tokenizer

FORMAT = 1  # version of meta.json
WEIGHT_SUM = 10**6  # sum of the integer weights of a mixture's parts
MAX_SHARE = 1e9  # largest share that may be given to a part


class FileMeta(TypedDict):
    """A split in meta.json, which is a single file or `shards`; or one of those."""

    tokens: Count
    file: NotRequired[str]
    sha256: NotRequired[str]
    mask_sha256: NotRequired[str]
    bytes: NotRequired[Count]  # of UTF-8 text
    shards: NotRequired[list["FileMeta"]]


class Meta(TypedDict):
    """The keys of meta.json."""

    format: int
    tokenizer: str
    vocab_size: Annotated[int, Limits(ge=1, le=2**32)]
    largest_id: Count
    dtype: str
    end_of_text: NotRequired[Count | None]
    loss_mask: NotRequired[bool]
    splits: dict[str, FileMeta]


def dtype_for(vocab_size: int | None) -> np.dtype:
    """The type of ids on disk."""
    return np.dtype("<u4" if vocab_size and vocab_size > 65_536 else "<u2")


# --- A split


class Shard(NamedTuple):
    """A token file: `ids()` and, unless all tokens are targets, `mask()` map it."""

    name: str
    tokens: int
    ids: Callable[[], np.ndarray]
    mask: Callable[[], np.ndarray] | None = None
    sha256: str | None = None  # of its files, by meta.json; None: the dtype and the tokenizer are assumptions


class MixturePart(NamedTuple):
    """A range of a split's tokens, and the weight of its rows among those of all parts."""

    first: int
    tokens: int
    weight: int


class Tokens:
    """The ids of a split, numbered across its shards and, in a mixture, across its parts.

    `tokens[first:last]` (in the files' type) and `tokens.mask(first, last)` (uint8) read a range. Files are
    memory-mapped when a range needs them, only as many at a time as the system lets a process open.

    Attributes: `parts` of the mixture; `has_mask`, whether some tokens are no targets; `bytes_per_token` of the text,
    None where unknown.
    """

    def __init__(self, shards: Sequence[Shard]):
        self.shards = shards
        self.parts = [MixturePart(0, sum(shard.tokens for shard in shards), 1)]
        self.has_mask = any(shard.mask for shard in shards)
        self.bytes_per_token: float | None = None
        self._ends = list(itertools.accumulate(shard.tokens for shard in shards))
        self._map = lru_cache(_max_maps())(lambda map_file: map_file())

    @classmethod
    def of(cls, ids: "np.ndarray | Tokens") -> "Tokens":
        """Ids in memory, (tokens,), as a split."""
        if isinstance(ids, Tokens):
            return ids
        name = getattr(ids, "filename", None) or "the dataset"
        return cls([Shard(name, len(ids), lambda: np.asarray(ids))])

    @classmethod
    def mix(cls, splits: "Sequence[Tokens]", weights: Sequence[int]) -> "Tokens":
        """Several splits as one, whose rows come from them in proportion to the weights."""
        mixture = cls([shard for split in splits for shard in split.shards])
        lengths = [len(split) for split in splits]
        firsts = itertools.accumulate(lengths, initial=0)
        mixture.parts = list(map(MixturePart, firsts, lengths, weights))
        sizes = [split.bytes_per_token for split in splits]
        if None not in sizes:
            mixture.bytes_per_token = float(np.average(np.array(sizes, float), weights=weights))
        return mixture

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, span: slice) -> np.ndarray:
        first, last, _ = span.indices(len(self))
        return _concatenate([self._read(shard.name, shard.ids, a, b) for shard, a, b in self.pieces(first, last)])

    def mask(self, first: int, last: int) -> np.ndarray:
        """1 for each token that counts as a target, else 0."""
        masks = []
        for shard, a, b in self.pieces(first, last):
            masks.append(self._read(shard.name, shard.mask, a, b) if shard.mask else np.ones(b - a, np.uint8))
        return _concatenate(masks)

    def _read(self, name: str, map_file: Callable[[], np.ndarray], first: int, last: int) -> np.ndarray:
        """A range of a file. Raises InputError where it was cut meanwhile: reading beyond its end kills a process."""
        numbers = self._map(map_file)
        base: Any = numbers
        while isinstance(base, np.ndarray):  # a slice of a slice … of the file's memory
            base = base.base
        file = getattr(base, "obj", None)  # None: they are in memory
        if file and file.size() < len(file):
            raise InputError(f"{name} or its mask was cut short while it was read: prepare the data again")
        return numbers[first:last]

    def fingerprint(self) -> str:
        """A hash of the tokens: of the hashes in meta.json, or without them of the length and evenly spaced samples."""
        digest = hashlib.sha256()
        if all(shard.sha256 for shard in self.shards):
            digest.update("".join(str(shard.sha256) for shard in self.shards).encode())
            return digest.hexdigest()
        digest.update(str(len(self)).encode())
        for first in np.linspace(0, max(len(self) - 1024, 0), 256, dtype=np.int64).tolist():
            digest.update(self[first : first + 1024].astype("<u4").tobytes())
        return digest.hexdigest()

    def pieces(self, first: int, last: int) -> Iterator[tuple[Shard, int, int]]:
        """The shards that hold the tokens from first to last, each with the range of them in it."""
        k = bisect.bisect_right(self._ends, first)
        while first < last:
            shard = self.shards[k]
            start = self._ends[k] - shard.tokens
            end = min(last, self._ends[k])
            yield shard, first - start, end - start
            first = end
            k += 1

    def check_ids(self, first: int, last: int, vocab_size: int) -> None:
        """Raise InputError for the first id from first to last that is outside of the vocabulary."""
        for shard, a, b in self.pieces(first, last):
            ids = self._read(shard.name, shard.ids, a, b)
            bad = np.flatnonzero((ids < 0) | (ids >= vocab_size))
            if len(bad):
                fix = "use the dataset that the model was made for, or prepare it again"
                if not shard.sha256:
                    fix += "; or put the tokenizer.json of its ids beside it, or give its --token_dtype"
                raise InputError(
                    f"{shard.name} holds id {ids[bad[0]]} at token {a + bad[0]:,}, but the model's vocab_size is "
                    f"{vocab_size}: {fix}"
                )

    def bits_per_byte(self, loss: float) -> float | None:
        """Convert a mean loss in nats per token; comparable across tokenizers.

        None where the size of the text is unknown, or the loss covers only a part of the tokens.
        """
        if not self.bytes_per_token or self.has_mask:
            return None
        return loss / math.log(2) / self.bytes_per_token


def _concatenate(pieces: list[np.ndarray]) -> np.ndarray:
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _max_maps() -> int:
    """Maps that a split may keep: each takes a file descriptor, and a run needs others."""
    limit = 512
    if os.name == "posix":
        import resource

        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return (min(limit, 2**14) if limit > 0 else 2**14) // 4  # below 0: unlimited


# --- A dataset


class Dataset:
    """An opened dataset, or several mixed.

    Attributes: `name`; `folder` (of a mixture, the first's); `file`, where a single one is the dataset; `meta`, the
    content of meta.json, {} without one; `separators`, the ids at the borders of documents, None for borders without
    one, as far as other programs' files say; `assumes_gpt2`, whether nothing but nanoGPT's convention says what the ids
    mean; `train` and `val` (`Tokens`; only those opened).
    """

    train: Tokens
    val: Tokens

    def __init__(self, path: Path, meta: dict[str, Any]):
        self.name = path.resolve().name
        self.file = path if path.is_file() else None
        self.folder = path.parent if self.file else path
        self.meta = meta
        self.separators: set[int | None] = set()
        self.assumes_gpt2 = False

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """None where the folder has none. Raises InputError for a damaged file."""
        return Tokenizer.load(self.folder)

    @cached_property
    def vocab_size(self) -> int | None:
        """None where it is unknown; the ids are then GPT-2's by nanoGPT's convention."""
        if self.meta:
            return self.meta["vocab_size"]
        return self.tokenizer.vocab_size if self.tokenizer else None

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """A hash of each split's tokens."""
        return {"train": self.train.fingerprint(), "val": self.val.fingerprint()}

    @cached_property
    def end_of_text(self) -> int | None:
        """The id between documents; None where there is none, or parts of a mixture have others."""
        if "end_of_text" in self.meta:
            return self.meta["end_of_text"]
        if self.separators:
            return next(iter(self.separators)) if len(self.separators) == 1 else None
        if self.assumes_gpt2:
            return GPT2_VOCAB - 1
        return self.tokenizer.end_of_text if self.tokenizer else None


def open_dataset(
    dataset: str | Path,
    *,
    block_size: int,
    vocab_size: int | None = None,
    splits: Sequence[str] = ("train", "val"),
    verify: bool = False,
    token_dtype: str | None = None,
) -> Dataset:
    """Open and check a dataset: a name under `data/` or a path; or a mixture, "mine:0.7,data/other:0.3".

    vocab_size: the model's, if known. verify: compare the files with the SHA-256 in meta.json (seconds per gigabyte);
    their sizes are always checked. token_dtype: of ids in files that do not say it; None: nanoGPT's. Rows and
    evaluation windows of a mixture come from its parts in these proportions.

    Raises InputError with a line for each problem: no such dataset; files missing, empty, cut short or not those of
    meta.json; ids too large for the model; a split shorter than a block and the token after it; different tokenizers
    in a mixture.
    """
    options = (block_size, vocab_size, splits, verify, token_dtype)
    shares = _parse_mixture(str(dataset))
    if shares:
        return _open_mixture(str(dataset), shares, splits, lambda part: _open_one(part, *options))
    return _open_one(dataset, *options)


def _data_folders() -> list[Path]:
    return [Path("data"), Path(__file__).resolve().parents[2] / "data"]


def resolve(dataset: str | Path) -> Path:
    """The folder of a dataset: a path, or a name under `data/` here or beside the package.

    Raises InputError where no prepared dataset is found, with the command that prepares it.
    """
    path = _find(dataset)
    return path.parent if path.is_file() else path


def _find(dataset: str | Path) -> Path:
    """The path of a dataset's folder or file. Megatron's pair of files may be named without suffix, as it does."""
    data_folders = _data_folders()
    paths = [Path(dataset), *(parent / dataset for parent in data_folders)]
    for path in paths:
        if os.path.exists(path / "meta.json") and os.path.exists(path / "train-00000.bin"):
            return path  # meta.json names the others: ten thousand shards need not be listed
        if os.path.exists(path / "preparing") and not os.path.exists(path / "meta.json"):
            raise InputError(
                f"dataset {str(dataset)!r}: its preparation is not finished; run the same command again to resume, "
                f"or delete {path / 'preparing'}"
            )
        if token_files(path, "train") or token_files(path, "val"):
            return path
        for file in (path, path.parent / f"{path.name}.bin", path.parent / f"{path.stem}.bin"):
            if is_token_file(file) and (file == path or os.path.exists(file.with_suffix(".idx"))):
                return file
    for path in paths:
        if any(map(is_token_file, list_folder(path))):
            raise InputError(
                f"dataset={path}: the names of its token files do not say which are train and which are val; rename "
                "them (my_train_0.bin, my_val.bin), or move or link them into folders train and val; or give one of "
                "the files: its last tenth is val"
            )
        if os.path.exists(path / "prepare.py"):
            raise InputError(f"dataset {str(dataset)!r} is not prepared yet: run `python {path / 'prepare.py'}`")
    names = sorted({path.name for parent in data_folders for path in parent.glob("*/")})
    hint = suggest(str(dataset), names, f"give a folder, or one of data/: {', '.join(names)}")
    if os.path.exists(dataset):
        hint = f"make one of texts: `python data/prepare.py {shlex.quote(str(dataset))} --out=data/mine`"
    raise InputError(f"there is no dataset {str(dataset)!r} (a folder with train.bin and val.bin): {hint}")


def _open_one(
    name: str | Path,
    block_size: int,
    vocab_size: int | None,
    splits: Sequence[str],
    verify: bool,
    token_dtype: str | None,
) -> Dataset:
    path = _find(name)
    dataset = Dataset(path, _read_meta((path.parent if path.is_file() else path) / "meta.json"))
    dataset.assumes_gpt2 = dataset.vocab_size is None and vocab_size in (None, GPT2_VOCAB)
    problems = []
    if dataset.file and dataset.meta:
        problems.append(f"dataset={path}: it is described by the meta.json beside it; give their folder")
    if verify and not dataset.meta:
        problems.append(f"verify_data=True: {path} has no meta.json with hashes; leave it out")
    for split in splits:
        try:
            tokens = _open_split(dataset, split, verify, token_dtype)
        except InputError as error:
            problems.append(str(error))
            continue
        setattr(dataset, split, tokens)
        if len(tokens) <= block_size:
            problems.append(
                f"{path}: the {split} split is shorter than one block: {len(tokens):,} tokens, block_size "
                f"{block_size} needs {block_size + 1:,}; set --block_size={max(len(tokens) - 1, 1)} or less, "
                "or prepare a longer text or a larger --val_share"
            )
    largest_id = dataset.meta.get("largest_id", 0)
    if vocab_size is not None and largest_id >= vocab_size:
        problems.append(
            f"{path} holds id {largest_id}, but the model's vocab_size is {vocab_size}: "
            "use the dataset that the model was made for, or a new model"
        )
    raise_problems(problems)
    return dataset


def _open_split(dataset: Dataset, split: str, verify: bool, dtype: str | None) -> Tokens:
    meta = dataset.meta.get("splits", {}).get(split, {})
    shards = []
    for path, layout, hashes in _described(dataset, split) if dataset.meta else _recognized(dataset, split, dtype):
        ids, mask = open_file(path, layout, hashes if verify else {})
        if layout.starts is not None:
            dataset.separators.add(find_separator(ids(), layout.starts))
        if layout.tokens:
            sha256 = hashes.get("sha256", "") + hashes.get("mask_sha256", "") or None
            shards.append(Shard(str(path), layout.tokens, ids, mask, sha256))
    if not shards:
        raise InputError(f"{path} is empty: {AGAIN}")
    if dataset.file and split_of(dataset.file) is None:
        shards = [_part(shards[0], split)]
    tokens = Tokens(shards)
    tokens.bytes_per_token = meta.get("bytes", 0) / len(tokens) or None
    return tokens


def _described(dataset: Dataset, split: str) -> Iterator[tuple[Path, Layout, dict[str, Any]]]:
    """The files of a split by meta.json, with their hashes."""
    dtype = dtype_for(dataset.vocab_size)
    for file in _files(split, dataset.meta["splits"].get(split, {})):
        path = dataset.folder / file["file"]
        raise_for_missing(path)
        tokens = file["tokens"] if "tokens" in file else path.stat().st_size // dtype.itemsize
        mask = path.with_suffix(".mask") if dataset.meta.get("loss_mask") else None
        yield path, Layout(dtype, tokens, source="meta.json", mask=mask), file


def _recognized(dataset: Dataset, split: str, dtype: str | None) -> Iterator[tuple[Path, Layout, dict[str, Any]]]:
    """The files of a split by their names: nanoGPT's, or another program's, some of which leave empty ones."""
    files = [dataset.file] if dataset.file else token_files(dataset.folder, split)
    if dataset.file and split_of(dataset.file) not in (None, split):
        raise InputError(f"{dataset.file} is not the {split} split, judging by its name; give its folder")
    if not files or re.fullmatch(rf"{split}-\d{{5}}\.bin", files[0].name):  # shards whose preparation has not ended
        missing = dataset.folder / f"{split}.bin"
        raise InputError(f"{missing} is missing: {AGAIN}; files of another program need {split!r} in their names")
    for path in files:
        raise_for_missing(path)
        yield path, read_layout(path, dtype, dtype_for(dataset.vocab_size)), {}


def _part(shard: Shard, split: str) -> Shard:
    """The part of a file that is a split: the last tenth is val."""
    cut = shard.tokens * 9 // 10
    own = slice(0, cut) if split == "train" else slice(cut, shard.tokens)
    ids, mask = shard.ids, shard.mask
    return shard._replace(
        tokens=own.stop - own.start, ids=lambda: ids()[own], mask=(lambda: mask()[own]) if mask else None
    )


# --- A mixture


def _parse_mixture(dataset: str) -> dict[str, float]:
    """The shares by dataset of "mine:0.7,other:0.3"; {} for a single dataset, whose path may hold a colon.

    Raises InputError where only a part of it reads like a share.
    """
    if ":" not in dataset or any(os.path.exists(parent / dataset) for parent in (Path(), *_data_folders())):
        return {}
    shares: dict[str, float] = {}
    for entry in dataset.split(","):
        name, _, text = entry.strip().rpartition(":")
        try:
            share = float(text)
        except ValueError:
            share = math.nan
        if not name or name in shares or not 0 < share <= MAX_SHARE:
            raise InputError(
                f"dataset={dataset}: {entry.strip()!r} is not a valid mixture entry; write each dataset once with its "
                "share, as in --dataset=mine:0.7,other:0.3"
            )
        shares[name] = share
    return shares


def _open_mixture(
    name: str, shares: dict[str, float], splits: Sequence[str], open_one: Callable[[str], Dataset]
) -> Dataset:
    datasets, problems = [], []
    for part in shares:
        try:
            datasets.append(open_one(part))
        except InputError as error:
            problems.append(str(error))
    raise_problems(problems)

    first = datasets[0]
    tokenizers = [dataset.tokenizer for dataset in datasets if dataset.tokenizer]
    for other in datasets[1:]:
        has_same = not (first.tokenizer and other.tokenizer) or first.tokenizer.vocab == other.tokenizer.vocab
        sizes = {GPT2_VOCAB if dataset.assumes_gpt2 else dataset.vocab_size for dataset in (first, other)}
        if not has_same or len(sizes) > 1:
            raise InputError(
                f"dataset={name}: {first.folder} and {other.folder} have different tokenizers; "
                "prepare them with the same"
            )

    mixture = Dataset(first.folder, first.meta)
    mixture.name = name
    ends = {dataset.end_of_text for dataset in datasets}
    mixture.end_of_text = ends.pop() if len(ends) == 1 else None
    if tokenizers:
        mixture.tokenizer = max(tokenizers, key=lambda tokenizer: tokenizer.template is not None)
    weights = [max(round(share * WEIGHT_SUM / sum(shares.values())), 1) for share in shares.values()]
    for split in splits:
        setattr(mixture, split, Tokens.mix([getattr(dataset, split) for dataset in datasets], weights))
    return mixture


# --- meta.json


def _files(split: str, meta: Any) -> list[dict[str, Any]]:
    """The token files of a split, with their facts in meta.json."""
    return meta.get("shards") or [{"file": f"{split}.bin", **meta}]


def _read_meta(path: Path) -> dict[str, Any]:
    """The checked content of meta.json; {} where there is none. Raises InputError for a damaged one."""
    if not path.exists():
        return {}
    try:
        content = read_json(path)
        if content.get("format") != FORMAT:
            raise ValueError(f"format {content.get('format')!r} is not {FORMAT}: another version of nanoGPT wrote it")
        meta, problems = check(content, Meta)
        problems = problems or _inconsistencies(meta)
        if problems:
            raise ValueError("; ".join(problems[:5]))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}): prepare the dataset again") from error
    return meta


def _inconsistencies(meta: dict[str, Any]) -> list[str]:
    problems = []
    if meta["largest_id"] >= meta["vocab_size"] or meta["dtype"] != dtype_for(meta["vocab_size"]).name:
        problems.append("vocab_size, largest_id and dtype contradict each other")
    for split, split_meta in meta["splits"].items():
        files = _files(split, split_meta)
        if sum(file["tokens"] for file in files) != split_meta["tokens"]:
            problems.append(f"the shards of {split} do not hold {split_meta['tokens']:,} tokens")
        for file in files:
            name = file.get("file", "")
            if not name or name != Path(name).name:
                problems.append(f"{name!r} is not a file of its folder")
            if "sha256" not in file or (meta.get("loss_mask") and "mask_sha256" not in file):
                problems.append(f"{name} has no sha256 or mask_sha256")
    return problems


def document_separator_id(dataset: Dataset, mask_documents: bool) -> int | None:
    """The token that ends a document, if documents are to be masked. Raises InputError where there is none."""
    if not mask_documents:
        return None
    if dataset.end_of_text is None:
        raise InputError(f"mask_documents=True: {dataset.name} has no token that ends every document; leave it out")
    return dataset.end_of_text
