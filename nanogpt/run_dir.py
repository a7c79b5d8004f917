"""The directory of a run: lock it, archive a previous run, quarantine damaged checkpoints."""

import itertools
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from nanogpt.checkpoint import FILES, OPTIONAL_FILES, best, list_checkpoints, verify
from nanogpt.console import print0
from nanogpt.errors import InputError
from nanogpt.files import sync


def is_run(out_dir: Path) -> bool:
    """True if a training run has written into `out_dir`."""
    return os.path.exists(out_dir / "metrics.jsonl") or bool(list_checkpoints(out_dir))


class RunLock:
    """Keeps other runs out of `out_dir`, from `acquire` on or, if it holds a run, from entering on."""

    def __init__(self, out_dir: Path):
        self.out_dir = out_dir
        self._lock: Any = None  # of filelock

    def acquire(self) -> None:
        """Lock the directory of this name. Raises InputError where another run is in it, or it is read-only."""
        import filelock

        lock = filelock.FileLock(self.out_dir / ".lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise InputError(
                f"out_dir={self.out_dir}: a run is writing there now; wait for its end, or give another --out_dir"
            ) from None
        except OSError as error:
            raise _not_writable(self.out_dir, error) from error
        self.release()
        self._lock = lock

    def is_acquired(self) -> bool:
        return self._lock is not None

    def release(self) -> None:
        if self._lock:
            self._lock.release()

    def __enter__(self) -> "RunLock":
        if is_run(self.out_dir):
            self.acquire()
        return self

    def __exit__(self, *_: Any) -> None:
        self.release()


def archive_previous_run(lock: RunLock) -> Path | None:
    """Create the directory of `lock` for a new run, and lock it.

    A previous run there moves to `out_dir.1` (`.2`, …), which is returned. Raises InputError where the directory cannot
    be written.
    """
    out_dir = lock.out_dir
    archive = None
    try:
        if is_run(out_dir):
            if not out_dir.name:
                raise InputError(f"out_dir={out_dir} holds a run that cannot move from here: give another --out_dir")
            names = (f"{out_dir.name}.{n}" for n in itertools.count(1))
            archive = next(out_dir.with_name(name) for name in names if not out_dir.with_name(name).exists())
            out_dir.rename(archive)  # the lock moves along
        out_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out_dir):
            pass
        sync(out_dir.parent)
    except OSError as error:
        raise _not_writable(out_dir, error) from error
    if archive or not lock.is_acquired():
        lock.acquire()
    return archive


def _not_writable(out_dir: Path, error: OSError) -> InputError:
    return InputError(f"out_dir={out_dir} cannot be written ({error.strerror}): give another --out_dir")


def quarantine_damaged(out_dir: Path, resumed: Path) -> None:
    """Rename damaged checkpoints: those newer than `resumed`, and each whose loss is the lowest.

    Under their own names they would count as the newest and the best, and intact ones would be pruned in their place.
    """
    paths = list_checkpoints(out_dir)
    damaged, intact = paths[: paths.index(resumed)], paths[paths.index(resumed) :]
    while (lowest := best(intact)) and lowest != resumed:
        try:
            verify(lowest, [*FILES, *OPTIONAL_FILES])
            break
        except InputError:
            damaged.append(lowest)
            intact.remove(lowest)
    for path in damaged:
        renamed = path.with_name(f"damaged-{path.name}")
        shutil.rmtree(renamed, ignore_errors=True)
        path.rename(renamed)
        print0(f"warning: {path} is damaged: renamed to {renamed.name}, for you to look at or delete")
