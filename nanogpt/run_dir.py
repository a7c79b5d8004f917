"""The directory of a run: lock it, archive a previous run, quarantine damaged checkpoints."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from nanogpt.checkpoint import FILES, OPTIONAL, _verify, best, list_checkpoints
from nanogpt.console import print0
from nanogpt.errors import InputError
from nanogpt.files import sync_directory


def is_run(out_dir: Path) -> bool:
    """Whether a training run has written into `out_dir`."""
    return os.path.exists(out_dir / "metrics.jsonl") or bool(list_checkpoints(out_dir))


class RunLock:
    """Keeps other runs out of `out_dir` from `take` on, until it is left or the process dies. Entered, it takes the
    folder if that holds a run already."""

    def __init__(self, out_dir: Path):
        self.out_dir = out_dir
        self.held: Any = None

    def take(self) -> None:
        """Raises InputError where another run is in the folder, or it cannot be written."""
        import filelock

        lock = filelock.FileLock(self.out_dir / ".lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise InputError(
                f"out_dir={self.out_dir}: a run is writing there now; wait until it has ended, or give another "
                "--out_dir"
            ) from None
        except OSError as error:
            raise InputError(
                f"out_dir={self.out_dir} cannot be written ({error.strerror}): give another --out_dir"
            ) from error
        self.__exit__()
        self.held = lock

    def __enter__(self) -> "RunLock":
        if is_run(self.out_dir):
            self.take()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.held:
            self.held.release()


def archive_previous_run(lock: RunLock) -> Path | None:
    """Create the folder of `lock` for a new run, and take it. A run that is there already moves to `out_dir.1` (`.2`
    …), which is returned. Raises InputError where the folder cannot be written."""
    out_dir, moved = lock.out_dir, None
    if is_run(out_dir) and not out_dir.name:
        raise InputError(f"out_dir={out_dir} holds a run that cannot move aside from here: give another --out_dir")
    try:
        if is_run(out_dir):  # which nobody else is in: the lock moves along
            taken = (out_dir.with_name(f"{out_dir.name}.{n}") for n in range(1, 10**6))
            moved = out_dir.rename(next(path for path in taken if not path.exists()))
        out_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out_dir):
            pass
        sync_directory(out_dir.parent)
    except OSError as error:
        raise InputError(f"out_dir={out_dir} cannot be written ({error.strerror}): give another --out_dir") from error
    if moved or not lock.held:
        lock.take()
    return moved


def quarantine_damaged(out_dir: Path, resumed: Path) -> None:
    """Rename the checkpoints newer than `resumed`, which were found damaged, and one with the lowest loss that is: they
    would count as the newest and the best, and whole ones be deleted in their place."""
    paths = list_checkpoints(out_dir)
    damaged, good = paths[: paths.index(resumed)], paths[paths.index(resumed) :]
    while (lowest := best(good)) and lowest != resumed:
        try:
            _verify(lowest, {*FILES, *OPTIONAL})
            break
        except InputError:
            damaged.append(lowest)
            good.remove(lowest)
    for path in damaged:
        aside = path.with_name(f"damaged-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        print0(f"warning: {path} is damaged: renamed to {aside.name}, for you to look at or delete")
