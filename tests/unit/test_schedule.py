"""Schedules against values by hand."""

import math
from typing import Any

import pytest

from load import make_schedule
from nanogpt.schedule import RowSchedule, StepSchedule
from train import TrainConfig


def rate(step: int, name: str = "cosine", **keys: Any) -> float:
    keys = {"max_iters": 110, "max_lr": 1.0, "min_lr": 0.1, "warmup_steps": 10, "end_step": 110} | keys
    return StepSchedule(name, **keys).lr(step)


@pytest.mark.parametrize("name", ["cosine", "trapezoid", "constant"])
def test_lr_warms_up_in_a_line(name: str):
    assert [rate(step, name) for step in (0, 4, 9, 10)] == pytest.approx([1 / 11, 5 / 11, 10 / 11, 1])


def test_lr_by_hand():
    assert rate(35) == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)  # a quarter of the way
    assert [rate(step) for step in (60, 110, 10**6)] == pytest.approx([0.55, 0.1, 0.1])
    assert all(rate(step) > rate(step + 1) for step in range(10, 110))
    assert [rate(step, "trapezoid") for step in (60, 85, 110, 500)] == pytest.approx([1, 0.55, 0.1, 0.1])
    assert [rate(step, "trapezoid", decay_steps=4) for step in (106, 107, 110)] == pytest.approx([1, 0.775, 0.1])
    assert [rate(step, "trapezoid", decay_steps=0) for step in (109, 110)] == [1, 0.1]
    assert rate(500, "constant") == 1
    assert rate(3, warmup_steps=0, end_step=0) == pytest.approx(0.1)  # nothing to divide by


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, {0: 6e-4 / 2001, 2000: 6e-4, 600_000: 6e-5}),
        ({"max_iters": 20, "warmup_iters": 0, "lr_decay_iters": 40, "min_lr": 0.0}, {20: 3e-4, 40: 0.0}),
        ({"max_iters": 20, "warmup_iters": 2, "schedule": "trapezoid", "decay_iters": 4}, {16: 6e-4, 18: 3.3e-4}),
        ({"decay_lr": False}, {0: 6e-4, 10**7: 6e-4}),
    ],
)
def test_make_schedule_follows_the_keys_of_a_run(keys: dict[str, Any], expected: dict[int, float]):
    config = TrainConfig(**keys)
    schedule = make_schedule(config)
    assert [schedule.lr(step) for step in expected] == pytest.approx(list(expected.values()))
    assert schedule.lr_scale(1000) == schedule.lr(1000) / 6e-4
    assert config.decay_lr or schedule.lr_scale(1000) == 1
    assert [schedule.is_done(config.max_iters - 1), schedule.is_done(config.max_iters)] == [False, True]


def test_row_schedule_grows_in_a_line():
    """12 rows of 16 tokens after 640 tokens, which are 40 rows; multiples of 2."""
    schedule = RowSchedule(2, 12, 640, 16)
    ends = []
    samples = 0
    for _ in range(20):
        samples += schedule.rows_at(samples)
        ends.append(samples)
    assert ends[:12] == [2, 4, 6, 8, 10, 12, 14, 18, 22, 28, 36, 46]
    assert ends[-1] == 46 + 8 * 12
    assert [schedule.total_rows(steps) for steps in (0, 1, 12, 20)] == [0, 2, 46, ends[-1]]
    assert schedule.total_rows(8, samples=46) == ends[-1]  # after a resume
    assert RowSchedule(2, 12, 0, 16).rows_at(0) == 12
