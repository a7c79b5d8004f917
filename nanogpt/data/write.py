"""Write datasets: shards of token ids, meta.json and tokenizer.json.

A dataset grows in a staging directory: a `SplitWriter` appends tokens to the shards of a split, `write_meta` describes
all splits in meta.json, and `move_into_place` replaces the dataset in the folder above. `write_dataset` does all three.
"""

import http.client
import json
import os
import re
import shutil
import sys
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from nanogpt.data.dataset import FORMAT, dtype_for
from nanogpt.errors import InputError
from nanogpt.files import atomic_write, file_sha256, lock_file, output_directory, sync
from nanogpt.text.omissions import Omissions
from nanogpt.text.streams import read_text
from nanogpt.text.tokenizer import SETTINGS_FILE, TEMPLATE_FILE, Tokenizer

SPLITS = ("train", "val")
HASH_KEYS = {".bin": "sha256", ".mask": "mask_sha256"}  # keys of a shard's hashes in meta.json
TINY_SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@dataclass
class SplitState:
    """The contents of a split: its finished shards, as meta.json lists them, and the tokens of the open one."""

    shards: list[dict[str, Any]] = field(default_factory=list)
    tokens: int = 0  # in the open shard
    bytes: int | None = 0  # UTF-8 bytes of text in all shards; None: unknown, like `documents`
    documents: int | None = 0
    largest_id: int = 0


class SplitWriter:
    """Appends tokens to the shards of a split: `<split>-00000.bin` and so on, and `.mask` files if `has_mask`.

    All shards but the last have `shard_tokens` tokens. After `sync`, `state` describes the files on disk; a writer that
    starts from it continues there and discards anything written later.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        dtype: np.dtype,
        *,
        shard_tokens: int = sys.maxsize,
        has_mask: bool = False,
        state: SplitState | None = None,
    ):
        self.folder = folder
        self.split = split
        self.dtype = dtype
        self.shard_tokens = shard_tokens
        self.has_mask = has_mask
        self.state = state or SplitState()
        self._files: list[IO[bytes]] = []  # of the open shard
        if self.state.tokens:
            self._open_shard()

    def _open_shard(self) -> None:
        stem = self.folder / f"{self.split}-{len(self.state.shards):05}"
        widths = {".bin": self.dtype.itemsize}
        if self.has_mask:
            widths[".mask"] = 1
        for suffix, width in widths.items():
            file = stem.with_suffix(suffix).open("ab")
            file.truncate(self.state.tokens * width)
            self._files.append(file)

    def append(self, ids: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Append token ids (n,), and their loss mask (n,) of 0 and 1 if the split has one."""
        columns = [ids.astype(self.dtype, copy=False)]
        if self.has_mask:
            assert mask is not None
            assert len(mask) == len(ids)
            columns.append(mask.astype(np.uint8, copy=False))
        self.state.largest_id = max(self.state.largest_id, int(ids.max(initial=0)))

        start = 0
        while start < len(ids):
            if not self._files:
                self._open_shard()
            end = min(len(ids), start + self.shard_tokens - self.state.tokens)
            for file, column in zip(self._files, columns, strict=True):
                file.write(column[start:end].tobytes())
            self.state.tokens += end - start
            start = end
            if self.state.tokens == self.shard_tokens:
                self.finish_shard()

    def sync(self) -> None:
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())

    def finish_shard(self) -> None:
        """Close and list the open shard; do nothing if it is empty."""
        if not self.state.tokens:
            return
        shard: dict[str, Any] = {"file": Path(self._files[0].name).name, "tokens": self.state.tokens}
        for file in self._files:
            file.close()
            path = Path(file.name)
            sync(path)
            shard[HASH_KEYS[path.suffix]] = file_sha256(path)
        self.state.shards.append(shard)
        self.state.tokens = 0
        self._files = []


def write_meta(
    folder: Path,
    tokenizer: Tokenizer,
    splits: Mapping[str, SplitState],
    omissions: Omissions | None,
    made_from: str = "",
) -> dict[str, Any]:
    """Write meta.json for splits whose shards are finished; return its contents.

    made_from: a hash of the input and the settings. Raises InputError for a split without tokens.
    """
    described: dict[str, dict[str, Any]] = {}
    for split, state in splits.items():
        if not state.shards:
            raise InputError(f"the {split} split would be empty: give a longer text or more documents")
        facts: dict[str, Any] = {"tokens": sum(shard["tokens"] for shard in state.shards)}
        if state.bytes is not None:
            facts["bytes"] = state.bytes
        if state.documents is not None:
            facts["documents"] = state.documents
        if len(state.shards) > 1:
            facts["shards"] = state.shards
        else:
            facts |= {name: value for name, value in state.shards[0].items() if name in HASH_KEYS.values()}
        described[split] = facts

    omissions = omissions or Omissions()
    largest_id = max(state.largest_id for state in splits.values())
    assert largest_id < tokenizer.vocab_size, f"id {largest_id} is not in the vocabulary"
    meta = {
        "format": FORMAT,
        "tokenizer": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "largest_id": largest_id,
        "dtype": dtype_for(tokenizer.vocab_size).name,
        "end_of_text": tokenizer.end_of_text,
        "replaced": [*omissions.get("replaced")],  # these two again for readers of version 0.1
        "bad": [*omissions.get("bad")],
        "omitted": omissions.counts,
        "loss_mask": any(HASH_KEYS[".mask"] in state.shards[0] for state in splits.values()),
        "splits": described,
    }
    if made_from:
        meta["made_from"] = made_from
    with atomic_write(folder / "meta.json") as path:
        path.write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    return meta


