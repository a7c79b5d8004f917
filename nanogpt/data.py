"""Datasets: token files and how to write them, and rows as a pure function of (seed, sample index).

A dataset is a folder with `train.bin` and `val.bin` (headerless little-endian uint16, or uint32 above 65,536 ids),
`tokenizer.json` and `meta.json`. nanoGPT's own folders, with `meta.pkl` or nothing beside the `.bin` files, will do.
"""

import argparse
import contextlib
import difflib
import hashlib
import http.client
import json
import os
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nanogpt import InputError
from nanogpt.files import fits, read_json
from nanogpt.tokenizer import Tokenizer, aside

if TYPE_CHECKING:
    import torch

    Batch = tuple[torch.Tensor, torch.Tensor]

FORMAT = 1  # of meta.json


def token_dtype(vocab_size: int | None) -> np.dtype:
    """The type of ids on disk."""
    return np.dtype("<u4" if vocab_size and vocab_size > 65_536 else "<u2")


# ---- reading


def resolve(dataset: str | Path) -> Path:
    """The folder of `dataset`: a path, or a name under `data/` here or beside the package.

    Raises InputError where no prepared dataset is found, with the command that prepares it.
    """
    homes = [Path("data"), Path(__file__).resolve().parent.parent / "data"]
    folders = [Path(dataset), *(home / dataset for home in homes)]
    for folder in folders:
        if any(os.path.exists(folder / f"{split}.bin") for split in ("train", "val")):
            return folder
    for folder in folders:
        if os.path.exists(folder / "prepare.py"):
            raise InputError(f"dataset {str(dataset)!r} is not prepared yet: run `python {folder / 'prepare.py'}`")
    names = sorted({path.name for home in homes if home.is_dir() for path in home.iterdir() if path.is_dir()})
    close = difflib.get_close_matches(str(dataset), names, n=1)
    hint = f"did you mean {close[0]}?" if close else f"give a folder's path, or of data/ {', '.join(names) or 'none'}"
    raise InputError(f"there is no dataset {str(dataset)!r} (a folder with train.bin and val.bin): {hint}")


class Dataset:
    """An opened dataset.

    Attributes: `name`, `folder`, `meta` (of meta.json, {} without one), `train` and `val` (memory-mapped ids, shape
    (tokens,); only those opened), `tokenizer` (None where the folder has none), `vocab_size` (None where nothing tells
    it: then the ids are GPT-2's by nanoGPT's convention).
    """

    train: np.memmap
    val: np.memmap

    def __init__(self, folder: Path, meta: dict[str, Any]):
        self.name, self.folder, self.meta = folder.resolve().name, folder, meta

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """Read at first use. Raises InputError for a damaged file."""
        return Tokenizer.load(self.folder)

    @cached_property
    def vocab_size(self) -> int | None:
        return self.meta["vocab_size"] if self.meta else self.tokenizer.vocab_size if self.tokenizer else None


def open_dataset(
    dataset: str | Path,
    *,
    block_size: int,
    vocab_size: int | None = None,
    splits: Sequence[str] = ("train", "val"),
    verify: bool = False,
) -> Dataset:
    """Open and check a dataset: a name under `data/` or a path.

    `vocab_size` is the model's, where it is known. The files' sizes are always checked; `verify` also reads them whole
    and compares their SHA-256 with meta.json's, where there is one (that takes seconds a gigabyte).
    Raises InputError with a line for each fault: no such dataset; files missing, empty, cut short, or not those that
    meta.json describes; ids too large for the model; a split with no room for one block and the token after it.
    """
    found = Dataset(resolve(dataset), {})
    again = "prepare the dataset again"
    path = found.folder / "meta.json"
    if path.exists():
        try:
            found.meta = _read_meta(path)
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is damaged ({error!r}): {again}") from error
    faults = []
    dtype = token_dtype(found.vocab_size)
    for split in splits:
        path = found.folder / f"{split}.bin"
        if not os.path.isfile(path) or not os.access(path, os.R_OK):
            faults.append(f"{path} is {'unreadable' if os.path.exists(path) else 'missing'}: {again}")
            continue
        size, facts = path.stat().st_size, found.meta.get("splits", {}).get(split)
        tokens = size // dtype.itemsize
        if size == 0:
            faults.append(f"{path} is empty: {again}")
        elif size % dtype.itemsize:
            faults.append(f"{path} is cut short: {size} bytes are not whole {dtype.name} tokens; {again}")
        elif facts and tokens != facts["tokens"]:
            faults.append(f"{path} holds {tokens:,} tokens where meta.json counts {facts['tokens']:,}: {again}")
        elif tokens < block_size + 1:
            faults.append(
                f"{path} is shorter than one block: {tokens:,} tokens, block_size {block_size} needs "
                f"{block_size + 1:,}; set --block_size={max(tokens - 1, 1)} or less, or prepare a longer text"
            )
        elif verify and facts and file_sha256(path) != facts["sha256"]:
            faults.append(f"{path} is not the file that meta.json describes (its SHA-256 differs): {again}")
        else:
            setattr(found, split, np.memmap(path, dtype=dtype, mode="r"))
    largest = found.meta.get("largest_id", 0)
    if vocab_size is not None and largest >= vocab_size:
        faults.append(
            f"{found.folder} holds id {largest}, but the model's vocab_size is {vocab_size}: "
            "use the dataset that the model was made for, or a new model"
        )
    if faults:
        raise InputError("\n".join(faults))
    return found


