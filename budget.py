"""The dial: `train.py --minutes=M` makes the best model that this machine can make of this data in M minutes.

It tries the machine and the text for a few seconds, asks the law of nanogpt/scaling.py for the width and the length of
the run, and sees to it that the learning rate has fallen to its end when the time is up.
"""

import math
import os
import statistics
import sys
import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from load import MODEL_KEYS, Steps, document_separator_id, training_steps
from model import GPT, GPTConfig
from nanogpt import scaling
from nanogpt.console import START_TIME, format_duration, print0
from nanogpt.data.dataset import open_dataset
from nanogpt.data.rows import EvalWindows
from nanogpt.device import free_memory
from nanogpt.distributed import World
from nanogpt.errors import InputError
from nanogpt.evaluation import evaluate
from nanogpt.memory import estimate_training_memory
from nanogpt.text.tokenizer import GPT2_VOCAB

PILOT = scaling.PILOT_WIDTH  # of the model that is trained to see how hard the text is
PILOT_SHARE = 0.05
PILOT_S = (1.5, 20.0)
TRY_S = 0.6  # how long a width's speed is measured
TRIES = 5  # widths at most
LEAST_STEPS = 60  # without so many a width is not tried: a few of its steps would take the time of all
EARLY_STOP_SHARE = 0.75  # share of the time: where a little text wants less, the run goes by steps and ends early
MOST_WEIGHTS = 4  # in the blocks for a token of the text: the law has not been tried far beyond (scaling_laws.ipynb)
DECAY_SHARE = 0.2
SHORT_DECAY_PENALTY = 1.009
EVALUATION_SHARE = 0.015  # of the time: what an evaluation may take
LONG_MIN = 5.0  # minutes from which a run is evaluated on its way, and shorter at a time
SHUTDOWN_S = 0.5  # for the last save and Python's end
IMPORT_S = 2.0  # what passes before the program's first line, where the system does not tell
EXTRAPOLATION_EXPONENT = (
    0.85  # exponent by which a token's seconds grow with its FLOPs beyond the widths that were tried
)
PILOT_WINDOWS = 512
WIDTHS = [*range(32, 256, 16), *range(256, 512, 32), *range(512, 2048, 64), *range(2048, 8193, 128)]
# Keys that the dial sets besides those of `scaling.recipe`.
DEFAULTS: dict[str, Any] = {
    "n_kv_head": 0,
    "head_dim": 0,
    "tied": True,
    "bias": False,
    "dropout": 0.0,
    "batch_growth_tokens": 0,
}
DEFAULTS |= {"decay_lr": True, "lr_decay_iters": None, "decay_iters": None, "eval_train": False, "sample_chars": 0}
PATIENCE = "patience: minutes end a run by the clock, its rate at its lowest; leave one of the two out"
BUDGET_KEYS = {*scaling.recipe(64, 1e6, 64), *DEFAULTS, "eval_interval", "eval_iters"}