def move_into_place(staging: Path, folder: Path) -> dict[str, Any]:
    """Replace the dataset in `folder` by the finished one in `staging`; return its meta.json.

    The old token files go first and meta.json comes last, so `folder` never holds a mixture that opens as a dataset.
    After an interruption, call it again.
    """
    meta = json.loads((staging / "meta.json").read_text(encoding="utf-8"))
    moves = {name: name for name in ("tokenizer.json", SETTINGS_FILE, TEMPLATE_FILE)}  # in staging -> in folder
    for split, facts in meta["splits"].items():
        stems = {f"{split}-00000": split}
        if "shards" in facts:
            stems = {Path(shard["file"]).stem: Path(shard["file"]).stem for shard in facts["shards"]}
        for old, new in stems.items():
            moves |= {old + suffix: new + suffix for suffix in HASH_KEYS}
    moves["meta.json"] = "meta.json"

    if (staging / "tokenizer.json").exists():  # otherwise an interrupted move has removed the old files already
        for path in folder.iterdir():
            if path.name in ("meta.json", SETTINGS_FILE, TEMPLATE_FILE) or re.fullmatch(
                r"(train|val)(-\d+)?\.(bin|mask)", path.name
            ):
                path.unlink()
    for old, new in moves.items():
        if (staging / old).exists():
            os.replace(staging / old, folder / new)
    return meta


def write_dataset(
    folder: str | Path,
    splits: Mapping[str, Iterable[np.ndarray]],
    tokenizer: Tokenizer,
    text_bytes: Mapping[str, int] | None = None,
    omissions: Omissions | None = None,
) -> dict[str, Any]:
    """Write a dataset from arrays of ids, one `<split>.bin` for each split; return its meta.json.

    text_bytes: UTF-8 bytes of the text of each split, if known. The old dataset stays until the new one is complete.
    Raises InputError for a split without tokens, or if the folder or the disk does not accept the files.
    """
    folder = Path(folder)
    staging = folder / "preparing"
    with output_directory(folder):
        staging.mkdir(exist_ok=True)
        lock = lock_file(staging / "lock")
        if lock is None:
            raise InputError(f"another process is preparing {folder}: wait until it ends, or give another folder")
        try:
            states = {}
            for split, pieces in splits.items():
                state = SplitState(bytes=text_bytes[split] if text_bytes else None, documents=None)
                writer = SplitWriter(staging, split, dtype_for(tokenizer.vocab_size), state=state)
                for piece in pieces:
                    writer.append(piece)
                writer.finish_shard()
                states[split] = state
            tokenizer.save(staging)
            write_meta(staging, tokenizer, states, omissions)
            return move_into_place(staging, folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            lock.close()


def write_text(
    folder: str | Path, text: str, tokenizer: Tokenizer, omissions: Omissions | None = None
) -> dict[str, Any]:
    """Write a dataset of one text, 90% train and 10% val, split by characters as nanoGPT does; return its meta.json.

    omissions: of reading the text. What the tokenizer loses is counted too, and all is printed.
    Raises InputError as `write_dataset` does.
    """
    tokenizer.print_changes()
    cut = int(len(text) * 0.9)
    texts = {"train": text[:cut], "val": text[cut:]}
    ids = {split: [tokenizer.encode_ordinary(part)] for split, part in texts.items()}
    omissions = omissions or Omissions()
    omissions.add("unencodable", str(folder), tokenizer.count_lost_characters(text))
    omissions.print_lines()
    text_bytes = {split: len(part.encode()) for split, part in texts.items()}
    return write_dataset(folder, ids, tokenizer, text_bytes, omissions)


def format_summary(meta: Mapping[str, Any]) -> str:
    """Summarize meta.json: a line for each split and one for the vocabulary."""
    lines = [f"{split}: {facts['tokens']:,} tokens" for split, facts in meta["splits"].items()]
    return "\n".join([*lines, f"vocabulary: {meta['vocab_size']:,} ({meta['tokenizer']})"])


def download(url: str, path: Path, sha256: str) -> Path:
    """Download a small file to `path` unless it is there already; return `path`.

    Raises InputError if the network fails or the file has another SHA-256.
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


def read_tiny_shakespeare(source: str, folder: Path, omissions: Omissions) -> str:
    """Read the text file `source`, or if that is "" Tiny Shakespeare, which is downloaded to `folder`."""
    path = source or download(TINY_SHAKESPEARE_URL, folder / "input.txt", TINY_SHAKESPEARE_SHA256)
    return read_text(path, omissions=omissions)
