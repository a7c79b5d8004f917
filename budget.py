"""`train.py --minutes=M`: the best model for a time budget, on this machine and this data.

It trains small models for a few seconds to measure the machine's speed and how hard the text is, asks the scaling law
of nanogpt/scaling.py for the width and the length of the run, and starts the final decay of the learning rate so that
it ends with the budget.
"""

import itertools
import math
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configurator import ExplicitKeys
from load import (
    choose_dtype,
    choose_micro_batch,
    make_schedule,
    micro_batch_sizes,
    new_model,
    new_model_config,
    prepare_model,
    prepare_training,
)
from model import GPT
from nanogpt import scaling
from nanogpt.console import START_TIME, format_duration, print0
from nanogpt.data.dataset import Tokens, document_separator_id, open_dataset
from nanogpt.data.ngrams import NgramTargets
from nanogpt.data.rows import EvalWindows, Rows, StepBatch
from nanogpt.distributed import World
from nanogpt.errors import InputError, raise_problems
from nanogpt.evaluation import evaluate
from nanogpt.memory import estimate_training_memory, fits_in_memory
from nanogpt.metrics import DeferredRead, StepStats, Stopwatch
from nanogpt.rendezvous import world_size
from nanogpt.schedule import StepSchedule
from nanogpt.sharding import check_shards
from nanogpt.text.tokenizer import GPT2_VOCAB
from nanogpt.timing import time_steps
from nanogpt.train_log import format_losses

WIDTHS = [*range(32, 256, 16), *range(256, 512, 32), *range(512, 2048, 64), *range(2048, 8193, 128)]
MAX_WEIGHTS_PER_TOKEN = 4  # limit of the blocks' weights: the law was not fitted far beyond (scaling_laws.ipynb)
MIN_STEPS = 60  # a width whose run would be shorter is not tried: a few of its steps would use up the budget
EARLY_STOP_SHARE = 0.75  # if a small text needs less of the time, the run goes by steps and ends early

# The pilot: a small model whose loss shows how hard the text is.
PILOT_WIDTH = scaling.PILOT_WIDTH
PILOT_SHARE = 0.05  # share of the time for it
MIN_PILOT_S = 1.5
MAX_PILOT_S = 20.0
PILOT_WINDOWS = 512

# Speed trials.
TYPICAL_WIDTH = 128  # width of a run of some minutes: wider ones gain more by bfloat16
TYPICAL_TOKENS = 1e6
TRIAL_S = 0.6  # seconds of measurement per width
MAX_TRIALS = 5
EXTRAPOLATION_EXPONENT = 0.85  # a token's seconds grow with its FLOPs to this power beyond the widths that were tried

# The share of the time for the final decay, and its loss over that of half the time, which the law knows (runs/scaling,
# "falls"). During the decay steps count, not the clock: a machine that slows down by a quarter then ends 5% late.
DECAY_SHARE = 0.2
SHORT_DECAY_PENALTY = 1.009

EVALUATION_SHARE = 0.015  # share of the time for evaluations
LONG_MINUTES = 5.0  # a longer run is also evaluated on its way, with fewer windows each time
SHUTDOWN_S = 0.5  # what the last save and the end of the interpreter take
IMPORT_S = 2.0  # guess of the time before the program's first line, where the system does not know it

# Keys that a time budget sets besides those of `scaling.make_recipe`.
DEFAULTS: dict[str, Any] = {
    "n_kv_head": 0,
    "head_dim": 0,
    "gelu": "tanh",
    "tied": True,
    "bias": False,
    "dropout": 0.0,
    "ngram_targets": 0,  # such runs get below the loss of the counts (runs/soft_targets)
    "batch_growth_tokens": 0,
    "decay_lr": True,
    "lr_decay_iters": None,
    "decay_iters": None,
    "eval_train": False,
    "sample_chars": 0,
}
BUDGET_KEYS = {*scaling.make_recipe(64, 1e6, 64), *DEFAULTS, "eval_interval", "eval_iters"}
NO_PATIENCE = "patience: a time budget ends the run by the clock, at the lowest learning rate; leave one of the two out"

TrainStep = Callable[..., StepStats]  # train.py's train_step
Plan = dict[str, Any]  # minutes, expected_loss (None: unknown), evaluation_s, spent_s (by earlier processes)


# --- During the run


