"""The lines of a run: time left, skipped spikes, sizes and durations."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from load import make_schedule, make_state
from model import GPT, GPTConfig
from nanogpt.console import format_bytes, format_duration
from nanogpt.control import Control
from nanogpt.distributed import World
from nanogpt.metrics import StepStats
from nanogpt.rendezvous import Ranks
from nanogpt.schedule import RowSchedule
from nanogpt.train_log import StepLogger, warn_of_schedule, warn_of_slow_shards
from train import TrainConfig

WORLD = World(0, 1, torch.device("cpu"), torch.float32)


def make_log(total_rows: int = 100, skip_spikes: float = 0.0) -> tuple[StepLogger, Any]:
    """A StepLogger that only prints, and its clock, which the test sets."""
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=9, block_size=16))
    state = make_state(TrainConfig(skip_spikes=skip_spikes), model, WORLD)
    clock: Any = SimpleNamespace(seconds=0.0)
    state.clock = clock
    return StepLogger(state, WORLD, None, 1, total_rows, None, None), clock


def stats(skipped: float = 0.0) -> StepStats:
    return StepStats(*torch.tensor([2.0, 1.0, 0.0, skipped]), Control(*torch.zeros(4)), [])


def test_time_left_counts_rows_where_they_grow(capsys: pytest.CaptureFixture[str]):
    """20 steps of 2 to 12 rows, each row a second."""
    rows = RowSchedule(2, 12, 640, 16)
    log, clock = make_log(rows.total_rows(20))
    samples = 0
    for step in range(1, 13):
        first_row = samples
        samples += rows.rows_at(samples)
        clock.seconds = float(samples)
        log.put(step, first_row, samples, 1e-3, stats())
        log.read()
    lines = capsys.readouterr().out.splitlines()
    left = rows.total_rows(20) - rows.total_rows(10)
    assert any(line.startswith("step     10 |") and f"{format_duration(left)} left" in line for line in lines)
    assert any(line.startswith(f"ETA {format_duration(left)} (") for line in lines)


def test_a_new_spike_is_printed_once(capsys: pytest.CaptureFixture[str]):
    log, _ = make_log(skip_spikes=5.0)
    for step, skipped in enumerate((0, 1, 1, 2), 1):
        log.put(step, 0, 4 * step, 1e-3, stats(skipped=skipped))
    log.read(everything=True)
    output = capsys.readouterr().out
    assert "step 2: skipped a spike, gradient norm 1 (1 so far)" in output
    assert "step 4: skipped a spike, gradient norm 1 (2 so far)" in output
    assert output.count("skipped a spike") == 2


def test_formats_of_durations_and_bytes():
    durations = [format_duration(s) for s in (0.4, 59, 60, 187, 3599.6, 20530, 48 * 3600, 273600)]
    assert durations == ["0 s", "59 s", "1:00 min", "3:07 min", "1:00:00 h", "5:42:10 h", "2 d 0 h", "3 d 4 h"]
    sizes = [format_bytes(n) for n in (0, 999, 1e3, 999_600, 1.5e6, 2.54e9, 3e12)]
    assert sizes == ["0 B", "999 B", "1 kB", "1 MB", "1.5 MB", "2.54 GB", "3 TB"]


@pytest.mark.parametrize(
    ("keys", "warning"),
    [
        ({"warmup_iters": 20, "max_iters": 20}, ""),
        ({"warmup_iters": 21, "max_iters": 20}, "warmup_iters=21 is longer than the schedule, 20 updates"),
        ({"warmup_iters": 21, "max_iters": 30, "lr_decay_iters": 20}, "warmup_iters=21 is longer than"),
        ({"warmup_iters": 21, "max_iters": 20, "decay_lr": False}, ""),
        ({"warmup_iters": 8, "max_iters": 20, "schedule": "trapezoid", "decay_iters": 12}, ""),
        ({"warmup_iters": 8, "max_iters": 20, "schedule": "trapezoid", "decay_iters": 13}, "than the 12 updates"),
    ],
)
def test_schedules_that_do_not_fit_are_named(keys: dict[str, Any], warning: str, capsys: pytest.CaptureFixture[str]):
    warn_of_schedule(make_schedule(TrainConfig(**keys)))
    printed = capsys.readouterr().out
    assert warning in printed
    assert bool(printed) == bool(warning)


@pytest.mark.parametrize(
    ("hosts", "shards", "named"),
    [
        ("aaaabbbb", 4, ""),  # a node each
        ("aaaabbbbccccdddd", 8, ""),  # a copy needs two nodes
        ("abababab", 4, "ranks 0 to 3"),  # in turn
        ("aaabbb", 2, "ranks 2 to 3"),  # 2 divides no 3
        ("abababab", 8, ""),  # one copy lies on all nodes
        ("abababab", 1, ""),
    ],
)
def test_copies_of_a_model_on_more_machines_than_needed_are_named(
    hosts: str, shards: int, named: str, capsys: pytest.CaptureFixture[str]
):
    ranks = Ranks()
    ranks.hosts = [*hosts]
    mesh = SimpleNamespace(size=lambda _: shards)
    warn_of_slow_shards(World(0, len(hosts), WORLD.device, WORLD.dtype, mesh=mesh, ranks=ranks))
    output = capsys.readouterr().out
    warning = f"warning: {named}, which share a copy of the model, lie on 2 machines where 1 would do"
    assert output.startswith(warning) if named else not output
