"""Schedules: the learning rate, the last update, and the rows of each update."""

import math
from dataclasses import dataclass


@dataclass
class StepSchedule:
    """A run of a fixed number of updates. budget.py has the one that follows the clock.

    Linear warmup, then from max_lr to min_lr, which all but "constant" reach at end_step and keep. name: cosine, half
    a wave (Loshchilov and Hutter 2017); trapezoid, constant and then linear decay over decay_steps (WSD: Hu et al.
    2024, Hägele et al. 2024); or constant. decay_steps: None: half of the updates after warmup.
    """

    name: str
    max_iters: int
    max_lr: float
    min_lr: float
    warmup_steps: int
    end_step: int
    decay_steps: int | None = None
    deadline: float | None = None  # time.perf_counter() at the end of the run; None: it ends by steps

    def lr(self, step: int) -> float:
        """Learning rate of the update that follows `step` updates."""
        if step < self.warmup_steps:
            return self.max_lr * (step + 1) / (self.warmup_steps + 1)
        length = self.end_step - self.warmup_steps
        remaining = 0.0 if step >= self.end_step else (self.end_step - step) / length
        decay_share = 0.5 if self.decay_steps is None else self.decay_steps / max(length, 1)
        shares = {  # of the way from min_lr to max_lr
            "cosine": (1 - math.cos(math.pi * remaining)) / 2,
            "trapezoid": min(1.0, remaining / decay_share) if decay_share else float(remaining > 0),
            "constant": 1.0,
        }
        return self.min_lr + (self.max_lr - self.min_lr) * shares[self.name]

    def lr_scale(self, step: int) -> float:
        """The learning rate as a share of the maximum."""
        return self.lr(step) / self.max_lr

    def is_done(self, step: int) -> bool:
        return step >= self.max_iters

    def decay_due(self) -> int:
        """Updates of a decay that should begin now; 0: none. A schedule by steps knows its decay from the start."""
        return 0

    def begin_decay(self, step: int, steps: int) -> bool:
        """Begin the final decay, of `steps` updates. True if this changed the schedule; one by steps has its own."""
        return False

    def changed_keys(self) -> dict[str, object]:
        """The keys of TrainConfig that have changed since the run began, for its checkpoints."""
        return {}

    def state_dict(self) -> dict[str, object] | None:
        """The part of a checkpoint that is not in its config."""
        return None

    def summary(self, best_val_loss: float) -> str:
        """The last line that a run prints."""
        return ""


@dataclass
class RowSchedule:
    """Rows of each update: in proportion to the tokens read, from `first` to `last`, over the first growth_tokens."""

    first: int
    last: int
    growth_tokens: int
    block_size: int

    def rows_at(self, samples: int) -> int:
        """Rows of the update that follows `samples` rows: a multiple of `first` while they grow."""
        tokens = samples * self.block_size
        if tokens >= self.growth_tokens:
            return self.last
        grown = self.last * tokens // self.growth_tokens
        return max(grown // self.first, 1) * self.first

    def total_rows(self, steps: int, samples: int = 0) -> int:
        """Rows read when `steps` more updates follow `samples` rows."""
        while steps > 0 and samples * self.block_size < self.growth_tokens:
            samples += self.rows_at(samples)
            steps -= 1
        return samples + steps * self.last
