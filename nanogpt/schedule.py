"""Learning-rate schedules."""

import math
from collections.abc import Callable


def learning_rate(
    name: str, step: int, *, max_lr: float, min_lr: float, warmup: int, end: int, decay_steps: int | None = None
) -> float:
    """Learning rate of the update after `step` updates: up in a line for `warmup` updates, then by `SCHEDULES[name]`
    from `max_lr` towards `min_lr`, which all but "constant" reach at `end` and hold.

    decay_steps: updates that a trapezoid's last stretch takes; None: half of those after the warm-up.
    """
    if step < warmup:
        return max_lr * (step + 1) / (warmup + 1)
    left = 0.0 if step >= end else (end - step) / (end - warmup)  # of the way from warm-up to end
    return min_lr + (max_lr - min_lr) * SCHEDULES[name](
        left, 0.5 if decay_steps is None else decay_steps / max(end - warmup, 1)
    )


def cosine(left: float, fall: float) -> float:
    """From 1 to 0 in half a cosine wave (Loshchilov and Hutter 2017)."""
    return (1 - math.cos(math.pi * left)) / 2


def trapezoid(left: float, fall: float) -> float:
    """1, and over the last stretch of length `fall` to 0 in a line (Hu et al. 2024, Hägele et al. 2024)."""
    return min(1.0, left / fall) if fall else 1.0 * (left > 0)


# What is left of the way from the highest to the lowest learning rate, by how much of the schedule is left.
SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "cosine": cosine,
    "trapezoid": trapezoid,
    "constant": lambda left, fall: 1.0,
}
