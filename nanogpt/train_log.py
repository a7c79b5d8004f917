"""The log of a training run: the summary before it, step lines with an ETA, evaluations."""

import math
import shlex
import time
from collections import Counter
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nanogpt.console import START_TIME, format_bytes, format_duration, print0
from nanogpt.control import Control
from nanogpt.data.dataset import Dataset
from nanogpt.device import describe_device, free_memory, peak_flops
from nanogpt.distributed import World
from nanogpt.errors import RunStopped
from nanogpt.layer_stats import LayerStats
from nanogpt.memory import checkpoint_bytes, estimate_training_memory, trained_numel
from nanogpt.metrics import AFTER_A_STOP, DeferredRead, MetricsWriter, StepStats
from nanogpt.schedule import RowSchedule, StepSchedule
from nanogpt.state import TrainState
from nanogpt.trials import describe_dtype

CPU_FLOPS = 3e10  # FLOP/s that a small model's step reaches on one core; only for a guess before the first step
LONG_ON_CPU_S = 30 * 60
MAX_SECONDS = 1e11  # largest ETA: a later one is no date


class StepLabel(NamedTuple):
    """The numbers of an update that the host knows when it starts."""

    step: int  # updates done with this one
    first_row: int
    samples: int  # rows read with this one
    lr: float


