"""Read small JSON files defensively; write files and directories atomically."""

import contextlib
import errno
import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanogpt.errors import InputError

SMALL = 16 * 2**20  # bytes; JSON takes up to a hundred times its size in memory


def regular_file_size(path: Path) -> int:
    """A file's bytes. Raises OSError where it is missing, or a folder, a pipe or a device, which may never end."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "is not a plain file", str(path))
    return found.st_size


def read_small(path: Path, most: int = SMALL) -> bytes:
    """What a plain file holds. Raises OSError, and ValueError where that is more than `most` bytes."""
    if regular_file_size(path) > most:
        raise ValueError(f"{path.name} is larger than {most:,} bytes")
    return path.read_bytes()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; numbers that are not finite become None. Raises OSError, and ValueError for anything
    else than an object."""
    try:
        found = json.loads(read_small(path).decode("utf-8"), parse_constant=lambda _: None)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    return found


def matches_schema(value: Any, kind: Any) -> bool:
    """Whether a value read from JSON is of a kind: int (0 to 2**63 - 1), float (any finite number), str, dict, None, a
    tuple of kinds (one of them), [kind] (a list of it), {name: kind} (an object with these at least; {}: an empty one).
    """
    if isinstance(kind, tuple):
        return any(matches_schema(value, option) for option in kind)
    if isinstance(kind, list):
        return isinstance(value, list) and all(matches_schema(item, kind[0]) for item in value)
    if isinstance(kind, dict):
        known = isinstance(value, dict) and (kind or not value)
        return bool(known) and all(matches_schema(value.get(name, ...), inner) for name, inner in kind.items())
    if kind is int:
        return type(value) is int and 0 <= value < 2**63
    if kind is float:
        return matches_schema(value, int) or (type(value) is float and math.isfinite(value))
    return value is None if kind is None else type(value) is kind


def sync_and_hash(path: Path) -> str:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_directory(path: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A path to write to, `<path>.partial`: synced and renamed to `path` at the end, deleted if the block raises."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
