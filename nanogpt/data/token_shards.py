"""Token files of other programs: recognized by their content or the files beside them, and read in place.

Each format is a function `(path, its first bytes) -> Layout`, None where the file is of another format. docs/interop.md
lists the formats.
"""

import mmap
import os
import re
import struct
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from nanogpt.errors import InputError
from nanogpt.files import file_sha256, read_json

TokenDtype = Literal["uint16", "uint32", "int32", "int64"]
SUFFIXES = (".bin", ".npy", ".ds", ".mds")
SPLIT_NAMES = {"train": "train|training", "val": "val|valid|validation"}
AGAIN = "prepare the dataset again"
MAX_BORDERS = 1000  # between documents, of those at the beginning of a file,
MAX_TOKENS = 2**24  # within this many tokens
MIN_BORDERS = 8  # an id that stands at fewer may stand there by chance
# Of a dtype's number in Megatron's index and in litdata's data_format: those that may hold ids.
MEGATRON_DTYPES = {1: "u1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
LITDATA_DTYPES = {
    "no_header_tensor": {11: "u1", 13: "<i2", 14: "<i2", 15: "<i4", 16: "<i4", 17: "<i8", 18: "<i8", 20: "<u2"},
    "no_header_numpy": {1: "<i2", 2: "<i4", 3: "<i8", 4: "u1", 5: "<u2", 6: "<u4", 7: "<i8"},
}


class Layout(NamedTuple):
    """Where a file holds its tokens, and what its format says about them."""

    dtype: np.dtype
    tokens: int
    offset: int = 0  # bytes before the first token
    source: str = "its header"  # that counts the tokens
    starts: np.ndarray | None = None  # of some documents after the first; None: unknown
    mask: Path | None = None  # a byte per token, 0 where it is no target of the loss


# --- Files of a split


def token_files(folder: Path, split: str) -> list[Path]:
    """The token files of a split, by name: those with "train" or "val" in it, and all in a folder of such a name."""
    if os.path.exists(folder / f"{split}.bin"):
        return [folder / f"{split}.bin"]
    files: list[Path] = []
    for path in list_folder(folder):
        if split_of(path) == split:
            files += [file for file in (list_folder(path) or [path]) if is_token_file(file)]
    return files


def split_of(path: Path) -> str | None:
    """The split that a file's name says; None where it says none or both."""
    splits = [
        split
        for split, names in SPLIT_NAMES.items()
        if re.search(rf"(?<![a-z])({names})(?![a-z])", path.name, re.IGNORECASE)
    ]
    return splits[0] if len(splits) == 1 else None


def is_token_file(path: str | Path) -> bool:
    return os.path.splitext(path)[1] in SUFFIXES and os.path.isfile(path)


def list_folder(folder: Path) -> list[Path]:
    """The sorted content of a folder, without hidden files such as macOS's `._train.bin`; [] for anything else."""
    try:
        content = folder.iterdir() if os.path.isdir(folder) else ()
        return sorted(path for path in content if not path.name.startswith("."))
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({error.strerror}): change its permissions") from error


# --- Formats


def read_layout(path: Path, token_dtype: str | None, default_dtype: np.dtype) -> Layout:
    """Recognize a token file that no meta.json describes.

    token_dtype: of the ids in a headerless file; None: `default_dtype`, unless the content contradicts it.
    Raises InputError for a damaged file, one of a known format that cannot be read, and where the dtype is unclear.
    """
    try:
        with path.open("rb") as file:
            head = file.read(2**12)
        for read in (numpy_array, llm_c, megatron, datatrove, litdata, mosaic):
            layout = read(path, head)
            if layout is not None:
                break
        else:
            layout = headerless(path, head, token_dtype, default_dtype)
    except (LookupError, TypeError) as error:
        raise InputError(f"{path} cannot be read: the index.json beside it is damaged ({error!r})") from error
    except (OSError, ValueError, OverflowError, struct.error) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if layout.starts is None:
        return layout
    starts = np.unique(layout.starts)  # an empty document has that of the next
    starts = starts[(starts > 0) & (starts < min(layout.tokens, MAX_TOKENS))]
    return layout._replace(starts=starts if len(starts) >= MIN_BORDERS else None)


def numpy_array(path: Path, head: bytes) -> Layout | None:
    """An array saved by NumPy, as build-nanogpt does."""
    if not head.startswith(np.lib.format.MAGIC_PREFIX):
        return None
    with path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        try:
            shape, _, dtype = read(file)
        except Exception as error:  # also tokenize.TokenError and SyntaxError
            raise ValueError("its NumPy header is damaged; save it again") from error
        offset = file.tell()
    if len(shape) != 1 or dtype.kind not in "iu":
        raise ValueError(f"it is an array of {dtype} with shape {shape}; save integers of one dimension")
    if dtype.kind == "u" and dtype.itemsize == 8:
        dtype = np.dtype(f"{dtype.byteorder}i8")  # as torch has it; ids are smaller
    return Layout(dtype, shape[0], offset)


def llm_c(path: Path, head: bytes) -> Layout | None:
    """llm.c's and modded-nanogpt's files: 256 int32, among them a magic number, a version and the number of tokens."""
    if len(head) < 1024:
        return None
    magic, version, tokens = np.frombuffer(head, "<i4", 3).tolist()
    if magic == 20240522:
        raise ValueError("it holds llm.c's multiple-choice questions, not text; give its token files")
    versions = {20240520: (1, "<u2"), 20240801: (7, "<u4")}
    if magic not in versions:
        return None
    known_version, dtype = versions[magic]
    if version != known_version:
        raise ValueError(f"version {version} of llm.c's format is not {known_version}; write it by another version")
    return Layout(np.dtype(dtype), tokens, offset=1024)


def megatron(path: Path, head: bytes) -> Layout | None:
    """Megatron-LM's indexed dataset: ids in .bin; lengths, places and documents of its sequences in .idx."""
    index = path.with_suffix(".idx")
    if not index.exists():
        return None
    with index.open("rb") as file:
        header = file.read(34)
    if not header.startswith(b"MMIDIDX\0\0"):
        raise ValueError(f"{index.name} beside it is not Megatron's index; move it away, or write it again")
    version, code, num_sequences, num_documents = struct.unpack("<QBQQ", header[9:])
    if version != 1 or code not in MEGATRON_DTYPES:
        raise ValueError(f"{index.name} has version {version} and dtype code {code}, which hold no ids")
    dtype = np.dtype(MEGATRON_DTYPES[code])
    if num_sequences == 0:
        return Layout(dtype, 0, source=index.name)
    lengths = np.memmap(index, "<i4", "r", 34, (num_sequences,))
    places = np.memmap(index, "<i8", "r", 34 + 4 * num_sequences, (num_sequences,))  # in bytes
    borders = np.memmap(index, "<i8", "r", 34 + 12 * num_sequences, (num_documents,))  # in sequences
    inner = borders[1 : MAX_BORDERS + 1]
    starts = places[inner[(inner >= 0) & (inner < num_sequences)]] // dtype.itemsize
    return Layout(dtype, int(places[-1]) // dtype.itemsize + int(lengths[-1]), source=index.name, starts=starts)


def datatrove(path: Path, head: bytes) -> Layout | None:
    """datatrove's tokenized file: ids in .ds; the ends of documents in .ds.index, perhaps a loss mask in .ds.loss."""
    index = path.with_name(f"{path.name}.index")
    if not index.exists():
        return None
    size = path.stat().st_size
    ends = np.memmap(index, "<u8", "r") if index.stat().st_size else np.zeros(0, "<u8")
    tokens = int(ends[-1]) if len(ends) else 0
    mask = path.with_name(f"{path.name}.loss")
    dtype = np.dtype("<u4" if size > 3 * tokens else "<u2")  # 2 or 4 bytes each, and perhaps cut short
    starts = ends[:-1][:MAX_BORDERS].astype(np.int64)
    return Layout(dtype, tokens, source=index.name, starts=starts, mask=mask if mask.exists() else None)


def litdata(path: Path, head: bytes) -> Layout | None:
    """A chunk that litdata wrote for its TokensLoader: number and places of its items, then all their ids."""
    index = _index_json(path)
    if "chunks" not in index:
        return None
    config = index["config"]
    form, _, code = str(config["data_format"][0]).partition(":")
    is_plain = config.get("compression") is None and config.get("encryption") is None
    if len(config["data_format"]) != 1 or form not in LITDATA_DTYPES or not is_plain:
        raise ValueError("it is a chunk of litdata, but not of plain token rows; write it with TokensLoader()")
    if int(code) not in LITDATA_DTYPES[form]:
        raise ValueError(f"litdata's data_format {config['data_format'][0]} holds no ids")
    dtype = np.dtype(LITDATA_DTYPES[form][int(code)])
    chunk = next((chunk for chunk in index["chunks"] if chunk["filename"] == path.name), None)
    if chunk is None:
        raise ValueError("it is no chunk of the index.json beside it; move one of them away")
    num_items, tokens = int(chunk["chunk_size"]), int(chunk["dim"])
    places = np.memmap(path, "<u4", "r", 4, (num_items + 1,))  # in bytes
    starts = (places[1:-1][:MAX_BORDERS].astype(np.int64) - int(places[0])) // dtype.itemsize
    return Layout(dtype, tokens, 4 * (num_items + 2), "index.json", starts)


def mosaic(path: Path, head: bytes) -> None:
    """A shard of MosaicML's Streaming: its samples are records, each with a header, so it cannot be read in place."""
    if path.suffix == ".mds" or "shards" in _index_json(path):
        raise ValueError(
            "it is a shard of MosaicML's Streaming, whose samples are no plain row of tokens; save them as one: "
            "np.save('train.npy', np.concatenate([sample['tokens'] for sample in StreamingDataset(local=FOLDER)]))"
        )


def headerless(path: Path, head: bytes, token_dtype: str | None, default_dtype: np.dtype) -> Layout:
    """Ids without a header, as nanoGPT writes them. Raises ValueError where they are wider than the default dtype."""
    dtype = np.dtype(token_dtype).newbyteorder("<") if token_dtype else default_dtype
    wider = wider_dtype(np.frombuffer(head[: len(head) // 8 * 8], "<u2"))
    if token_dtype is None and dtype.itemsize < np.dtype(wider).itemsize:
        raise ValueError(
            f"without a meta.json its ids are taken for {dtype.name}, but they look like {wider}; give "
            f"--token_dtype={wider}, or --token_dtype={dtype.name} if they are not"
        )
    return Layout(dtype, path.stat().st_size // dtype.itemsize)


def wider_dtype(words: np.ndarray) -> str:
    """The dtype that a file's first uint16 words look like: wider ids, below a million, have small upper words."""
    is_small = words < 16
    if len(words) < 256 or not is_small[1::2].all() or is_small[::2].all():
        return "uint16"
    return "uint32" if words[2::4].any() else "int64"


def _index_json(path: Path) -> dict[str, Any]:
    """The content of index.json beside a file; {} where there is none."""
    index = path.with_name("index.json")
    return _read_index(index, index.stat().st_mtime_ns) if index.exists() else {}


@lru_cache(1)
def _read_index(index: Path, mtime_ns: int) -> dict[str, Any]:
    return read_json(index)  # once for all the files that it describes


# --- Documents


def find_separator(ids: np.ndarray, starts: np.ndarray) -> int | None:
    """The id that stands at every border between documents and nowhere else; None where there is none.

    starts: of the documents after the first, ascending.
    """
    for shift in (-1, 0):  # the last token of each document, or the first of the next
        separator = ids[starts[0] + shift]
        first, last = 1 + shift, starts[-1] + 1 + shift
        if np.array_equal(np.flatnonzero(ids[first:last] == separator) + 1, starts):
            return int(separator)
    return None


# --- Opening


MapFile = Callable[[], np.ndarray]


def open_file(path: Path, layout: Layout, hashes: dict[str, Any]) -> tuple[MapFile, MapFile | None]:
    """Check the size of a file and, where given, its hash: the functions that map its tokens and its loss mask."""
    ids = _check_file(path, layout, hashes.get("sha256"))
    mask = None
    if layout.mask:
        raise_for_missing(layout.mask)
        mask_layout = Layout(np.dtype(np.uint8), layout.tokens, source=layout.source)
        mask = _check_file(layout.mask, mask_layout, hashes.get("mask_sha256"))
    return ids, mask


def raise_for_missing(path: Path) -> None:
    if not os.path.isfile(path) or not os.access(path, os.R_OK):
        raise InputError(f"{path} is {'unreadable' if os.path.exists(path) else 'missing'}: {AGAIN}")


def _check_file(path: Path, layout: Layout, sha256: str | None) -> Callable[[], np.ndarray]:
    """Compare a file with its expected size and hash, where known, and return the function that maps its tokens."""
    status = path.stat()
    size = max(status.st_size - layout.offset, 0)
    actual, rest = divmod(size, layout.dtype.itemsize)
    if size == 0 and layout.tokens:
        raise InputError(f"{path} is empty: {AGAIN}")
    if rest:
        raise InputError(f"{path} is cut short: {size} bytes are not whole {layout.dtype.name} tokens; {AGAIN}")
    if layout.tokens != actual:
        raise InputError(f"{path} holds {actual:,} tokens where {layout.source} counts {layout.tokens:,}: {AGAIN}")
    if sha256 and file_sha256(path) != sha256:
        raise InputError(f"{path} is not the file that meta.json describes (its SHA-256 differs): {AGAIN}")
    return partial(_map, path, layout, status.st_mtime_ns)


def _map(path: Path, layout: Layout, mtime_ns: int) -> np.ndarray:
    """Memory-map a file of numbers. Raises InputError where it is gone or has changed since it was checked."""
    try:
        with path.open("rb", buffering=0) as file:  # as np.memmap does, in half the time
            if os.fstat(file.fileno()).st_mtime_ns != mtime_ns:
                raise ValueError("it has changed")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            return np.frombuffer(mapped, layout.dtype, layout.tokens, layout.offset)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read any more ({error}): put it back, or prepare the data again") from error
