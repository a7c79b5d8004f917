"""What a run tells: `metrics.jsonl` always, TensorBoard and wandb on request, and what is printed."""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanogpt import InputError, RunStopped
from nanogpt.distributed import World, describe, format_bytes, free_memory, print0
from nanogpt.optim import optimizer_state_numel
from nanogpt.tokenizer import atomic_write

BEGUN = time.perf_counter()  # when the program began, the import of torch not counted
REMEDY = (
    "go on from the last checkpoint with --resume=True and a lower --learning_rate, delete it to go on from the one "
    "before, or start again"
)
APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT
CPU_FLOPS = 3e10  # FLOP/s that a small model's step reaches on one core; only for a guess before the first step


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


class StepLogger:
    """Prints and records the steps, each read from the device one step late, and knows what the ranks agreed on.

    `stop`: the exit status that a signal asked for, else 0. `save_due`: a checkpoint is wanted. `fall`: updates that
    the learning rate shall take to fall from now on (0: not yet).
    """

    def __init__(
        self,
        config: Any,  # the run's settings: train.py's TrainConfig
        model: Any,  # for `flops_per_token()` and `config.block_size`
        world: World,
        tracker: MetricsWriter | None,  # None: print only
        clock: Stopwatch,
        guard: Any,  # nanogpt/optim.py's UpdateGuard: how many broken steps in a row end the run, and the spikes so far
        step: int,
        samples: int,
        layers: Sequence[str] = (),  # names of those whose norms are logged
        clipped: int = 0,  # updates clipped since the last line, by an earlier process
        end: float | None = None,  # time.perf_counter() at which a run ends that goes by the clock
    ):
        self.config, self.model, self.world, self.tracker = config, model, world, tracker
        self.clock, self.patience, self.late = clock, guard.max_bad_steps, DeferredRead(clock)
        self.first_step, self.layers, self.clipped, self.end = step, layers, clipped, end
        self.all_rows = config.rows_in(config.max_iters)
        self.samples = {step: samples}  # rows read by each step that is still of use
        self.last_line = (step, clock.seconds)
        self.warm = (0.0, 0)  # training seconds and tokens when the first step, which warms up, was done
        self.stop, self.save_due, self.fall, self.skipped = 0, False, 0, guard.skipped.item()

    def put(self, step: int, samples: int, values: Tensor) -> None:
        """values: loss, gradient norm, broken steps in a row, spikes skipped so far, SIGINT seen, SIGTERM seen, a save
        is due, updates of the fall that is to begin (0: none); then what LayerStats tells, if anything. samples: rows
        read by now."""
        self.samples[step] = samples
        self.late.put(step, values)

    def read(self, everything: bool = False) -> None:
        """Deal with the steps that are due. Raises RunStopped for one that broke the run."""
        for step, values, seconds in self.late.take(everything):
            loss, grad_norm, broken, skipped, sigint, sigterm, due, fall, *layers = values
            if broken >= self.patience:
                self._protect(
                    step,
                    f"step {step}, rows {self.samples[step - 1]:,} to {self.samples[step] - 1:,}: loss {loss:.4g}, "
                    f"gradient norm {grad_norm:.4g}: not finite. No update was made from it, and no checkpoint was "
                    "touched",
                )
            if skipped > self.skipped:
                print0(f"step {step}: update skipped, gradient norm {grad_norm:.4g} is a spike ({skipped:.0f} so far)")
                self.skipped = skipped
            self.stop = 143 if sigterm else 130 if sigint else self.stop
            self.save_due |= bool(due)
            self.fall = int(fall)
            self.clipped += int(layers[0]) if layers else 0
            if step == self.first_step + 1:
                self.warm = (seconds, self._tokens(step))
                print0(f"first step done {time.perf_counter() - BEGUN:.1f} s after the start")
            if step % self.config.log_interval == 0:
                self._line(step, loss, grad_norm, seconds, layers)
            if step == self.first_step + 10:
                self._tell_finish(step, seconds)
            self.samples = {known: samples for known, samples in self.samples.items() if known >= self.last_line[0]}

    def evaluation(self, step: int, losses: dict[str, float], val_bpb: float | None) -> None:
        """Record an evaluation: mean loss in nats by split, "train" and "val", and val's in bits per byte of text where
        that is known. Raises RunStopped for one that is not finite: the last update broke the weights, and they must
        not be saved."""
        seconds = self.clock.seconds
        if self.tracker:
            line = {"step": step, "tokens": self._tokens(step), "time_s": round(seconds, 3)}
            line |= {f"{split}_loss": loss for split, loss in losses.items()}
            self.tracker.log(line | ({} if val_bpb is None else {"val_bpb": val_bpb}))
        print0(f"step {step:6d} | {format_losses(losses, val_bpb)} | {duration(seconds)} trained")
        if not all(map(math.isfinite, losses.values())):
            why = "the losses of the evaluation are not finite. Nothing was saved, and no checkpoint was touched"
            self._protect(step, f"step {step}: {why}")

    def _line(self, step: int, loss: float, grad_norm: float, seconds: float, layers: list[float]) -> None:
        (before, then), self.last_line = self.last_line, (step, seconds)
        passed_s = max(seconds - then, 1e-9)
        tokens_per_s = (self._tokens(step) - self._tokens(before)) / passed_s
        peak = self.world.peak_flops()
        mfu = self.model.flops_per_token() * tokens_per_s / (peak * self.world.size) if peak else None
        line = {
            "step": step,
            "tokens": self._tokens(step),
            "time_s": round(seconds, 3),
            "loss": loss,
            "lr": self.config.learning_rate_at(step - 1),
            "grad_norm": grad_norm,
            "tokens_per_s": round(tokens_per_s, 1),
            "mfu": mfu and round(mfu, 4),
        }
        if self.config.skip_spikes:
            line["skipped"] = int(self.skipped)
        if layers:
            n = len(self.layers)
            line["clipped"], self.clipped = self.clipped, 0  # of the updates since the last line
            line["layer_grad_norms"] = dict(zip(self.layers, layers[1 : 1 + n], strict=True))
            line["layer_update_norms"] = dict(zip(self.layers, layers[1 + n :], strict=True))
        if self.tracker:
            self.tracker.log(line)
        print0(
            f"step {step:6d} | loss {loss:.4f} | lr {line['lr']:.2e} | norm {grad_norm:.2f} | {tokens_per_s:,.0f} tok/s"
            + (f" | mfu {mfu:.1%}" if mfu else "")
            + f" | {duration(self._left_s(step, tokens_per_s))} left"
        )

    def _protect(self, step: int, why: str) -> None:
        """End the run with status 3; `read_stop_reason` finds the reason in the metrics."""
        if self.tracker:
            self.tracker.log({"step": step, "stopped": why})
        raise RunStopped(f"{why}: {REMEDY}")

    def _left_s(self, step: int, tokens_per_s: float) -> float:
        """Seconds to the run's end."""
        if self.end is not None:
            return max(self.end - time.perf_counter(), 0.0)
        return (self.all_rows * self.model.config.block_size - self._tokens(step)) / tokens_per_s

    def _tell_finish(self, step: int, seconds: float) -> None:
        warm_s, tokens = self.warm
        left = self._left_s(step, (self._tokens(step) - tokens) / max(seconds - warm_s, 1e-9))
        end = datetime.now() + timedelta(seconds=left)
        aside = ", evaluations not counted" if self.end is None else ""
        print0(f"finishes in about {duration(left)}, {end:%a %H:%M}{aside}")

    def _tokens(self, step: int) -> int:
        return self.samples[step] * self.model.config.block_size


