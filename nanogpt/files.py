"""Read small JSON files defensively; write files and directories atomically."""

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from nanogpt.console import print0
from nanogpt.errors import InputError

SMALL_BYTES = 16 * 2**20  # JSON takes up to a hundred times its size in memory
LOCKED = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)
# Of system calls that a file system does not support: SMB and FUSE mounts cannot sync a directory, NFS may not lock.
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


def regular_file_size(path: Path) -> int:
    """A file's size in bytes. Raises OSError for a directory, and for a pipe or device, which may never end."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return status.st_size


def read_small(path: Path, max_bytes: int = SMALL_BYTES) -> bytes:
    """Read a regular file. Raises OSError, and ValueError for one of more than `max_bytes`."""
    if regular_file_size(path) > max_bytes:
        raise ValueError(f"{path.name} is larger than {max_bytes:,} bytes")
    return path.read_bytes()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, NaN and infinities as None. Raises OSError, and ValueError for anything but an object."""
    try:
        content = json.loads(read_small(path).decode("utf-8"), parse_constant=lambda _: None)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content


def file_sha256(path: Path) -> str:
    """The SHA-256 of a regular file. Raises OSError."""
    regular_file_size(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Force a file's content, or a directory's names, to disk."""
    is_directory = path.is_dir()
    if is_directory and os.name != "posix":  # Windows cannot open a directory
        return
    handle = os.open(path, os.O_RDONLY if is_directory else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        if not is_directory or error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(handle)


def is_same_file(path: Path, handle: int) -> bool:
    """True if `path` still refers to the open file or directory `handle`."""
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except OSError:
        return False


def lock_file(path: Path) -> IO[bytes] | None:
    """Create and lock a file until what is returned is closed; None where another process has locked it.

    On a file system without locks it prints a warning. Raises OSError where the file cannot be written.
    """
    while True:
        file = path.open("ab", buffering=0)
        try:
            if sys.platform == "win32":
                import msvcrt

                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in LOCKED:
                file.close()
                return None
            if error.errno not in UNSUPPORTED:
                raise
            print0(f"warning: {path.parent} cannot be locked ({error.strerror}): let no other process write there")
        if is_same_file(path, file.fileno()):
            return file
        file.close()  # it was moved or deleted between the two calls: lock the one that has its name now


def cache_folder(name: str) -> Path:
    """~/.cache/nanogpt/<name>, created. Raises OSError where it cannot be, and RuntimeError without a home."""
    folder = Path.home() / ".cache" / "nanogpt" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def utf8_path(path: Path) -> Iterator[str]:
    """A name of a file for a library that takes only names in UTF-8, which names on Linux need not be."""
    try:
        str(path).encode()
        yield str(path)
    except UnicodeEncodeError:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            yield f"/proc/self/fd/{folder}/{path.name}"
        finally:
            os.close(folder)


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A path to write to, `<path>.partial`: synced and renamed to `path` at the end, deleted if the block raises."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def created_parents(path: Path) -> Iterator[None]:
    """Create the directories above `path`; the new ones are deleted again if the block raises."""
    new_parents = [parent for parent in path.parents if not parent.exists()]
    if new_parents:
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # not empty
            for parent in new_parents:
                parent.rmdir()
        raise


@contextlib.contextmanager
def atomic_directory(final: Path, replace: bool = False) -> Iterator[Path]:
    """A new directory beside `final`: synced and renamed to it at the end, deleted if the block raises.

    With `replace` the caller alone writes here: a directory that a kill left is deleted, and an earlier `final` gives
    way; `recover_directories` undoes a kill between its two renames. Otherwise both raise OSError, unless empty.
    """
    partial = final.with_name(f".{final.name}.partial")
    old = final.with_name(f".{final.name}.old.partial")
    if replace:
        shutil.rmtree(partial, ignore_errors=True)
    with created_parents(partial):
        partial.mkdir()
        try:
            yield partial
            # As the umask has it; safetensors lets only the owner read its files.
            mode = partial.stat().st_mode & 0o666
            for path in partial.iterdir():
                with contextlib.suppress(OSError):  # a FAT or network drive that has no modes
                    path.chmod(mode)
                sync(path)
            sync(partial)
            if replace and final.exists():
                shutil.rmtree(old, ignore_errors=True)
                final.rename(old)
            elif final.exists():
                final.rmdir()
            partial.rename(final)
            shutil.rmtree(old, ignore_errors=True)
            sync(final.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def recover_directories(folder: Path) -> None:
    """Rename back each directory that a kill in `atomic_directory` left under its temporary name."""
    for old in folder.glob(".*.old.partial"):
        final = old.with_name(old.name.removeprefix(".").removesuffix(".old.partial"))
        if not final.exists():
            with contextlib.suppress(OSError):  # the folder cannot be written
                old.rename(final)


def replace_non_finite(value: Any) -> Any:
    """JSON has neither NaN nor infinity: they become None."""
    if isinstance(value, dict):
        return {key: replace_non_finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [replace_non_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_report(flag: str, path: str) -> None:
    """Raise InputError if no report can be written to the file that a flag names; what it holds is kept."""
    existed = os.path.lexists(path)
    try:
        open(path, "a").close()
        if not existed:
            os.remove(path)
    except OSError as error:
        raise InputError(f"--{flag}={path}: cannot be written ({error.strerror}); give another file") from error


def write_report(flag: str, path: str, report: dict[str, Any]) -> None:
    """Write a JSON object to the file that a flag names. Raises InputError where that fails."""
    try:
        text = json.dumps(replace_non_finite(report), indent=2, ensure_ascii=False, default=str) + "\n"
        Path(path).write_text(text, encoding="utf-8", errors="backslashreplace")  # names of files need not be UTF-8
    except OSError as error:
        raise InputError(f"--{flag}={path}: cannot be written ({error.strerror}); give another file") from error


@contextlib.contextmanager
def output_directory(folder: Path) -> Iterator[None]:
    """Create `folder` for the block to write into. Raises InputError where either fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise InputError(
            f"{folder} could not be written ({error}): free some disk space, or choose another folder with --out"
        ) from error