class ClockSchedule(StepSchedule):
    """A schedule that ends with a time budget: constant learning rate, then a decay that begins in time.

    Until then it has no last step. The decay is counted in steps, so that a resumed run repeats it exactly.
    """

    def __init__(self, steps: StepSchedule, plan: Plan, minutes: float, eval_interval: int):
        """steps: by the run's keys; its name is "constant" until the decay has begun. plan: of `choose`."""
        super().__init__(**vars(steps))
        self.plan = plan
        self.minutes = minutes
        self.eval_interval = eval_interval
        self.end = time.perf_counter() + 60 * minutes - plan["spent_s"] - process_age()
        self.is_decaying = self.name != "constant"
        self.deadline = None if self.is_decaying else self.end
        self.last_update_at: float | None = None
        self.step_times: deque[float] = deque(maxlen=100)

    def is_done(self, step: int) -> bool:
        return self.is_decaying and super().is_done(step)

    def decay_due(self) -> int:
        """Updates that fit into the remaining time, if it is time for the decay; else 0. Call it once an update."""
        now = time.perf_counter()
        if self.last_update_at is not None:
            self.step_times.append(now - self.last_update_at)
        self.last_update_at = now
        left = self.end - now - self.plan["evaluation_s"] - SHUTDOWN_S
        if self.is_decaying or left > DECAY_SHARE * 60 * self.minutes or len(self.step_times) < 5:
            return 0
        limit = 3 * statistics.median(self.step_times)  # longer ones had an evaluation or a save in between
        step_s = statistics.mean(seconds for seconds in self.step_times if seconds <= limit)
        if self.eval_interval:
            step_s += self.plan["evaluation_s"] / self.eval_interval
        return max(round(left / step_s), 1)

    def begin_decay(self, step: int, steps: int) -> bool:
        """Begin a linear decay; False if it has begun. One of the `steps` has passed since they were counted."""
        if self.is_decaying:
            return False
        self.is_decaying = True
        self.name = "trapezoid"
        self.decay_steps = max(steps - 1, 1)
        self.max_iters = self.end_step = step + self.decay_steps
        return True

    def changed_keys(self) -> dict[str, Any]:
        """The keys of TrainConfig that the decay settles, for checkpoints."""
        if not self.is_decaying:
            return {}
        return {"schedule": self.name, "max_iters": self.max_iters, "decay_iters": self.decay_steps}

    def state_dict(self) -> Plan:
        """The plan for the process that resumes the run."""
        return {**self.plan, "spent_s": self._spent_s()}

    def summary(self, best_val_loss: float) -> str:
        """Final message: time taken, loss reached vs. predicted."""
        text = f"minutes={self.minutes:g}: took {format_duration(self._spent_s())}, validation loss {best_val_loss:.4f}"
        if self.minutes != self.plan["minutes"]:
            return f"{text}, sized for {self.plan['minutes']:g} minutes"
        expected = self.plan["expected_loss"]
        if not expected:
            return text
        return f"{text}, expected {expected:.4f} ({best_val_loss / expected - 1:+.1%})"

    def _spent_s(self) -> float:
        return 60 * self.minutes - (self.end - time.perf_counter())


def drop_budget_keys(explicit: ExplicitKeys) -> ExplicitKeys:
    """The explicit keys without those that a time budget sets, which are printed."""
    ignored = [name for name in explicit if name in BUDGET_KEYS]
    if ignored:
        print0(f"minutes: the time budget sets {', '.join(ignored)}; the given values are ignored")
    return ExplicitKeys({name: explicit[name] for name in explicit if name not in BUDGET_KEYS}, explicit.flags)


def check_resume(explicit: ExplicitKeys, state: dict[str, Any]) -> ExplicitKeys:
    """The explicit keys that can change a run resumed from `state`.

    Raises InputError where --minutes cannot: in a run without a time budget, and after its decay has begun.
    """
    minutes = explicit.get("minutes")
    if not state["dial"]:
        if minutes:
            raise InputError("minutes: this run has no time budget; leave --minutes out, or start another --out_dir")
        return explicit
    saved = state["config"]
    if minutes not in (None, saved["minutes"]) and saved["schedule"] != "constant":
        raise InputError(
            f"minutes={minutes:g}: the steps are settled already, for {saved['minutes']:g} minutes; leave it out"
        )
    if explicit.get("patience"):
        raise InputError(NO_PATIENCE)
    return drop_budget_keys(explicit)


# --- Before the run


