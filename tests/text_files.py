"""Documents, files that hold them, and what is read from such files."""

import contextlib
import json
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nanogpt.text import prepare
from nanogpt.text.documents import DocumentParser
from nanogpt.text.omissions import Omissions
from nanogpt.text.reading import ReadOptions, ValSplit, hash_fraction, read_chunks
from nanogpt.text.sources import find_inputs

DOCS = [f"Document {i}.\n" + "word " * (i % 40) + chr(0x4E00 + i) + "\nGröße 😀\n" for i in range(300)]


def json_lines(texts: list[str], key: str = "text") -> bytes:
    return "".join(json.dumps({"n": 1, key: text}) + "\n" for text in texts).encode()


def pack_tar(path: Path, compression: str, members: dict[str, bytes]) -> None:
    with tarfile.open(path, f"w:{compression}") as archive:
        for name, data in members.items():
            file = path.parent / "member"
            file.write_bytes(data)
            archive.add(file, f"in/{name}")
            file.unlink()


def read_documents(*inputs: object, **options: Any) -> tuple[list[str], Omissions]:
    """The documents of the inputs, and what is left out of them or changed."""
    parser = DocumentParser(ReadOptions(**options))
    texts = []
    for source in find_inputs([str(name) for name in inputs], Omissions()):
        for document in parser.parse(read_chunks(source, parser.options, ValSplit(0.1))):
            if document.is_start:
                texts.append("")
            texts[-1] += document.text.decode()
    return texts, parser.omissions


def documents_of(split: str, val_share: float) -> list[str]:
    """The documents of DOCS that are in a split."""
    return [text for text in DOCS if (hash_fraction(text.encode()) < val_share) == (split == "val")]


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@contextlib.contextmanager
def one_thread(workers: int) -> Iterator[ThreadPoolExecutor]:
    """In place of prepare's processes, which take seconds to start; tests/runs/test_prepare_scripts.py has those."""
    prepare.load_encoder.cache_clear()
    with ThreadPoolExecutor(1) as executor:  # tokenizers are not for several threads
        yield executor
