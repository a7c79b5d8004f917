"""The console log of a training run: step lines, ETA, summary."""

import math
import os
import time
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import torch
from torch import Tensor

from nanogpt.console import START_TIME, format_bytes, format_duration, print0
from nanogpt.device import describe_device, free_memory
from nanogpt.distributed import World
from nanogpt.errors import InputError, RunStopped
from nanogpt.memory import optimizer_state_numel
from nanogpt.metrics import DeferredRead, MetricsWriter, Stopwatch

REMEDY = (
    "go on from the last checkpoint with --resume=True and a lower --learning_rate, delete it to go on from the one "
    "before, or start again"
)
CPU_FLOPS = 3e10  # FLOP/s that a small model's step reaches on one core; only for a guess before the first step


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
                print0(f"first step done {time.perf_counter() - START_TIME:.1f} s after the start")
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
        print0(f"step {step:6d} | {format_losses(losses, val_bpb)} | {format_duration(seconds)} trained")
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
            + f" | {format_duration(self._left_s(step, tokens_per_s))} left"
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
        print0(f"finishes in about {format_duration(left)}, {end:%a %H:%M}{aside}")

    def _tokens(self, step: int) -> int:
        return self.samples[step] * self.model.config.block_size


def format_losses(losses: dict[str, float], val_bpb: float | None) -> str:
    """An evaluation for the reader: mean loss in nats by split, and val's in bits per byte where that is known."""
    told = " | ".join(f"{split} loss {loss:.4f}" for split, loss in losses.items())
    return told + (f", {val_bpb:.4f} bits per byte" if val_bpb is not None else "")


def print_run_summary(
    config: Any, model: Any, micro_batch: int, memory: float, dataset: str, train_tokens: int, world: World, remedy: str
) -> None:
    """Print what a run will be, before it begins; memory: bytes; the other arguments are train.py's. Raises
    InputError, saying `remedy`, where a CPU's memory will not do: there the system would kill the process without a
    word."""
    parameters, T, rows = model.count_parameters(), model.config.block_size, config.rows_per_step
    tokens, on_cpu = config.rows_in(config.max_iters) * T, world.device.type == "cpu"
    dtype = str(world.dtype).removeprefix("torch.")
    print0(
        f"{world.size} process(es) on {describe_device(world.device)}, {dtype}",
        f"model       {parameters:,} parameters",
    )
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
        print0(f"warning: on this CPU that may take {format_duration(guess)}; {told}")
    if on_cpu and free and memory * int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > free:
        raise InputError(f"{remedy}; about {format_bytes(memory)} are needed")
