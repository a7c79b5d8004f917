"""Write datasets: token files, meta.json, tokenizer.json."""

import argparse
import contextlib
import hashlib
import http.client
import json
import urllib.request
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt.data.dataset import FORMAT, token_dtype
from nanogpt.errors import InputError
from nanogpt.files import atomic_write, file_sha256, output_directory
from nanogpt.text.tokenizer import Tokenizer


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


def format_summary(meta: Mapping[str, Any]) -> str:
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


def download(url: str, path: Path, sha256: str) -> Path:
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
    text = read_text(args.input or download(url, args.out / "input.txt", sha256))
    print(f"{args.out}: {len(text):,} characters")
    return text, args