class StepLogger:
    """Prints and records updates, which it reads from the device one step late, and evaluations."""

    def __init__(
        self,
        state: TrainState,
        world: World,
        writer: MetricsWriter | None,  # None: print only
        log_interval: int,
        total_rows: int,  # of the whole run, for the ETA
        deadline: float | None,  # time.perf_counter() at the end of the run; None: it ends by steps
        layer_stats: LayerStats | None,
    ):
        self.state = state
        self.world = world
        self.writer = writer
        self.log_interval = log_interval
        self.block_size = state.model.config.block_size
        self.total_tokens = total_rows * self.block_size
        self.deadline = deadline
        self.layer_names = list(layer_stats.layers) if layer_stats else []
        self.deferred = DeferredRead(state.clock)
        self.first_step = state.step
        self.last_point = (state.samples * self.block_size, state.clock.seconds)  # tokens, training seconds
        self.after_first_step = self.last_point  # the first step takes longer: it compiles and allocates
        self.skipped = int(state.guard.skipped.item())

    def put(self, step: int, first_row: int, samples: int, lr: float, stats: StepStats) -> None:
        self.deferred.put(StepLabel(step, first_row, samples, lr), stats.to_tensor())

    def read(self, everything: bool = False) -> list[Control]:
        """Print and record the updates that are due; return their requests.

        Raises RunStopped for an update that broke the run.
        """
        controls = []
        for label, values, seconds in self.deferred.take(everything):
            stats = StepStats.from_values(values)
            self._check(label, stats)
            if stats.layers:
                self.state.clipped += int(stats.layers[0])
            if label.step == self.first_step + 1:
                self.after_first_step = (label.samples * self.block_size, seconds)
                print0(f"first step done {time.perf_counter() - START_TIME:.1f} s after the start")
            if label.step % self.log_interval == 0:
                self._log_step(label, stats, seconds)
            if label.step == self.first_step + 10:
                self._print_eta(label, seconds)
            controls.append(stats.control)
        return controls

    def evaluation(self, losses: dict[str, float], val_bpb: float | None) -> None:
        """Record the mean loss of each split in nats, and val's in bits per byte where known.

        Raises RunStopped if one is not finite: the last update broke the weights, which must not be saved.
        """
        step = self.state.step
        seconds = self.state.clock.seconds
        if self.writer:
            line = {"step": step, "tokens": self.state.samples * self.block_size, "time_s": round(seconds, 3)}
            line |= {f"{split}_loss": loss for split, loss in losses.items()}
            if val_bpb is not None:
                line["val_bpb"] = val_bpb
            self.writer.log(line)
        print0(f"step {step:6d} | {format_losses(losses, val_bpb)} | {format_duration(seconds)} trained")
        if not all(map(math.isfinite, losses.values())):
            self._stop(step, f"step {step}: an evaluation loss is not finite; nothing was saved")

    def _check(self, label: StepLabel, stats: StepStats) -> None:
        if stats.bad_steps >= self.state.guard.max_bad_steps:
            rows = f"rows {label.first_row:,} to {label.samples - 1:,}"
            self._stop(
                label.step,
                f"step {label.step}, {rows}: loss {stats.loss:.4g}, gradient norm {stats.grad_norm:.4g}: not finite; "
                "the update was skipped and nothing was saved",
            )
        if stats.skipped > self.skipped:
            self.skipped = int(stats.skipped)
            print0(f"step {label.step}: skipped a spike, gradient norm {stats.grad_norm:.4g} ({self.skipped} so far)")

    def _stop(self, step: int, reason: str) -> None:
        """End the run with status 3; `read_stop_reason` finds the reason in the metrics."""
        if self.writer:
            self.writer.log({"step": step, "stopped": reason})
        raise RunStopped(f"{reason}: {AFTER_A_STOP}")

    def _log_step(self, label: StepLabel, stats: StepStats, seconds: float) -> None:
        tokens = label.samples * self.block_size
        tokens_per_s = tokens_per_second(self.last_point, (tokens, seconds))
        self.last_point = (tokens, seconds)
        peak = peak_flops(self.world.device, self.world.dtype)  # None: unknown
        mfu = self.state.model.flops_per_token() * tokens_per_s / (peak * self.world.size) if peak else None
        line = {
            "step": label.step,
            "tokens": tokens,
            "time_s": round(seconds, 3),
            "loss": stats.loss,
            "lr": label.lr,
            "grad_norm": stats.grad_norm,
            "tokens_per_s": round(tokens_per_s, 1),
            "mfu": mfu and round(mfu, 4),
        }
        if self.state.guard.spike_threshold:
            line["skipped"] = self.skipped
        if stats.layers:
            num_layers = len(self.layer_names)
            line["clipped"] = self.state.clipped
            line["layer_grad_norms"] = dict(zip(self.layer_names, stats.layers[1 : 1 + num_layers], strict=True))
            line["layer_update_norms"] = dict(zip(self.layer_names, stats.layers[1 + num_layers :], strict=True))
            self.state.clipped = 0
        if self.writer:
            self.writer.log(line)
        text = f"step {label.step:6d} | loss {stats.loss:.4f} | lr {label.lr:.2e} | norm {stats.grad_norm:.2f}"
        text += f" | {tokens_per_s:,.0f} tok/s"
        if mfu:
            text += f" | mfu {mfu:.1%}"
        print0(f"{text} | {format_duration(self._seconds_left(tokens, tokens_per_s))} left")

    def _seconds_left(self, tokens: int, tokens_per_s: float) -> float:
        if self.deadline is not None:
            return max(self.deadline - time.perf_counter(), 0.0)
        return min(max(self.total_tokens - tokens, 0) / tokens_per_s, MAX_SECONDS)

    def _print_eta(self, label: StepLabel, seconds: float) -> None:
        tokens = label.samples * self.block_size
        left = self._seconds_left(tokens, tokens_per_second(self.after_first_step, (tokens, seconds)))
        end = datetime.now() + timedelta(seconds=left)
        suffix = ", excluding evaluations" if self.deadline is None else ""
        day = "%a" if left < 6 * 86_400 else "%a %d %b"
        print0(f"ETA {format_duration(left)} ({end:{day} %H:%M}){suffix}")


def tokens_per_second(since: tuple[int, float], now: tuple[int, float]) -> float:
    """The speed between two points of a run, each its tokens and its training seconds."""
    return (now[0] - since[0]) / max(now[1] - since[1], 1e-9)


def format_losses(losses: dict[str, float], val_bpb: float | None) -> str:
    """An evaluation in a line: mean loss in nats by split, and val's in bits per byte where known."""
    text = " | ".join(f"{split} loss {loss:.4f}" for split, loss in losses.items())
    return text if val_bpb is None else f"{text}, {val_bpb:.4f} bits per byte"


