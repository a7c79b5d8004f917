"""Run metrics: metrics.jsonl always, TensorBoard and wandb on request."""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanogpt.console import print0
from nanogpt.errors import InputError
from nanogpt.files import atomic_write

APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT


class Stopwatch:
    """Seconds of training so far; evaluation and saving are spent with it stopped."""

    def __init__(self, seconds: float = 0.0):
        self._before = seconds
        self._since: float | None = None

    def start(self) -> None:
        if self._since is None:
            self._since = time.perf_counter()

    def stop(self) -> None:
        self._before, self._since = self.seconds, None

    @property
    def seconds(self) -> float:
        return self._before + (time.perf_counter() - self._since if self._since is not None else 0.0)


class DeferredRead:
    """Reads device values on the host one step late, so that the device never waits for the host."""

    def __init__(self, clock: "Stopwatch"):
        self.clock = clock
        self.pending: list[tuple[int, Tensor, torch.cuda.Event | None, float | None]] = []

    def put(self, step: int, values: Tensor) -> None:
        """Start copying `values` (n,) of `step` to the host."""
        if values.device.type == "cuda":
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            host.copy_(values, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
            self.pending.append((step, host, done, None))
        else:  # on a CPU the step is over by now
            self.pending.append((step, values, None, self.clock.seconds if values.device.type == "cpu" else None))

    def take(self, everything: bool = False) -> list[tuple[int, list[float], float]]:
        """(step, values, training seconds by then) of each step but the last one put; with `everything` of that too."""
        ready, self.pending = (self.pending, []) if everything else (self.pending[:-1], self.pending[-1:])
        results = []
        for step, values, done, seconds in ready:
            if done is not None:
                done.synchronize()
            numbers = values.tolist()
            results.append((step, numbers, self.clock.seconds if seconds is None else seconds))
        return results


class MetricsWriter:
    """Appends JSON objects, one a line, to `out_dir/metrics.jsonl`; TensorBoard and wandb get the same numbers."""

    def __init__(
        self, out_dir: Path, step: int, evaluated: bool, settings: dict[str, Any], wandb_id: str | None = None
    ):
        """Lines that a run resumed at `step`, `evaluated` there or not yet, will write again are dropped first; wandb's
        run goes on as `wandb_id`. Raises InputError where it cannot write."""
        self.path, self.wandb_id = out_dir / "metrics.jsonl", wandb_id
        try:
            if self.path.exists():
                _keep_lines(self.path, step, evaluated)
            self._file = os.open(self.path, APPEND)
        except OSError as error:
            raise InputError(f"{self.path} cannot be written ({error.strerror}): mend {out_dir} first") from error
        self._waiting, self._told = b"", False  # what the disk did not take yet, and whether the user knows
        self._tensorboard = self._wandb = None
        if settings["tensorboard"]:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(out_dir / "tensorboard"), purge_step=step + 1)
        if settings["wandb_log"]:
            import wandb

            project, name = settings["wandb_project"], settings["wandb_run_name"]
            try:
                self._wandb = wandb.init(
                    project=project, name=name, config=settings, dir=str(out_dir), id=wandb_id, resume="allow"
                )
                self.wandb_id = self._wandb.id
            except Exception as error:  # not logged in, no network
                raise InputError(f"wandb_log=True: {error}; run `wandb login`, or give --wandb_log=False") from error

    def log(self, line: dict[str, Any]) -> None:
        """Write one line; numbers that are not finite become null. What a full disk does not take waits in memory."""
        finite = {key: _finite(value) for key, value in line.items()}
        self._waiting += (json.dumps(finite) + "\n").encode()
        with self._faults_told():
            self._write()
        numbers = {key: value for key, value in finite.items() if isinstance(value, int | float) and key != "step"}
        for key, parts in finite.items():
            if isinstance(parts, dict):
                numbers |= {f"{key}/{part}": value for part, value in parts.items() if value is not None}
        if self._tensorboard is not None:
            for key, value in numbers.items():
                self._tensorboard.add_scalar(key, value, line["step"])
        if self._wandb is not None:
            self._wandb.log(numbers, step=line["step"])

    def sync(self, lock: Any) -> None:
        """Force what was logged to the disk, before a checkpoint that counts on it. lock: the folder's own
        (nanogpt/checkpoint.py), taken again where the folder is made anew."""
        with self._faults_told():
            if not self.path.exists():
                print0(f"warning: {self.path} is gone, and what it held with it: going on with a new one")
                if not self.path.parent.exists():
                    self.path.parent.mkdir(parents=True)
                    lock.take()
                os.close(self._file)
                self._file = os.open(self.path, APPEND)
            self._write()
            os.fsync(self._file)

    def _write(self) -> None:
        while self._waiting:  # at the end of a disk a part of it may fit
            self._waiting = self._waiting[os.write(self._file, self._waiting) :]
        self._told = False

    @contextlib.contextmanager
    def _faults_told(self) -> Iterator[None]:
        """No fault of the disk ends the run; the first one is told."""
        try:
            yield
        except OSError as error:
            if not self._told:
                print0(f"warning: {self.path} could not be written ({error.strerror}): its lines wait until it can be")
                self._told = True

    def close(self) -> None:
        with self._faults_told():
            self._write()
            os.close(self._file)
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def missing_extras(config: Any) -> list[str]:
    """A line for each tracker that the settings of a run (train.py's TrainConfig) ask for and that is not installed."""
    asked = {"tensorboard": "tensorboard", "wandb_log": "wandb"}
    return [
        f"{key}=True: {module} is not installed; run `pip install -e .[tracking]`, or give --{key}=False"
        for key, module in asked.items()
        if getattr(config, key) and not (config.eval_only or config.dry_run) and find_spec(module) is None
    ]


def _finite(value: Any) -> Any:
    """JSON has no word for NaN and infinity: they become null."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_stop_reason(out_dir: Path) -> str | None:
    """Why the run in `out_dir` ended to protect itself; None where it did not, or has gone on since."""
    with contextlib.suppress(OSError, ValueError, IndexError, AttributeError):
        return json.loads((out_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]).get("stopped")
    return None


def _keep_lines(path: Path, step: int, evaluated: bool) -> None:
    """Drop the lines after `step`, its evaluation unless `evaluated`, and a last line that a kill has cut; in one
    rename."""
    kept = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            line = json.loads(text)
            if line["step"] < step or (line["step"] == step and (evaluated or "val_loss" not in line)):
                kept.append(text + "\n")
    with atomic_write(path) as partial:
        partial.write_text("".join(kept), encoding="utf-8")
