"""--minutes: its choice against trying every width, its clock against one that the test sets, its resume to the bit."""

import math
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Run, SignalAt, assert_same_checkpoint, metrics, steps

import budget
from load import make_schedule
from nanogpt import checkpoint, scaling
from nanogpt.distributed import World
from nanogpt.errors import InputError
from train import TrainConfig, train_step

WORLD = World(0, 1, torch.device("cpu"), torch.float32)
PLAN = {"minutes": 1.0, "expected_loss": 1.5, "evaluation_s": 2.0, "spent_s": 0.0}
MINUTES: dict[str, Any] = {"minutes": 1, "min_lr": 0.0, "lr_decay_iters": ...}  # a run of ClockSchedule


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds since the process began, set by the test."""
    now = [10.0]
    monkeypatch.setattr(budget.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(budget, "process_age", lambda: now[0])
    return now


def test_process_age_counts_from_the_start_of_the_process():
    code = "import time; time.sleep(1); import budget; print(budget.process_age())"
    before = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 1 < float(done.stdout) < time.perf_counter() - before + 0.1


# --- The choice before a run


@pytest.fixture
def simulate(letters: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[TrainConfig, dict[str, Any]]]:
    """`simulate(minutes, num_tokens, token_s)`: `choose` on a simulated machine, which takes token_s(flops) a token.

    The text has num_tokens tokens, 83 different ones, and is 1.1 times as hard as the reference text.
    """

    def choose(
        minutes: float, num_tokens: int, token_s: Callable[[float], float]
    ) -> tuple[TrainConfig, dict[str, Any]]:
        initialize = budget.SpeedTrial.__init__

        def init(trial: budget.SpeedTrial, *args: Any) -> None:
            initialize(trial, *args)
            trial.num_tokens = num_tokens
            trial.vocab_size = 83

        def measure(trial: budget.SpeedTrial, width: int, config: TrainConfig) -> None:
            trial.speeds[width] = trial.agree(token_s(trial.count_flops(width)))

        with monkeypatch.context() as patch:
            patch.setattr(budget.SpeedTrial, "__init__", init)
            patch.setattr(budget.SpeedTrial, "measure_speed", measure)
            patch.setattr(budget.SpeedTrial, "measure_difficulty", lambda *_: 1.1)
            patch.setattr(budget, "fits_in_memory", lambda *_: True)  # whatever is free here
            config = TrainConfig(dataset=str(letters), minutes=minutes, block_size=16, device="cpu")
            chosen, _, plan = budget.choose(config, WORLD, train_step)
            return chosen, plan

    return choose


@pytest.mark.parametrize(("minutes", "flop_s"), [(1.0, 1e-11), (10.0, 1e-11), (60.0, 1e-12), (2.0, 1e-13)])
def test_choice_is_the_best_of_all_widths(simulate: Any, clock: list[float], minutes: float, flop_s: float):
    """On a machine that takes 1 µs a token and flop_s a FLOP."""

    def token_s(flops: float) -> float:
        return 1e-6 + flop_s * flops

    chosen, plan = simulate(minutes, 10**12, token_s)
    left_s = 60 * minutes * (1 - budget.EVALUATION_SHARE) - clock[0] - budget.SHUTDOWN_S
    losses = {}
    speeds = {}
    for width in budget.WIDTHS:
        size = scaling.count_weights(width)
        speeds[width] = token_s(6 * (size + width * 83))
        losses[width] = scaling.LAW.predict_loss(size, left_s / speeds[width])
    best = min(losses.values())
    assert losses[chosen.n_embd] == pytest.approx(best, rel=3e-3)
    assert plan["expected_loss"] == pytest.approx(
        1.1 * budget.SHORT_DECAY_PENALTY * scaling.LOOK_BACK_FACTOR * best, rel=3e-3
    )
    assert plan["evaluation_s"] <= budget.EVALUATION_SHARE * 60 * minutes
    tokens = chosen.max_iters * chosen.rows_per_step * 16
    assert tokens * speeds[chosen.n_embd] == pytest.approx(left_s, rel=0.05)
    assert (chosen.arch, chosen.optimizer, chosen.block_size, chosen.schedule) == ("modern", "muon", 16, "constant")


@pytest.mark.parametrize("num_tokens", [5_000, 50_000, 300_000, 10**6])
def test_small_texts_end_early_instead_of_overfitting(simulate: Any, clock: list[float], num_tokens: int):
    """More minutes never make the loss worse; what is more than enough ends early, by steps."""
    before = math.inf
    for minutes in (1, 3, 10, 60, 600):
        chosen, plan = simulate(minutes, num_tokens, lambda flops: 1e-11 * flops)
        assert plan["expected_loss"] < 1.003 * before
        before = plan["expected_loss"]
        size = scaling.count_weights(chosen.n_embd)
        assert size < budget.MAX_WEIGHTS_PER_TOKEN * num_tokens or chosen.n_embd == budget.WIDTHS[0]
        if chosen.schedule == "trapezoid":
            assert chosen.decay_iters == pytest.approx(budget.DECAY_SHARE * chosen.max_iters, abs=1)
            assert 1 < chosen.max_iters * chosen.rows_per_step * 16 / num_tokens < 20  # epochs
    assert chosen.schedule == "trapezoid"


@pytest.mark.parametrize("is_known", [True, False])
def test_ranks_choose_the_same(letters: Path, monkeypatch: pytest.MonkeyPatch, is_known: bool):
    """Two ranks, each a thread, that differ in speed, age, free memory and the loss of their pilot."""
    barrier = threading.Barrier(2, timeout=120)
    values: dict[int, torch.Tensor] = {}
    this = threading.local()

    class ThreadWorld(World):
        def all_reduce_sum(self, value: torch.Tensor) -> torch.Tensor:
            values[self.rank] = value
            barrier.wait()
            total = values[0] + values[1]
            barrier.wait()
            return total

    def measure(trial: budget.SpeedTrial, width: int, config: TrainConfig) -> None:
        trial.speeds[width] = trial.agree((1 + this.rank) * 1e-11 * trial.count_flops(width))

    def difficulty(*_: Any) -> float:
        return 1 + 0.1 * this.rank if is_known or this.rank == 0 else math.nan

    def choose(rank: int) -> tuple[TrainConfig, dict[str, Any]]:
        this.rank = rank
        world = ThreadWorld(rank, 2, torch.device("cpu"), torch.float32)
        chosen, _, plan = budget.choose(config, world, train_step)
        return chosen, plan

    monkeypatch.setattr(budget.SpeedTrial, "measure_speed", measure)
    monkeypatch.setattr(budget.SpeedTrial, "measure_difficulty", difficulty)
    monkeypatch.setattr(budget, "fits_in_memory", lambda needed, _: needed < (5e6 if this.rank else 1e9))
    monkeypatch.setattr(budget, "process_age", lambda: 1 + 9 * this.rank)
    config = TrainConfig(dataset=str(letters), minutes=1.0, block_size=16, device="cpu")
    with ThreadPoolExecutor(2) as pool:
        (first, plan), second = pool.map(choose, range(2))
    assert (first, plan) == second
    assert (plan["expected_loss"] is not None) == is_known  # one pilot that was too short is enough
    assert 1 <= first.micro_batch_size < first.batch_size or first.n_embd < 96  # by the memory of the second rank


def test_trial_of_one_rank_trains_its_share(letters: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(budget, "TRIAL_S", 0.0)
    world = World(0, 4, WORLD.device, WORLD.dtype)
    monkeypatch.setattr(World, "all_reduce_sum", lambda self, values: values * self.size)
    trial = budget.SpeedTrial(TrainConfig(dataset=str(letters), block_size=16), world, train_step)
    config = trial.make_config(32, 1e3, num_processes=4)
    assert (config.batch_size, config.rows_per_step) == (1, 4)
    trial.measure_speed(32, config)
    assert 0 < trial.predict_token_s(32) < trial.predict_token_s(64) < trial.predict_token_s(512)
    monkeypatch.setattr(budget, "fits_in_memory", lambda *_: False)
    assert trial.pick_micro_batch(config) is None


# --- The clock during a run


@pytest.mark.parametrize("step_s", [0.01, 0.5])
@pytest.mark.parametrize("eval_interval", [0, 10])
def test_decay_ends_with_the_minutes(clock: list[float], step_s: float, eval_interval: int):
    """Whatever came before: an earlier process of 30 s, and a pause of 10 s for a checkpoint."""
    steps_of_run = make_schedule(TrainConfig(schedule="constant", max_iters=1000))
    schedule = budget.ClockSchedule(steps_of_run, PLAN | {"minutes": 2.0, "spent_s": 30.0}, 2.0, eval_interval)
    evaluation_s = PLAN["evaluation_s"]
    clock[0] += 10
    updates = 0
    while not (decay_steps := schedule.decay_due()):
        updates += 1
        clock[0] += step_s + (10 if updates == 20 else 0)
        if eval_interval and updates % eval_interval == 0:
            clock[0] += evaluation_s
    assert not schedule.is_done(10**6)  # until the decay has begun there is no last step
    left = 120 - 30 - clock[0]
    pause = evaluation_s if eval_interval else 0.0
    begin = left - evaluation_s - budget.SHUTDOWN_S
    assert begin == pytest.approx(budget.DECAY_SHARE * 120 - pause / 2, abs=step_s + pause / 2)
    evaluations = decay_steps // eval_interval if eval_interval else 0
    needed = decay_steps * step_s + evaluations * pause + evaluation_s + budget.SHUTDOWN_S
    assert needed == pytest.approx(left, abs=step_s + pause)
    assert schedule.state_dict()["spent_s"] == pytest.approx(120 - left)


def test_a_plan_that_ends_early_goes_by_steps(clock: list[float]):
    steps_of_run = make_schedule(TrainConfig(schedule="trapezoid", max_iters=20))
    schedule = budget.ClockSchedule(steps_of_run, PLAN | {"expected_loss": None}, 1.0, 0)
    clock[0] += 100
    assert schedule.decay_due() == 0
    assert [schedule.is_done(step) for step in (19, 20)] == [False, True]
    assert schedule.deadline is None
    assert "expected" not in schedule.summary(1.5)


# --- Runs


@pytest.fixture
def arrange(monkeypatch: pytest.MonkeyPatch) -> None:
    """A time budget of a tiny model whose decay of 8 updates is due from the eighth update of a process on."""

    def choose(config: TrainConfig, world: World, _: Any) -> tuple[TrainConfig, World, dict[str, Any]]:
        keys = {"schedule": "constant", "learning_rate": 3e-2, "warmup_iters": 2, "max_iters": 1000, "eval_interval": 0}
        return replace(config, **keys), world, PLAN

    def decay_due(schedule: budget.ClockSchedule) -> int:
        schedule.step_times.append(1.0)
        return 8 if len(schedule.step_times) >= 8 and not schedule.is_decaying else 0

    monkeypatch.setattr(budget, "choose", choose)
    monkeypatch.setattr(budget.ClockSchedule, "decay_due", decay_due)


def test_run_of_minutes_decays_and_reports(run: Run, arrange: None, capsys: pytest.CaptureFixture[str]):
    assert run(out_dir="out", **MINUTES) == 0
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert last_line.startswith("minutes=1: took ")
    assert "expected 1.5000 (" in last_line
    rates = dict(metrics("out", "step", "lr"))
    begin, last = steps("out")  # the beginning of the decay is saved at once
    assert begin == last - 7  # one update had begun when the request was read
    assert rates[3] == rates[begin] == 3e-2
    assert [rates[last - k] for k in range(7)] == pytest.approx([3e-2 * (k + 1) / 7 for k in range(7)])
    for step in (begin, last):
        state = checkpoint.load(Path(f"out/ckpt/step-{step:06d}")).state
        assert (state["config"]["max_iters"], state["config"]["decay_iters"]) == (last, 7)
        assert state["dial"]["expected_loss"] == 1.5


def test_resume_during_the_decay_is_exact(run: Run, arrange: None, signal_at: SignalAt):
    run(out_dir="whole", **MINUTES)
    signal_at(13, signal.SIGTERM)
    assert run(out_dir="parts", **MINUTES) == 143
    for keys, message in (({"minutes": 2}, "minutes=2: the steps are settled"), ({"patience": 2}, "patience: ")):
        with pytest.raises(InputError, match=message):
            run(out_dir="parts", resume=True, **MINUTES | keys)
    assert run(out_dir="parts", resume="auto", **MINUTES) == 0  # the same command, whose --learning_rate is ignored
    assert metrics("parts") == metrics("whole")
    assert_same_checkpoint("whole", "parts", steps("whole")[-1])


def test_resume_before_the_decay_may_change_the_minutes(
    run: Run, arrange: None, signal_at: SignalAt, capsys: pytest.CaptureFixture[str]
):
    """A stop delays the decay by as many steps as the new process waits."""
    run(out_dir="whole", **MINUTES)
    signal_at(4, signal.SIGTERM)
    assert run(out_dir="parts", **MINUTES) == 143
    stopped_at = steps("parts")[-1]
    assert run(out_dir="parts", resume=True, minutes=2) == 0
    assert "minutes=2: took " in capsys.readouterr().out.splitlines()[-1]
    assert steps("parts")[-1] == steps("whole")[-1] + stopped_at
    state = checkpoint.load(Path(f"parts/ckpt/step-{steps('parts')[-1]:06d}")).state
    assert state["dial"]["spent_s"] > 0
    assert (state["dial"]["minutes"], state["config"]["minutes"]) == (1.0, 2.0)


def test_impossible_budgets_are_refused(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    for name in ("TRIAL_S", "MIN_PILOT_S"):
        monkeypatch.setattr(budget, name, 0.0)
    with pytest.raises(InputError, match=r"minutes: .*--init_from=gpt2"):
        run(minutes=1, init_from="gpt2")
    with pytest.raises(InputError, match=r"minutes=0\.0001: .* give at least"):
        run(minutes=1e-4)
    assert "minutes: the time budget sets n_layer, n_head, n_embd" in capsys.readouterr().out
    assert not Path("out").exists()
    problems = r"minutes: .*--init_from=gpt2.*\nlora_rank: .*\npatience: .*\n(.*\n)*minutes: chooses small models"
    with pytest.raises(InputError, match=problems):
        run(minutes=1, patience=1, lora_rank=8, init_from="gpt2", shards=2)
    run(out_dir="steps", max_iters=2)
    with pytest.raises(InputError, match="minutes: this run has no time budget"):
        run(out_dir="steps", resume=True, minutes=1)


@pytest.mark.slow
def test_real_run_of_minutes(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    began = time.perf_counter()
    monkeypatch.setattr(budget, "process_age", lambda: time.perf_counter() - began)
    assert run(out_dir="out", minutes=40 / 60) == 0
    output = capsys.readouterr().out
    assert "expected validation loss" in output
    assert output.splitlines()[-1].startswith("minutes=")
    assert metrics("out", "val_loss")[-1][0] < 1.3  # log 4 = 1.386 is what a guess costs
    assert checkpoint.load(Path(f"out/ckpt/step-{steps('out')[-1]:06d}")).state["config"]["optimizer"] == "muon"