def check_new_run(config: Any) -> None:
    """Raise InputError, a line each, for keys that a new time budget excludes."""
    problems = []
    if config.init_from != "scratch":
        problems.append(f"minutes: sizes a new model; leave out --init_from={config.init_from}, or give --max_iters")
    if config.lora_rank:
        problems.append("lora_rank: needs trained weights, and minutes sizes a new model; leave one of the two out")
    if config.patience:
        problems.append(NO_PATIENCE)
    problems += check_shards(config.shards, world_size(), config.dtype, config.lora_rank, config.minutes)
    raise_problems(problems)


def choose(config: Any, world: World, train_step: TrainStep) -> tuple[Any, World, Plan]:
    """The settings of the best run of config.minutes, the world with its dtype, and its plan for `ClockSchedule`.

    config: a TrainConfig; data, context, precision and logging stay. Raises InputError for a budget that cannot be
    kept: too little time or memory.
    """
    total_s = 60 * config.minutes
    trial = SpeedTrial(config, world, train_step)
    trial.measure_speed(PILOT_WIDTH, trial.make_config(PILOT_WIDTH, 1e6, world.size))
    pilot_s = min(max(PILOT_SHARE * total_s, MIN_PILOT_S), MAX_PILOT_S)
    difficulty = trial.agree(trial.measure_difficulty(pilot_s))
    chosen, loss, tokens, left_s = _best_run(trial, total_s)

    token_s = trial.predict_token_s(chosen.n_embd)
    run_s = tokens * token_s
    ends_early = run_s < EARLY_STOP_SHARE * left_s
    if ends_early:
        # The evaluations shrink with the run: they keep their share of the total.
        total_s += (run_s - left_s) / (1 - EVALUATION_SHARE)
        print0(
            f"minutes={config.minutes:g}: stopping after about {format_duration(total_s)}: more epochs over these "
            f"{trial.num_tokens:,} tokens would overfit"
        )

    # Evaluate four times in a long run, else only at the end; read as much of the split as the time allows.
    num_evaluations = 4 if total_s >= 60 * LONG_MINUTES else 1
    evaluation_s = EVALUATION_SHARE * total_s / num_evaluations
    batch_s = token_s / 3 * config.block_size * chosen.batch_size  # forward is a third of a step
    num_batches = round(evaluation_s / batch_s)
    covers_split = num_batches * chosen.batch_size * config.block_size >= len(trial.dataset.val)
    chosen = replace(
        chosen,
        schedule="trapezoid" if ends_early else "constant",  # until the decay begins
        decay_iters=round(DECAY_SHARE * chosen.max_iters) if ends_early else None,
        eval_interval=chosen.max_iters // num_evaluations if num_evaluations > 1 else 0,
        eval_iters=0 if covers_split else max(num_batches, 1),
    )

    # The law's runs began without look_back, and half of their time was the decay.
    loss *= scaling.LOOK_BACK_FACTOR * SHORT_DECAY_PENALTY
    expected_loss = None if math.isnan(difficulty) else loss * difficulty
    plan = {"minutes": config.minutes, "expected_loss": expected_loss, "evaluation_s": evaluation_s, "spent_s": 0.0}

    comparison = ""
    expected = "no particular loss: the pilot was too short"
    if expected_loss:
        comparison = f"; this text is {difficulty:.3f} × as hard as the reference text"
        expected = format_losses({"validation": expected_loss}, trial.dataset.val.bits_per_byte(expected_loss))
    pilot_speed = 1 / trial.predict_token_s(PILOT_WIDTH)
    print0(
        f"tried    {len(trial.speeds)} widths, {pilot_speed:,.0f} to {1 / token_s:,.0f} tokens/s{comparison}",
        f"chosen   {chosen.n_embd} channels, {chosen.n_layer} layers; about {chosen.max_iters:,} steps of "
        f"{chosen.rows_per_step} rows, {tokens:,.0f} tokens = {tokens / trial.num_tokens:.3g} epochs; Muon's learning "
        f"rate {chosen.muon_lr:.2e}",
        f"expected {expected}",
    )
    return chosen, trial.world, plan


