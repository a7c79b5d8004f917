"""The directory of a run: lock it, archive a previous run in it, find it again when it is renamed."""

import contextlib
import itertools
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Any

from nanogpt.console import print0
from nanogpt.errors import InputError
from nanogpt.files import is_same_file, lock_file, sync

SHARED_S = 20.0  # that a file of another node may take to appear
LOCKED_S = 40.0  # that a process which lost the others holds the lock, until it has named them


def is_run(out_dir: Path) -> bool:
    """True if a training run has written into `out_dir`."""
    return os.path.exists(out_dir / "metrics.jsonl") or any((out_dir / "ckpt").glob("step-*"))


class RunDir:
    """The output directory of a run, which no other run writes into while it is claimed.

    It is known by its inode, not by its name: `follow` updates `path` after a rename.
    """

    def __init__(self, out_dir: Path, wait_s: float = 0.0):
        has_link = os.path.realpath(out_dir) != os.path.abspath(out_dir)
        self.path = Path(os.path.realpath(out_dir)) if has_link else out_dir  # a link may point elsewhere later
        self.wait_s = wait_s  # for another run in it to end
        self._lock: IO[bytes] | None = None
        self._directory = -1  # open, so that no other directory gets its inode
        self._created: list[Path] = []
        self._mutex = threading.Lock()

    def __enter__(self) -> "RunDir":
        """Claim the directory, before anything in it is read.

        Raises InputError where another run is in it, or it cannot be written.
        """
        deadline = time.monotonic() + self.wait_s
        try:
            is_free = self._claim(self.path)
            if not is_free and self.wait_s:
                print0(f"out_dir={self.path}: a run is writing there now; waiting {self.wait_s:.0f} s for its end")
            while not is_free and time.monotonic() < deadline:
                time.sleep(min(1.0, self.wait_s))
                is_free = self._claim(self.path)
        except OSError as error:
            raise _not_writable(self.path, error) from error
        if not is_free:
            raise InputError(
                f"out_dir={self.path}: a run is writing there now; wait for its end, or give another --out_dir"
            )
        return self

    def __exit__(self, *_: Any) -> None:
        """Release the directory; if no run came to be, leave no trace of it."""
        if not is_run(self.path) and self._is_ours(self.path):
            with contextlib.suppress(OSError):  # not empty
                (self.path / ".lock").unlink()
                for path in self._created:
                    path.rmdir()
        self._release()

    def mark(self) -> str:
        """Write a random text into the lock file of the claimed directory, by which other ranks know it."""
        text = os.urandom(8).hex()
        if self._lock:
            self._lock.truncate(0)
            self._lock.write(text.encode())
            sync(self.path / ".lock")  # on NFS it is then on the server
        return text

    def raise_unless_shared(self, mark: str, main_host: str) -> None:
        """Raise InputError where this rank's directory is not the one that the main process has marked."""
        deadline = time.monotonic() + SHARED_S
        while sys.platform != "win32":  # whose locks keep others from reading
            with contextlib.suppress(OSError):
                os.close(os.open(self.path.absolute().parent, os.O_RDONLY))  # NFS then looks for new names
                if (self.path / ".lock").read_text() == mark:
                    return
            if time.monotonic() > deadline:
                raise InputError(
                    f"out_dir={self.path.absolute()} is not the directory that {main_host} writes into: give an "
                    "--out_dir on a file system that all nodes share, by its absolute path"
                )
            time.sleep(0.2)

    def archive_previous_run(self) -> Path | None:
        """Move a previous run to `out_dir.1` (`.2`, …), which is returned, and claim a new directory.

        Raises InputError where that cannot be written.
        """
        archive = None
        try:
            if is_run(self.follow()):
                if Path.cwd().is_relative_to(os.path.realpath(self.path)):
                    raise InputError(
                        f"out_dir={self.path} holds a run that cannot move from here: give another --out_dir"
                    )
                if [*self.path.glob("*.bin")]:
                    raise InputError(
                        f"out_dir={self.path} holds a run and .bin files of data, which would move along: give another "
                        "--out_dir"
                    )
                archive = _unused_name(self.path)
                if os.name != "posix":  # Windows renames no directory in which a file is open
                    self._release()
                self.path.rename(archive)  # elsewhere the lock moves along, until the new directory is locked
                self.__enter__()
                sync(self.path.parent)
        except OSError as error:
            raise _not_writable(self.path, error) from error
        return archive

    def follow(self) -> Path:
        """The present path of the directory, which may have been renamed beside its old name.

        Where it is gone, or another run has locked it, the run continues in a new one. Raises OSError where there can
        be none.
        """
        with self._mutex:
            before = self.path
            if self._is_ours(before):
                return before
            own = self._find()
            if own and self._is_ours(own):
                self.path = own
            else:
                target = own or before
                is_free = own is not None or not os.path.lexists(before)  # what has its name by now is left alone
                while not (is_free and self._claim(target)):
                    target = _unused_name(before)
                    is_free = True
            print0(f"warning: {before} was renamed, replaced or deleted: the run continues in {self.path}")
            return self.path

    def _find(self) -> Path | None:
        """The present name of the directory that was claimed."""
        if is_same_file(self.path, self._directory):
            return self.path
        names = os.listdir(self.path.parent) if self.path.parent.exists() else []
        return next((p for p in map(self.path.with_name, names) if is_same_file(p, self._directory)), None)

    def _claim(self, path: Path) -> bool:
        """Create and lock a directory, which `path` names from now on; False where another run has locked it."""
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):  # it can be written
            pass
        lock = lock_file(path / ".lock")
        if lock is None:
            return False
        self._release()
        self.path = path
        self._lock = lock
        self._created = missing
        if os.name == "posix":
            self._directory = os.open(path, os.O_RDONLY)
        return True

    def _is_ours(self, path: Path) -> bool:
        """True if `path` is the directory that was claimed, with the lock in it."""
        if self._lock is None or os.name != "posix":  # nor can Windows rename what is claimed
            return True
        return is_same_file(path, self._directory) and is_same_file(path / ".lock", self._lock.fileno())

    def _release(self) -> None:
        if self._lock:
            self._lock.close()
            self._lock = None
        if self._directory >= 0:
            os.close(self._directory)
            self._directory = -1


def _unused_name(path: Path) -> Path:
    """`path` with the first of .1, .2, … that does not exist."""
    path = path if path.name else path.absolute()  # the current directory
    names = (path.with_name(f"{path.name}.{n}") for n in itertools.count(1))
    return next(name for name in names if not os.path.lexists(name))


def _not_writable(out_dir: Path, error: OSError) -> InputError:
    return InputError(f"out_dir={out_dir} cannot be written ({error.strerror}): give another --out_dir")