def _read_meta(path: Path) -> dict[str, Any]:
    """meta.json, with what the code relies on checked. Raises OSError, and ValueError where that is not there."""
    meta = read_json(path)
    if meta.get("format") != FORMAT:
        raise ValueError(f"format {meta.get('format')!r} is not {FORMAT}, so another version of nanogpt wrote it")
    known = {"tokenizer": str, "vocab_size": int, "largest_id": int, "dtype": str, "splits": dict}
    complete = fits(meta, known) and all(
        fits(facts, {"tokens": int, "sha256": str}) for facts in meta["splits"].values()
    )
    if not complete or not meta["largest_id"] < meta["vocab_size"] <= 2**32:  # ids have four bytes at most
        raise ValueError("its numbers do not fit together")
    if meta["dtype"] != token_dtype(meta["vocab_size"]).name:
        raise ValueError("its numbers do not fit together")
    return meta


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


def uniform(*values: Any) -> np.ndarray:
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

    def __init__(self, tokens: np.ndarray, block_size: int, vocab_size: int):
        self.name = getattr(tokens, "filename", None) or "the dataset"
        self.vocab_size = vocab_size
        # (len - block_size, block_size + 1): a view in which row i is the window that starts at token i
        self.at = np.lib.stride_tricks.sliding_window_view(np.asarray(tokens), block_size + 1)

    def read(self, starts: np.ndarray) -> "Batch":
        """Inputs and, one token on, targets: int64, (len(starts), block_size). Raises InputError for a bad id."""
        import torch

        ids = self.at[starts]
        if ids.size and ids.max() >= self.vocab_size:
            row, column = np.argwhere(ids >= self.vocab_size)[0]
            raise InputError(
                f"{self.name} holds id {ids[row, column]} at token {int(starts[row]) + column:,}, but the model's "
                f"vocab_size is {self.vocab_size}: use the dataset that the model was made for, or prepare it again"
            )
        return torch.from_numpy(ids[:, :-1].astype(np.int64)), torch.from_numpy(ids[:, 1:].astype(np.int64))


class Rows:
    """Training rows without end, each a pure function of (seed, sample index): `x, y = rows[first:last]`.

    x and y: int64, (last - first, block_size), y one token ahead. Order "random" starts each window anywhere; "epoch"
    visits every window at a multiple of block_size once, in an order of its own each epoch, before any comes again.
    """

    def __init__(self, tokens: np.ndarray, block_size: int, vocab_size: int, seed: int, order: str = "random"):
        assert order in ("random", "epoch"), order
        self._windows = _Windows(tokens, block_size, vocab_size)
        self.block_size, self.seed, self.order = block_size, seed, order
        self.per_epoch = (len(tokens) - 1) // block_size  # windows that do not overlap

    def __getitem__(self, rows: slice) -> "Batch":
        """Raises InputError where the split holds an id outside of the vocabulary."""
        assert 0 <= rows.start <= rows.stop, rows
        index = np.arange(rows.start, rows.stop, dtype=np.uint64)
        if self.order == "random":
            return self._windows.read(_hash(self.seed, index) % np.uint64(len(self._windows.at)))
        epoch, position = np.divmod(index, np.uint64(self.per_epoch))
        position = _permuted(position, _hash(self.seed, epoch), self.per_epoch)
        return self._windows.read(position * np.uint64(self.block_size))


class EvalWindows:
    """Fixed windows for evaluation: `batches` × `batch_size` of them, evenly spaced over the split, never overlapping
    and so never more than the split holds; `batches` = 0 takes every full window. `len()` counts them;
    `x, y = windows[first:last]` as in `Rows`, cut off at the end."""

    def __init__(self, tokens: np.ndarray, block_size: int, batches: int, batch_size: int, vocab_size: int):
        self._windows = _Windows(tokens, block_size, vocab_size)
        full = (len(tokens) - 1) // block_size
        count = min(full, batches * batch_size) or full
        self._starts = np.arange(count) * full // count * block_size

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, windows: slice) -> "Batch":
        return self._windows.read(self._starts[windows])


# ---- writing


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
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
    with writing(folder), contextlib.ExitStack() as together:
        # They take their places in reverse order: the tokenizer first, meta.json last.
        new = {name: together.enter_context(aside(folder / name)) for name in (*described, "tokenizer.json")}
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
        with writing(path.parent), aside(path) as partial:
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