def _best_run(trial: "SpeedTrial", total_s: float) -> tuple[Any, float, float, float]:
    """The settings of the best run, its loss by the law, its tokens, and the seconds left for it.

    Measures the speed of the width that is best by the speeds known so far, until that width is among them.
    """
    minutes = trial.config.minutes
    widths = [w for w in WIDTHS if scaling.count_weights(w) < MAX_WEIGHTS_PER_TOKEN * trial.num_tokens]
    widths = widths or WIDTHS[:1]
    while widths:
        age_s = process_age()
        left_s = trial.agree(total_s - age_s - SHUTDOWN_S - EVALUATION_SHARE * total_s)
        if left_s < total_s / 2:
            raise InputError(
                f"minutes={minutes:g}: {age_s:.0f} s passed before the first step; give at least {age_s / 20:.1f}"
            )
        runs = {width: trial.predict_run(width, left_s) for width in widths}
        best = min(widths, key=lambda width: runs[width][0])
        loss, tokens = runs[best]
        chosen = trial.make_config(best, tokens, trial.world.size)
        micro_batch = trial.pick_micro_batch(chosen)
        if micro_batch is None:
            widths = [width for width in widths if width < best]
            continue
        chosen = replace(chosen, micro_batch_size=micro_batch)
        if best in trial.speeds or len(trial.speeds) > MAX_TRIALS:
            return chosen, loss, tokens, left_s
        trial.measure_speed(best, chosen)
    block_size = trial.config.block_size
    raise InputError(f"minutes: not enough memory for a row with {WIDTHS[0]} channels; lower --block_size={block_size}")


class SpeedTrial:
    """Short runs of any width on this text and this machine. config: a TrainConfig."""

    def __init__(self, config: Any, world: World, train_step: TrainStep):
        self.dataset = open_dataset(config.dataset, block_size=config.block_size, token_dtype=config.token_dtype)
        self.vocab_size = self.dataset.vocab_size or GPT2_VOCAB
        self.config = config
        typical = self.make_config(TYPICAL_WIDTH, TYPICAL_TOKENS, world.size)
        typical, self.world = choose_dtype(typical, new_model_config(typical, self.vocab_size), world)
        self.config = replace(config, dtype=typical.dtype)  # one for the whole run
        self.single = World(0, 1, world.device, self.world.dtype)  # trials run in each process on its own
        self.train_step = train_step
        self.num_tokens = len(self.dataset.train)
        self.separator_id = document_separator_id(self.dataset, config.mask_documents)
        self.speeds: dict[int, float] = {}  # measured seconds a token, by width

    def make_config(self, width: int, tokens: float, num_processes: int) -> Any:
        """The config of a run of this width and length, its rows shared by num_processes."""
        keys = {**DEFAULTS, **scaling.make_recipe(width, tokens, self.config.block_size)}
        keys["batch_size"] = math.ceil(keys["batch_size"] / num_processes)
        keys["gradient_accumulation_steps"] = num_processes
        return replace(self.config, **keys)

    def start_steps(self, config: Any) -> tuple[GPT, Iterator[list[float]]]:
        """A new model and one process's steps of its run."""
        torch.manual_seed(config.seed)
        model = new_model(config, self.vocab_size, self.single)
        model.document_separator_id = self.separator_id
        config = replace(config, gradient_accumulation_steps=1)
        return model, training_steps(config, model, self.dataset.train, self.single, self.train_step)

    def count_flops(self, width: int) -> float:
        """FLOPs of a token, about: the blocks' weights and the output layer's."""
        return 6 * (scaling.count_weights(width) + width * self.vocab_size)

    def pick_micro_batch(self, config: Any) -> int | None:
        """Rows of a forward pass that fit into memory on all ranks, by the estimate; None: not even one."""
        with torch.device("meta"):
            model = GPT(new_model_config(config, self.vocab_size))
        model.activation_checkpointing = config.activation_checkpointing
        model.loss_chunk = config.loss_chunk
        for rows in micro_batch_sizes(config, self.world.size):
            memory = estimate_training_memory(model, config.optimizer, rows, config.block_size, self.world.dtype)
            if self.agree(fits_in_memory(memory, self.world.device)) == 1:
                return rows
        return None

    def measure_speed(self, width: int, config: Any) -> None:
        """Time a few steps: seconds a token over all processes, if all are as fast as this one."""
        _, steps = self.start_steps(config)
        time_steps(steps, 1, self.single)  # warmup
        (first_s,), _ = time_steps(steps, 1, self.single)
        count = max(round(TRIAL_S / 8 / first_s), 1)  # at a time, so that a GPU seldom waits for the host
        start = time.perf_counter()
        means: list[float] = []
        while not means or time.perf_counter() - start < TRIAL_S:
            means.append(statistics.mean(time_steps(steps, count, self.single)[0]))
        self.speeds[width] = self.agree(statistics.median(means) / (config.rows_per_step * config.block_size))

    def predict_token_s(self, width: int) -> float:
        """Seconds a token: linear in the logarithms of FLOPs and seconds between the measured widths.

        Beyond them, larger models are assumed to be a little more efficient.
        """
        measured = sorted(self.speeds)
        log_flops = np.log([self.count_flops(w) for w in measured])
        log_seconds = np.log([self.speeds[w] for w in measured])
        x = math.log(self.count_flops(width))
        beyond = max(x - log_flops[-1], 0) + min(x - log_flops[0], 0)
        return math.exp(np.interp(x, log_flops, log_seconds) + EXTRAPOLATION_EXPONENT * beyond)

    def predict_run(self, width: int, seconds: float) -> tuple[float, float]:
        """The law's loss of a run of this width in this time, and its tokens: fewer where more epochs would overfit."""
        size = scaling.count_weights(width)
        tokens = seconds / self.predict_token_s(width)
        best = scaling.LAW.pick_tokens(size, tokens, self.num_tokens)
        if best > EARLY_STOP_SHARE * tokens:
            best = tokens
        if width > WIDTHS[0] and self.make_config(width, tokens, self.world.size).max_iters < MIN_STEPS:
            return math.inf, best
        return scaling.LAW.predict_loss(size, best, self.num_tokens), best

    def agree(self, value: float) -> float:
        """The mean over all processes, so that all choose the same."""
        return self.world.sum_over_ranks([value])[0] / self.world.size

    def measure_difficulty(self, seconds: float) -> float:
        """This text's loss over the law's, from a small model trained on it for some seconds."""
        size = scaling.count_weights(PILOT_WIDTH)
        tokens = seconds / self.speeds[PILOT_WIDTH] / self.world.size
        tokens = scaling.LAW.pick_tokens(size, tokens, self.num_tokens)
        config = self.make_config(PILOT_WIDTH, tokens, num_processes=1)
        config = replace(config, look_back=False)  # as in the law's runs
        model, steps = self.start_steps(config)
        for _ in range(config.max_iters):
            next(steps)
        T = config.block_size
        rows = config.batch_size
        windows = EvalWindows(self.dataset.val, T, math.ceil(PILOT_WINDOWS / rows), rows, self.vocab_size)
        with torch.no_grad():
            loss = evaluate(model, windows, rows, self.single)
        return scaling.estimate_difficulty(loss, config.max_iters * rows * T, self.num_tokens, T)