class Timer:
    """Keeps a run to its minutes, over resumes too.

    told: "minutes" for which the run was chosen; "expected_loss", None where it is unknown; "evaluation_s", what an
    evaluation takes; "spent_s", the time spent by earlier processes.
    """

    def __init__(self, config: Any, told: dict[str, Any]):
        self.told, self.minutes = told, config.minutes
        self.end = time.perf_counter() + 60 * self.minutes - told["spent_s"] - process_age()
        self.last: float | None = None  # when the last update began
        self.steps_s: deque[float] = deque(maxlen=100)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; `told` of the process that goes on."""
        return self.told | {"spent_s": 60 * self.minutes - (self.end - time.perf_counter())}

    def fall(self, eval_interval: int) -> int:
        """How many updates may still begin if it is time for the learning rate to fall, else 0. To be asked at each
        update."""
        now = time.perf_counter()
        if self.last is not None:
            self.steps_s.append(now - self.last)
        self.last = now
        left = self.end - now - self.told["evaluation_s"] - SHUTDOWN_S
        if left > DECAY_SHARE * 60 * self.minutes or len(self.steps_s) < 5:
            return 0
        usual = 3 * statistics.median(self.steps_s)  # longer are those with an evaluation or a save between
        step_s = statistics.mean(s for s in self.steps_s if s <= usual)
        if eval_interval:
            step_s += self.told["evaluation_s"] / eval_interval
        return max(round(left / step_s), 1)

    def report(self, val_loss: float) -> str:
        """What became of the expectation."""
        took, expected = format_duration(self.state()["spent_s"]), self.told["expected_loss"]
        told = f"minutes={self.minutes:g}: took {took}; reached a validation loss of {val_loss:.4f}"
        if self.minutes != self.told["minutes"]:
            return f"{told}, sized for {self.told['minutes']:g} minutes"
        return f"{told}, expected {expected:.4f} ({val_loss / expected - 1:+.1%})" if expected else told


def without_chosen(given: dict[str, Any]) -> dict[str, Any]:
    """What files and flags give, without the keys that the dial sets, which it tells."""
    if ignored := [name for name in given if name in BUDGET_KEYS]:
        print0(f"minutes: the dial chooses {', '.join(ignored)} itself; what is given does not count")
    return {name: value for name, value in given.items() if name not in BUDGET_KEYS}


def to_resume(given: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    """What files and flags give to a run that goes on from `state`. Raises InputError where minutes can change nothing:
    in a run that goes on by steps, and once its steps are settled."""
    minutes = given.get("minutes")
    if not state.get("dial"):
        if minutes:
            raise InputError("minutes: this run goes on by steps; leave --minutes out, or begin another --out_dir")
        return given
    if minutes not in (None, state["config"]["minutes"]) and state["config"]["schedule"] != "constant":
        raise InputError(
            f"minutes={minutes:g}: the steps are settled already, as {state['config']['minutes']:g} minutes had it; "
            "leave --minutes out"
        )
    if given.get("patience"):
        raise InputError(PATIENCE)
    return without_chosen(given)


class SpeedTrial:
    """A run of any width on this text and this machine, tried for a few steps. config: train.py's."""

    def __init__(self, config: Any, world: World):
        self.config, self.world, self.alone = config, world, World(0, 1, world.device, world.dtype)
        self.dataset = open_dataset(config.dataset, block_size=config.block_size)
        self.vocab_size = self.dataset.vocab_size or GPT2_VOCAB
        self.unique = len(self.dataset.train)
        self.end_of_text = document_separator_id(config, self.dataset)

    def settings(self, width: int, tokens: float, processes: int) -> Any:
        """Of a run of this width and length, its rows shared by so many processes."""
        keys = scaling.recipe(width, tokens, self.config.block_size)
        keys |= {"batch_size": -(-keys["batch_size"] // processes), "gradient_accumulation_steps": processes}
        return replace(self.config, **DEFAULTS | keys)

    def model(self, config: Any) -> GPT:
        return GPT(GPTConfig(vocab_size=self.vocab_size, **{name: getattr(config, name) for name in MODEL_KEYS}))

    def steps(self, config: Any, model: GPT) -> Steps:
        """One process's steps of a run."""
        if "torch._dynamo" in sys.modules:  # what other widths were compiled to counts against a limit
            torch._dynamo.reset()
        torch.manual_seed(config.seed)
        model.end_of_text = self.end_of_text
        return training_steps(replace(config, gradient_accumulation_steps=1), model, self.dataset.train, self.alone)

    def flops(self, width: int) -> float:
        """Of a token, about: the blocks' weights and the output layer's."""
        return 6 * (scaling.weights(scaling.shape(width)) + width * self.vocab_size)

    def fits(self, config: Any, rows: int) -> bool:
        """Whether memory will do for so many rows at a time, by the estimate."""
        with torch.device("meta"):
            model = self.model(config)
        model.activation_checkpointing, model.loss_chunk = config.activation_checkpointing, config.loss_chunk
        needed = estimate_training_memory(model, config, rows, config.block_size, self.world)
        free = free_memory(self.world.device)
        neighbors = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if self.world.device.type == "cpu" else 1
        return free is None or needed * neighbors < 0.7 * free

    def token_s(self, config: Any) -> float:
        """Seconds a token, over all processes, if all are as fast as this one."""
        steps = self.steps(config, self.model(config))

        def step_s(count: int) -> float:
            began = time.perf_counter()
            for _ in range(count):
                next(steps)
            self.alone.synchronize()
            return (time.perf_counter() - began) / count

        step_s(1)  # which warms up
        count = max(round(TRY_S / 8 / step_s(1)), 1)  # at a time, so that a GPU seldom waits for the host
        began, seconds = time.perf_counter(), [step_s(count)]
        while time.perf_counter() - began < TRY_S:
            seconds.append(step_s(count))
        return statistics.median(seconds) / (config.rows_per_step * config.block_size)

    def plan(self, width: int, tokens: float) -> tuple[float, float]:
        """The law's loss of a width that could read so many tokens, and how many of them it is to read."""
        size = scaling.weights(scaling.shape(width))
        best = scaling.LAW.length(size, tokens, self.unique)
        best = tokens if best > EARLY_STOP_SHARE * tokens else best
        if width > WIDTHS[0] and self.settings(width, tokens, self.world.size).max_iters < LEAST_STEPS:
            return math.inf, best
        return scaling.LAW.loss(size, best, self.unique), best

    def agreed(self, value: float) -> float:
        """The mean of what each process has found: all must choose the same."""
        return self.world.all_reduce_sum(torch.tensor(float(value), device=self.world.device)).item() / self.world.size

    def difficulty(self, seconds: float, token_s: float) -> float:
        """How many times the law's loss this text's is, by a small model trained on it for so many seconds."""
        size = scaling.weights(scaling.shape(PILOT))
        tokens = scaling.LAW.length(size, seconds / token_s / self.world.size, self.unique)
        one = self.settings(PILOT, tokens, processes=1)
        torch.manual_seed(one.seed)
        model = self.model(one)
        steps = self.steps(one, model)
        for _ in range(one.max_iters):
            next(steps)
        T, rows = one.block_size, one.batch_size
        windows = EvalWindows(self.dataset.val, T, -(-PILOT_WINDOWS // rows), rows, self.vocab_size)
        with torch.no_grad():
            loss = evaluate(model, windows, rows, self.alone)
        return scaling.difficulty(loss, one.max_iters * rows * T, self.unique, T)


def choose(config: Any, world: World) -> tuple[Any, dict[str, Any]]:
    """The settings of the best run of `config.minutes`, and what a `Timer` is to be told.

    config: train.py's; its data, context, precision and logging stay. Raises InputError where minutes cannot be had:
    weights that are there already, too little time or memory.
    """
    if config.init_from != "scratch":
        raise InputError(f"minutes: sizes a new model; leave out --init_from={config.init_from}, or give --max_iters")
    if config.patience:
        raise InputError(PATIENCE)
    whole_s, trial = 60 * config.minutes, SpeedTrial(config, world)
    widths = [width for width in WIDTHS if scaling.weights(scaling.shape(width)) < MOST_WEIGHTS * trial.unique]
    widths = widths or WIDTHS[:1]
    speeds = {PILOT: trial.agreed(trial.token_s(trial.settings(PILOT, 1e6, world.size)))}  # seconds a token, by width
    difficulty = trial.agreed(trial.difficulty(min(max(PILOT_SHARE * whole_s, PILOT_S[0]), PILOT_S[1]), speeds[PILOT]))
    while True:  # until the best width, by the speeds that are known, is one of these
        left_s = trial.agreed(whole_s - process_age() - SHUTDOWN_S - EVALUATION_SHARE * whole_s)
        if left_s < whole_s / 2:
            raise InputError(
                f"minutes={config.minutes:g}: {process_age():.0f} s had passed before the first step; give at least "
                f"{process_age() / 20:.1f}"
            )
        plans = {width: trial.plan(width, left_s / speed(trial, speeds, width)) for width in widths}
        best = min(plans, key=lambda width: plans[width][0])
        loss, tokens = plans[best]
        chosen = trial.settings(best, tokens, world.size)
        sizes = chosen.micro_batches(world.size)
        if rows := next((rows for rows in sizes if trial.agreed(trial.fits(chosen, rows)) == 1), 0):
            chosen = replace(chosen, micro_batch_size=rows)
            if best in speeds or len(speeds) > TRIES:
                break
            speeds[best] = trial.agreed(trial.token_s(chosen))
        elif not (widths := [width for width in widths if width < best]):
            raise InputError(
                f"minutes: too little memory for a row and {WIDTHS[0]} channels; give less than "
                f"--block_size={config.block_size}"
            )
    token_s = speed(trial, speeds, best)
    if by_steps := tokens * token_s < EARLY_STOP_SHARE * left_s:
        whole_s += (tokens * token_s - left_s) / (1 - EVALUATION_SHARE)
        print0(
            f"minutes={config.minutes:g}: about {format_duration(whole_s)} will do: read longer, this text of "
            f"{trial.unique:,} tokens would be learned by heart"
        )
    evaluations = 4 if whole_s >= 60 * LONG_MIN else 1
    evaluation_s = EVALUATION_SHARE * whole_s / evaluations
    batches = round(3 * evaluation_s / token_s / config.block_size / chosen.batch_size)  # forward is a third of a step
    many = batches * chosen.batch_size * config.block_size >= len(trial.dataset.val)
    chosen = replace(
        chosen,
        schedule="trapezoid" if by_steps else "constant",  # until the fall begins
        decay_iters=round(DECAY_SHARE * chosen.max_iters) if by_steps else None,
        eval_interval=chosen.max_iters // evaluations if evaluations > 1 else 0,
        eval_iters=0 if many else max(batches, 1),
    )
    expected = None if math.isnan(difficulty) else loss * difficulty * SHORT_DECAY_PENALTY
    bpb = expected and trial.dataset.val.bits_per_byte(expected)
    print0(
        f"tried    {len(speeds)} widths, {1 / speeds[PILOT]:,.0f} to {1 / token_s:,.0f} tokens/s"
        + (f"; the text's loss is {difficulty:.3f} of the law's" if expected else ""),
        f"chosen   {best} wide, {chosen.n_layer} layers; about {chosen.max_iters:,} steps of {chosen.rows_per_step} "
        f"rows, {tokens:,.0f} tokens = {tokens / trial.unique:.3g} epochs; Muon's rate {chosen.muon_lr:.2e}",
        (
            f"expected a validation loss of {expected:.4f}"
            if expected
            else "expected no loss in particular: the pilot could read too little"
        )
        + (f", {bpb:.4f} bits per byte" if bpb else ""),
    )
    told = {"minutes": config.minutes, "expected_loss": expected, "evaluation_s": evaluation_s, "spent_s": 0.0}
    return chosen, told


def speed(trial: SpeedTrial, speeds: dict[int, float], width: int) -> float:
    """Seconds a token at a width: on a line between those known, by logarithms of FLOPs and seconds; beyond them
    larger ones are taken for a little more efficient."""
    known = sorted(speeds)
    flops, seconds = (np.log([find(w) for w in known]) for find in (trial.flops, speeds.__getitem__))
    x = math.log(trial.flops(width))
    beyond = max(x - flops[-1], 0) + min(x - flops[0], 0)
    return math.exp(np.interp(x, flops, seconds) + EXTRAPOLATION_EXPONENT * beyond)


def process_age() -> float:
    """Seconds since this process began."""
    try:
        began = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return float(Path("/proc/uptime").read_text().split()[0]) - began
    except (OSError, ValueError, IndexError):  # not Linux
        return time.perf_counter() - START_TIME + IMPORT_S
