"""Run metrics: read them from the device a step late; metrics.jsonl always, TensorBoard and wandb on request."""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanogpt.console import print0
from nanogpt.control import Control
from nanogpt.errors import InputError
from nanogpt.files import atomic_write

APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT


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
        count = len(self.pending) if everything else len(self.pending) - 1
        ready = self.pending[: max(count, 0)]
        self.pending = self.pending[max(count, 0) :]
        results = []
        for label, values, copied, seconds in ready:
            if copied is not None:
                copied.synchronize()
            numbers = values.tolist()
            results.append((label, numbers, self.clock.seconds if seconds is None else seconds))
        return results


# --- To disk


class MetricsWriter:
    """Appends JSON objects, one a line, to out_dir/metrics.jsonl; TensorBoard and wandb get the same numbers."""

    def __init__(self, out_dir: Path, step: int, is_evaluated: bool):
        """Drop the lines that a run resumed at `step` writes again; is_evaluated: its evaluation there is not.

        Raises InputError where metrics.jsonl cannot be written.
        """
        self.path = out_dir / "metrics.jsonl"
        self.step = step
        try:
            if self.path.exists():
                _drop_lines_after(self.path, step, is_evaluated)
            self._file = os.open(self.path, APPEND, 0o666)
        except OSError as error:
            raise InputError(f"{self.path} cannot be written ({error.strerror}): make {out_dir} writable") from error
        self._unwritten = b""  # what a full disk has not taken yet
        self._has_warned = False
        self._tensorboard: Any = None
        self._wandb: Any = None
        self.wandb_id: str | None = None

    def open_trackers(self, wandb_config: dict[str, Any] | None, wandb_id: str | None, tensorboard: bool) -> None:
        """wandb_config: the settings of the run; None for no wandb. wandb_id: of the wandb run to resume.

        Raises InputError where wandb does not start.
        """
        self.wandb_id = wandb_id
        out_dir = self.path.parent
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(out_dir / "tensorboard"), purge_step=self.step + 1)
        if wandb_config:
            import wandb

            names = {"project": wandb_config["wandb_project"], "name": wandb_config["wandb_run_name"]}
            try:
                self._wandb = wandb.init(**names, config=wandb_config, dir=str(out_dir), id=wandb_id, resume="allow")
            except Exception as error:  # not logged in, no network
                raise InputError(f"wandb_log=True: {error}; run `wandb login`, or give --wandb_log=False") from error
            self.wandb_id = self._wandb.id

    def log(self, line: dict[str, Any]) -> None:
        """Append one line; numbers that are not finite become null."""
        finite = _replace_non_finite(line)
        self._unwritten += (json.dumps(finite) + "\n").encode()
        with self._warn_of_disk_errors():
            self._write()
        if self._tensorboard is None and self._wandb is None:
            return
        scalars: dict[str, float] = {}
        for key, value in finite.items():
            parts = value if isinstance(value, dict) else {None: value}
            for part, number in parts.items():
                if isinstance(number, int | float) and key != "step":
                    scalars[f"{key}/{part}" if part else key] = number
        if self._tensorboard is not None:
            for key, number in scalars.items():
                self._tensorboard.add_scalar(key, number, line["step"])
        if self._wandb is not None:
            self._wandb.log(scalars, step=line["step"])

    def sync(self, lock: Any) -> None:
        """Force the lines to disk, before a checkpoint that relies on them.

        lock: the RunLock of out_dir, taken again if the directory has to be created again.
        """
        with self._warn_of_disk_errors():
            if not self.path.exists():
                print0(f"warning: {self.path} was deleted, its lines are lost: continuing with a new file")
                if not self.path.parent.exists():
                    self.path.parent.mkdir(parents=True)
                    lock.acquire()
                os.close(self._file)
                self._file = os.open(self.path, APPEND, 0o666)
            self._write()
            os.fsync(self._file)

    def _write(self) -> None:
        while self._unwritten:  # a disk that is nearly full takes a part of it
            written = os.write(self._file, self._unwritten)
            self._unwritten = self._unwritten[written:]
        self._has_warned = False

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
            os.close(self._file)
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def missing_trackers(tensorboard: bool, wandb_log: bool) -> list[str]:
    """A line for each tracker that is switched on and not installed."""
    problems = []
    for key, module, is_on in (("tensorboard", "tensorboard", tensorboard), ("wandb_log", "wandb", wandb_log)):
        if is_on and find_spec(module) is None:
            problems.append(f"{key}=True: {module} is not installed; run `pip install -e .[tracking]`")
    return problems


def read_stop_reason(out_dir: Path) -> str | None:
    """Why the run in out_dir stopped to protect itself; None if it did not, or was resumed since."""
    with contextlib.suppress(OSError, ValueError, IndexError, AttributeError):
        last_line = (out_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
        return json.loads(last_line).get("stopped")
    return None


def _replace_non_finite(value: Any) -> Any:
    """JSON has neither NaN nor infinity: they become None."""
    if isinstance(value, dict):
        return {key: _replace_non_finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _drop_lines_after(path: Path, step: int, is_evaluated: bool) -> None:
    """Keep the lines up to `step`, its evaluation only if is_evaluated; drop a last line that a kill has cut."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            line = json.loads(text)
            is_evaluation = "val_loss" in line
            if line["step"] < step or (line["step"] == step and (is_evaluated or not is_evaluation)):
                lines.append(text + "\n")
    with atomic_write(path) as partial:
        partial.write_text("".join(lines), encoding="utf-8")