def training_steps(config: Any, gpt: GPT, tokens: Tokens, world: World, train_step: TrainStep) -> Iterator[list[float]]:
    """train.py's updates of a new run in one process, without log and checkpoints; for trials and bench.py.

    Each `next` makes one update, and returns the losses that were read during it.
    """
    prepare_model(config, gpt, world)
    vocab_size = gpt.config.vocab_size
    ngrams = NgramTargets(tokens, config.ngram_targets, vocab_size) if config.ngram_targets else None
    rows = Rows(tokens, config.block_size, vocab_size, config.seed, config.row_order, ngrams)
    micro_batch = choose_micro_batch(config, gpt, world)
    model, state = prepare_training(config, gpt, rows, micro_batch, world)
    state.guard.max_bad_steps = sys.maxsize  # a trial that diverges is timed all the same
    schedule = make_schedule(config)
    deferred = DeferredRead(Stopwatch())
    for step in itertools.count():
        first_row = step * config.rows_per_step
        batch = StepBatch(rows, first_row, config.rows_per_step, micro_batch, world, config.seed, step, config.dropout)
        stats = train_step(
            model,
            batch,
            state.optimizer,
            state.scaler,
            state.guard,
            world,
            lr_scale=schedule.lr_scale(step),
            grad_clip=config.grad_clip,
        )
        deferred.put(step, stats.to_tensor())
        yield [values[0] for _, values, _ in deferred.take()]


def process_age() -> float:
    """Seconds since this process began."""
    try:
        stat = Path("/proc/self/stat").read_text()
        start_s = int(stat.rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - start_s  # /proc/uptime may be that of a container
    except (OSError, ValueError, IndexError, AttributeError):  # not Linux
        return time.perf_counter() - START_TIME + IMPORT_S
