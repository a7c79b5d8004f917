"""Run metrics: read them from the device a step late; metrics.jsonl always, TensorBoard and wandb on request."""

import contextlib
import errno
import json
import os
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanogpt.console import print0
from nanogpt.control import Control
from nanogpt.errors import InputError, first_line, raise_problems
from nanogpt.files import atomic_write, is_same_file, regular_file_size, replace_non_finite
from nanogpt.run_dir import RunDir

AFTER_A_STOP = (
    "lower --learning_rate, and resume from the last checkpoint with --resume=True (delete it to resume from the one "
    "before) or, if there is none, start again with --resume=False"
)

# --- From the device


class Stopwatch:
    """Seconds of training; it stands still during evaluation and saving."""

    def __init__(self, seconds: float = 0.0):
        self._elapsed = seconds
        self._started_at: float | None = None

    def start(self) -> None:
        if self._started_at is None:
            self._started_at = time.perf_counter()

    def stop(self) -> None:
        self._elapsed = self.seconds
        self._started_at = None

    @property
    def seconds(self) -> float:
        if self._started_at is None:
            return self._elapsed
        return self._elapsed + time.perf_counter() - self._started_at


class StepStats(NamedTuple):
    """The numbers that the host reads of one update: scalar tensors on the device, floats after the read."""

    loss: Any  # mean over all ranks
    grad_norm: Any
    bad_steps: Any  # non-finite updates in a row, this one included
    skipped: Any  # spikes skipped so far
    control: Control  # requests, summed over all ranks
    layers: list[Any]  # of LayerStats; empty without it

    def to_tensor(self) -> Tensor:
        """All numbers in one tensor, for one copy to the host."""
        scalars: list[Any] = [self.loss, self.grad_norm, self.bad_steps, self.skipped, *self.control, *self.layers]
        return torch.stack(scalars)

    @classmethod
    def from_values(cls, values: list[float]) -> "StepStats":
        loss, grad_norm, bad_steps, skipped, *rest = values
        num_requests = len(Control._fields)
        return cls(loss, grad_norm, bad_steps, skipped, Control(*rest[:num_requests]), rest[num_requests:])