def _finite(value: Any) -> Any:
    """JSON has no word for NaN and infinity: they become null."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def format_losses(losses: dict[str, float], val_bpb: float | None) -> str:
    """An evaluation for the reader: mean loss in nats by split, and val's in bits per byte where that is known."""
    told = " | ".join(f"{split} loss {loss:.4f}" for split, loss in losses.items())
    return told + (f", {val_bpb:.4f} bits per byte" if val_bpb is not None else "")


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


def print_run_summary(
    config: Any, model: Any, micro_batch: int, memory: float, dataset: str, train_tokens: int, world: World, remedy: str
) -> None:
    """Print what a run will be, before it begins; memory: bytes; the other arguments are train.py's. Raises
    InputError, saying `remedy`, where a CPU's memory will not do: there the system would kill the process without a
    word."""
    parameters, T, rows = model.count_parameters(), model.config.block_size, config.rows_per_step
    tokens, on_cpu = config.rows_in(config.max_iters) * T, world.device.type == "cpu"
    dtype = str(world.dtype).removeprefix("torch.")
    print0(f"{world.size} process(es) on {describe(world.device)}, {dtype}", f"model       {parameters:,} parameters")
    if config.eval_only:
        return
    free = free_memory(world.device)
    print0(
        f"step        {rows} rows of {T} = {rows * T:,} tokens, in micro-batches of {micro_batch}"
        + (f", from {config.rows_at(0)} rows on" if config.rows_at(0) < rows else ""),
        f"run         {config.max_iters:,} steps = {tokens:,} tokens = {tokens / train_tokens:.3g} epochs of {dataset} "
        f"= {tokens / parameters:.3g} tokens per parameter",
        f"memory      about {format_bytes(memory)} per process" + (f", {format_bytes(free)} are free" if free else ""),
        f"checkpoint  {format_bytes(4 * (parameters + optimizer_state_numel(model, config)))} in {config.out_dir}/ckpt",
    )
    end = min(config.max_iters, config.max_iters if config.lr_decay_iters is None else config.lr_decay_iters)
    if config.decay_lr and config.warmup_iters > end:
        print0(f"warning: warmup_iters={config.warmup_iters} is longer than the schedule, {end} updates")
    guess = model.flops_per_token() * tokens / (CPU_FLOPS * torch.get_num_threads() * world.size)
    if on_cpu and guess > 30 * 60 and not config.minutes:
        told = "config/train_shakespeare_char_cpu.py is made for a CPU, a few minutes in all"
        print0(f"warning: on this CPU that may take {duration(guess)}; {told}")
    if on_cpu and free and memory * int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > free:
        raise InputError(f"{remedy}; about {format_bytes(memory)} are needed")


def duration(seconds: float) -> str:
    """Seconds as a person says them: 42 s, 3:07 min, 5:42:10 h, 3 d 4 h."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, s = divmod(seconds, 60)
    hours, m = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{m:02d}:{s:02d} h" if hours else f"{m}:{s:02d} min"