def print_model_summary(model: Any, world: World) -> None:
    parameters = f"{model.count_parameters():,} parameters"
    if (trained := trained_numel(model)) < model.count_parameters():
        parameters += f", of which {trained:,} are LoRA adapters and train"
    processes = "1 process" if world.size == 1 else f"{world.size} processes"
    if world.shards > 1:
        processes += f", a copy of the model per {world.shards} of them (no samples are printed),"
    print0(
        f"{processes} on {describe_device(world.device)}, {describe_dtype(world)}",
        f"model       {parameters}",
    )
    warn_of_slow_shards(world)


def warn_of_slow_shards(world: World) -> None:
    """Print a warning if ranks that share one of several copies of the model lie on more machines than they need."""
    hosts, shards = world.ranks.hosts, world.shards
    if shards == world.size:
        return
    needed = math.ceil(shards / max(Counter(hosts).values()))
    for first in range(0, world.size, shards):
        used = len(set(hosts[first : first + shards]))
        if used > needed:
            print0(
                f"warning: ranks {first} to {first + shards - 1}, which share a copy of the model, lie on {used} "
                f"machines where {needed} would do: rank the processes machine by machine, and let --shards divide "
                "those of each"
            )
            return


def print_run_summary(
    model: Any, optimizer: str, rows: RowSchedule, micro_batch: int, max_iters: int, dataset: Dataset, world: World
) -> None:
    """Print a run's steps, its length, and the memory and disk space that it takes."""
    step = f"{rows.last} rows of {rows.block_size} = {rows.last * rows.block_size:,} tokens"
    step += f", micro-batches of {micro_batch}"
    if rows.rows_at(0) < rows.last:
        step += f", from {rows.rows_at(0)} rows at first"
    tokens = rows.total_rows(max_iters) * rows.block_size
    memory = estimate_training_memory(model, optimizer, micro_batch, rows.block_size, world.dtype, world.shards)
    free = free_memory(world.device)
    free_text = f", {format_bytes(free)} free" if free else ""
    checkpoint = f"{format_bytes(checkpoint_bytes(model, optimizer))} each"
    if world.shards > 1:
        checkpoint += ", gathered in the host memory of the main process"
    print0(
        f"step        {step}",
        f"run         {max_iters:,} steps = {tokens:,} tokens = {tokens / len(dataset.train):.3g} epochs of "
        f"{dataset.name} = {tokens / model.count_parameters():.3g} tokens per parameter",
        f"memory      about {format_bytes(memory)} per process{free_text}",
        f"checkpoint  {checkpoint}",
    )


def warn_if_slow_on_cpu(model: Any, tokens: int, world: World) -> None:
    """Warn before a run that would take very long on this CPU, by a rough guess."""
    seconds = model.flops_per_token() * tokens / (CPU_FLOPS * torch.get_num_threads() * world.size)
    if world.device.type == "cpu" and seconds > LONG_ON_CPU_S:
        print0(
            f"warning: this may take {format_duration(seconds)} on this CPU; "
            "config/train_shakespeare_char_cpu.py takes a few minutes"
        )


def print_end(state: TrainState, out_dir: Path, exit_status: int, out_of_patience: bool) -> None:
    """Say how the run ended, and what to do next."""
    quoted = shlex.quote(str(out_dir))
    if exit_status:
        print0(f"stopped at step {state.step} by a signal; saved: resume with --out_dir={quoted} --resume=True")
        return
    if out_of_patience:
        print0(f"step {state.step}: no new best in {state.evals_since_best} evaluations (patience); the best is kept")
    print0(
        f"done: step {state.step}, best validation loss {state.best_val_loss:.4f}; "
        f"checkpoints are in {out_dir}/ckpt: python sample.py --out_dir={quoted}"
    )


def warn_of_schedule(schedule: StepSchedule) -> None:
    """Print a warning for a warmup that is longer than the run, or a decay longer than what follows the warmup."""
    end_step = min(schedule.max_iters, schedule.end_step)
    after_warmup = schedule.end_step - schedule.warmup_steps
    if schedule.warmup_steps > end_step:
        print0(f"warning: warmup_iters={schedule.warmup_steps} is longer than the schedule, {end_step} updates")
    elif schedule.name == "trapezoid" and (schedule.decay_steps or 0) > after_warmup:
        print0(
            f"warning: decay_iters={schedule.decay_steps} is longer than the {after_warmup} updates after the warmup: "
            "the learning rate drops where the warmup ends"
        )