class DeferredRead:
    """Reads tensors on the host one step late, so that the device never waits for the host."""

    def __init__(self, clock: Stopwatch):
        self.clock = clock
        self.pending: list[tuple[Any, Tensor, torch.cuda.Event | None, float | None]] = []

    def put(self, label: Any, values: Tensor) -> None:
        """Start the copy of `values` (n,) to the host; `label` comes back with them."""
        if values.device.type == "cuda":
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            host.copy_(values, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
            self.pending.append((label, host, copied, None))
        else:  # a CPU has computed the step by now
            seconds = self.clock.seconds if values.device.type == "cpu" else None
            self.pending.append((label, values, None, seconds))

    def take(self, everything: bool = False) -> list[tuple[Any, list[float], float]]:
        """(label, values, training seconds) of all but the last put; with `everything` of that too, which waits."""
        ready = self.pending if everything else self.pending[:-1]
        self.pending = [] if everything else self.pending[-1:]
        results = []
        for label, values, copied, seconds in ready:
            if copied is not None:
                copied.synchronize()
            # The clock is read after the wait for the values.
            results.append((label, values.tolist(), self.clock.seconds if seconds is None else seconds))
        return results


# --- To disk


class Tracker(NamedTuple):
    """TensorBoard or wandb: a function that logs numbers by name at a step, and one that ends the log."""

    log: Callable[[dict[str, float], int], None]
    close: Callable[[], Any]


class MetricsWriter:
    """Appends JSON objects, one a line, to metrics.jsonl; TensorBoard and wandb get the same numbers."""

    def __init__(self, run_dir: RunDir, step: int, is_evaluated: bool):
        """Drop the lines that a run resumed at `step` writes again; is_evaluated: keep its evaluation there.

        Raises InputError where metrics.jsonl cannot be written.
        """
        self.run_dir = run_dir
        self.step = step
        try:
            run_dir.follow()
            if self.path.exists():
                _drop_lines_after(self.path, step, is_evaluated)
            self._file = self.path.open("a+b", buffering=0)
        except OSError as error:
            raise InputError(
                f"{self.path} cannot be written ({error.strerror}): make {run_dir.path} writable"
            ) from error
        self._size = os.fstat(self._file.fileno()).st_size
        self._unwritten = b""  # what a full disk has not taken yet
        self._has_warned = False
        self._trackers: dict[str, Tracker] = {}
        self.wandb_id: str | None = None

    @property
    def path(self) -> Path:
        return self.run_dir.path / "metrics.jsonl"

    def open_trackers(self, wandb_config: dict[str, Any] | None, wandb_id: str | None, tensorboard: bool) -> None:
        """wandb_config: the settings of the run; None for no wandb. wandb_id: of the wandb run to resume.

        Raises InputError where wandb does not start.
        """
        self.wandb_id = wandb_id
        out_dir = self.run_dir.path
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            board = SummaryWriter(str(out_dir / "tensorboard"), purge_step=self.step + 1)

            def add_scalars(scalars: dict[str, float], step: int) -> None:
                for name, number in scalars.items():
                    board.add_scalar(name, number, step)

            self._trackers["tensorboard"] = Tracker(add_scalars, board.close)
        if wandb_config:
            import wandb

            names = {"project": wandb_config["wandb_project"], "name": wandb_config["wandb_run_name"]}
            try:
                run = wandb.init(**names, config=wandb_config, dir=str(out_dir), id=wandb_id, resume="allow")
            except Exception as error:  # not logged in, no network
                raise InputError(f"wandb_log=True: {error}; run `wandb login`, or give --wandb_log=False") from error
            self._trackers["wandb"] = Tracker(lambda scalars, step: run.log(scalars, step=step), run.finish)
            self.wandb_id = run.id

    def log(self, line: dict[str, Any]) -> None:
        """Append one line; numbers that are not finite become null."""
        finite = replace_non_finite(line)
        self._unwritten += (json.dumps(finite) + "\n").encode()
        with self._warn_of_disk_errors():
            self._write()
        scalars: dict[str, float] = {}
        for key, value in finite.items():
            parts = value if isinstance(value, dict) else {None: value}
            for part, number in parts.items():
                if isinstance(number, int | float) and key != "step":
                    scalars[f"{key}/{part}" if part else key] = number
        self._for_each_tracker(lambda tracker: tracker.log(scalars, line["step"]))

    def _for_each_tracker(self, action: Callable[[Tracker], Any]) -> None:
        """A tracker that fails does not end the run: warn, and leave it out from then on."""
        for name, tracker in [*self._trackers.items()]:
            try:
                action(tracker)
            except Exception as error:  # of the disk, of the network, of its own
                print0(f"warning: {name} failed ({first_line(error)}): the run continues without it")
                del self._trackers[name]

    def sync(self) -> None:
        """Force the lines to disk, before a checkpoint that relies on them."""
        with self._warn_of_disk_errors():
            self._write()
            os.fsync(self._file.fileno())

    def _write(self) -> None:
        self._reopen_if_replaced()
        while self._unwritten:  # a disk that is nearly full takes a part of it
            written = self._file.write(self._unwritten)
            self._unwritten = self._unwritten[written:]
            self._size += written
        self._has_warned = False

    def _reopen_if_replaced(self) -> None:
        """Reopen the file if an editor replaced it, and append the lines that its copy lacks."""
        size = self._file.seek(0, os.SEEK_END)
        if size < self._size:
            print0(f"warning: {self.path} was cut by another program: its last lines are lost")
        if not is_same_file(self.path, self._file.fileno()):
            self.run_dir.follow()
        if not is_same_file(self.path, self._file.fileno()):
            path = self.path
            if path.exists():
                regular_file_size(path)
            file = path.open("a+b", buffering=0)
            if self.run_dir.follow() != path.parent:  # renamed meanwhile
                raise OSError(errno.ESTALE, "its directory was renamed")
            with self._file as old:
                ours = _read(old).splitlines(keepends=True)
            self._file = file
            theirs = {*_read(file).splitlines()}
            shared = max((n for n, line in enumerate(ours, 1) if line.strip() in theirs), default=0)
            self._unwritten = b"".join(ours[shared:]) + self._unwritten
            print0(f"warning: {self.path} was replaced or deleted: {len(ours) - shared} lines that it lacked are back")
            size = file.tell()
            self._size = -1
        if size != self._size and size and not _read(self._file).endswith(b"\n"):
            self._unwritten = b"\n" + self._unwritten
        self._size = size

    @contextlib.contextmanager
    def _warn_of_disk_errors(self) -> Iterator[None]:
        """Disk errors do not end the run: warn once, and try again with the next line."""
        try:
            yield
        except OSError as error:
            if not self._has_warned:
                print0(f"warning: {self.path} cannot be written ({error.strerror}): its lines wait until it can")
                self._has_warned = True

    def close(self) -> None:
        with self._warn_of_disk_errors():
            self._write()
            self._file.close()
        if lost := self._unwritten.count(b"\n"):
            print0(f"warning: {self.path} lacks its last {lost} lines")
        self._for_each_tracker(lambda tracker: tracker.close())


def check_trackers(tensorboard: bool, wandb_log: bool) -> None:
    """Raise InputError, with a line for each, where trackers are switched on and not installed."""
    problems = []
    for key, module, is_on in (("tensorboard", "tensorboard", tensorboard), ("wandb_log", "wandb", wandb_log)):
        if is_on and find_spec(module) is None:
            problems.append(f'{key}=True: {module} is not installed; run pip install -e ".[tracking]"')
    raise_problems(problems)


def read_stop_reason(out_dir: Path) -> str | None:
    """Why the run in out_dir stopped to protect itself; None if it did not, or was resumed since."""
    with contextlib.suppress(OSError, ValueError, IndexError, AttributeError):
        last_line = _read_lines(out_dir / "metrics.jsonl")[-1]
        return json.loads(last_line).get("stopped")
    return None


def _read_lines(path: Path) -> list[str]:
    """The lines of a file that are not blank. Raises OSError, also for what is not a regular file."""
    regular_file_size(path)
    return [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]


def _read(file: FileIO) -> bytes:
    file.seek(0)
    return file.read()


def _drop_lines_after(path: Path, step: int, is_evaluated: bool) -> None:
    """Keep the lines up to `step`, its evaluation only if is_evaluated; drop a last line that a kill has cut."""
    lines = []
    for text in _read_lines(path):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            line = json.loads(text)
            is_evaluation = "val_loss" in line
            if line["step"] < step or (line["step"] == step and (is_evaluated or not is_evaluation)):
                lines.append(text + "\n")
    with atomic_write(path) as partial:
        partial.write_text("".join(lines), encoding="utf-8")
