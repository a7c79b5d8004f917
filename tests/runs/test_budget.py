"""The dial: its choice against trying every width, its clock against one that the test turns, its resume to the bit."""

import json
import math
import re
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, assert_same_checkpoint, metrics, steps

import budget
from nanogpt import checkpoint, scaling
from nanogpt.distributed import World
from nanogpt.errors import InputError
from train import TrainConfig

WORLD = World(0, 1, torch.device("cpu"), torch.float32)
TOLD = {"minutes": 1.0, "expected_loss": 1.5, "evaluation_s": 2.0, "spent_s": 0.0}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds since the process began, which stand still unless the test moves them."""
    now = [10.0]
    monkeypatch.setattr(budget.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(budget, "process_age", lambda: now[0])
    return now


@pytest.mark.parametrize(("minutes", "per_flop"), [(1.0, 1e-11), (10.0, 1e-11), (60.0, 1e-12), (2.0, 1e-13)])
def test_the_choice_is_the_best_of_all_widths(
    letters: Path, monkeypatch: pytest.MonkeyPatch, clock: list[float], minutes: float, per_flop: float
):
    """On a machine whose seconds a token are 1e-6 and so much a FLOP, of a text 1.1 times as hard as the law's."""

    def token_s(trial: budget.SpeedTrial, config: TrainConfig) -> float:
        clock[0] += 1
        return 1e-6 + per_flop * trial.flops(config.n_embd)

    monkeypatch.setattr(budget.SpeedTrial, "token_s", token_s)
    monkeypatch.setattr(budget.SpeedTrial, "difficulty", lambda *_: 1.1)
    endless = property(lambda _: 10**12, lambda *_: None)  # or these few letters would be learned by heart
    monkeypatch.setattr(budget.SpeedTrial, "unique", endless, raising=False)
    letters_of_books = property(lambda _: 83, lambda *_: None)  # or no loss above ln 4 would be expected
    monkeypatch.setattr(budget.SpeedTrial, "vocab_size", letters_of_books, raising=False)
    config = TrainConfig(dataset=str(letters), minutes=minutes, block_size=16, arch="gpt2", device="cpu")
    chosen, told = budget.choose(config, WORLD)
    trial, left_s = (
        budget.SpeedTrial(config, WORLD),
        60 * minutes * (1 - budget.EVALUATION_SHARE) - clock[0] - budget.SHUTDOWN_S,
    )
    losses = {}
    for width in budget.WIDTHS:
        tokens = left_s / (1e-6 + per_flop * trial.flops(width))
        losses[width] = scaling.LAW.loss(scaling.weights(scaling.shape(width)), tokens)
    assert losses[chosen.n_embd] == pytest.approx(min(losses.values()), rel=3e-3)
    assert told["expected_loss"] == pytest.approx(1.1 * budget.SHORT_DECAY_PENALTY * min(losses.values()), rel=3e-3)
    assert told["evaluation_s"] <= budget.EVALUATION_SHARE * 60 * minutes
    tokens = chosen.max_iters * chosen.rows_per_step * 16
    assert tokens * (1e-6 + per_flop * trial.flops(chosen.n_embd)) == pytest.approx(left_s, rel=0.05)
    assert (chosen.arch, chosen.optimizer, chosen.block_size, chosen.last_step) == ("modern", "muon", 16, math.inf)


def test_little_text_is_not_learned_by_heart(letters: Path, monkeypatch: pytest.MonkeyPatch, clock: list[float]):
    """More minutes never make it worse; what is more than enough ends early, by steps that are settled."""
    monkeypatch.setattr(budget.SpeedTrial, "token_s", lambda trial, at: 1e-11 * trial.flops(at.n_embd))
    monkeypatch.setattr(budget.SpeedTrial, "difficulty", lambda *_: 1.1)
    for unique in (5_000, 50_000, 300_000, 10**6):
        monkeypatch.setattr(
            budget.SpeedTrial, "unique", property(lambda _, n=unique: n, lambda *_: None), raising=False
        )
        before = math.inf
        for minutes in (1, 3, 10, 60, 600):
            clock[0] = 10.0
            config = TrainConfig(dataset=str(letters), minutes=minutes, block_size=16, device="cpu")
            chosen, told = budget.choose(config, WORLD)
            assert told["expected_loss"] < 1.003 * before
            before = told["expected_loss"]
            size = scaling.weights(scaling.shape(chosen.n_embd))
            assert size < 4 * unique or chosen.n_embd == 32
            if chosen.schedule == "trapezoid":
                assert chosen.last_step == chosen.max_iters
                assert chosen.decay_iters == pytest.approx(budget.DECAY_SHARE * chosen.max_iters, abs=1)
                epochs = chosen.max_iters * chosen.rows_per_step * 16 / unique
                assert 1 < epochs < 20
            else:
                assert chosen.last_step == math.inf
        assert chosen.schedule == "trapezoid"  # 600 minutes are too many for each of these texts


@pytest.mark.parametrize("known", [True, False])
def test_processes_choose_the_same(letters: Path, monkeypatch: pytest.MonkeyPatch, known: bool):
    """Two, each a thread, that differ in speed, age, free memory and in what their pilot told them."""
    meeting, given, mine = threading.Barrier(2, timeout=30), {}, threading.local()

    class One(World):
        def all_reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
            given[self.rank] = values
            meeting.wait()
            total = given[0] + given[1]
            meeting.wait()
            return total

    def choose(rank: int) -> tuple[TrainConfig, dict[str, float]]:
        mine.rank = rank
        return budget.choose(config, One(rank, 2, torch.device("cpu"), torch.float32))

    flops = budget.SpeedTrial.flops
    monkeypatch.setattr(
        budget.SpeedTrial, "token_s", lambda trial, at: (1 + mine.rank) * 1e-11 * flops(trial, at.n_embd)
    )
    monkeypatch.setattr(
        budget.SpeedTrial, "difficulty", lambda *_: 1 + 0.1 * mine.rank if known else [1.1, math.nan][mine.rank]
    )
    monkeypatch.setattr(budget.SpeedTrial, "fits", lambda _, at, rows: rows <= 8 and (mine.rank == 0 or at.n_embd < 96))
    monkeypatch.setattr(budget, "process_age", lambda: 1 + 9 * mine.rank)
    config = TrainConfig(dataset=str(letters), minutes=1.0, block_size=16, device="cpu")
    with ThreadPoolExecutor(2) as pool:
        (first, told), second = pool.map(choose, range(2))
    assert (first, told) == second
    assert (told["expected_loss"] is not None) == known  # one whose pilot read too little is enough
    assert first.n_embd < 96
    assert first.micro_batch_size in range(5, 9)


def test_a_process_of_four_tries_its_share_within_its_memory(letters: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(budget, "TRY_S", 0.0)
    trial = budget.SpeedTrial(
        TrainConfig(dataset=str(letters), minutes=1.0, block_size=16), World(0, 4, WORLD.device, WORLD.dtype)
    )
    one = trial.settings(32, 1e3, 4)
    assert (one.batch_size, one.rows_per_step, one.micro_batches(4)) == (1, 4, [1])
    assert trial.token_s(one) > 0

    trial.vocab_size = 50_000
    monkeypatch.setattr(budget, "free_memory", lambda _: 2e8)
    assert not trial.fits(one, 256)  # 12 bytes of 50,000 logits for each of 4,096 tokens
    assert trial.fits(one, 4)
    assert trial.fits(replace(one, loss_chunk=64), 256)


@pytest.mark.parametrize("step_s", [0.01, 0.5])
@pytest.mark.parametrize("interval", [0, 10])
def test_the_fall_ends_with_the_minutes(clock: list[float], step_s: float, interval: int):
    """Whatever came before: a pause of 10 s for a checkpoint, and a process that had been there for 30 s."""
    timer = budget.Timer(TrainConfig(minutes=2.0), TOLD | {"minutes": 2.0, "spent_s": 30.0})
    clock[0] += 10
    asked = 0
    while not (fall := timer.fall(interval)):
        asked += 1
        clock[0] += step_s + (10 if asked == 20 else 0)
        if interval and asked % interval == 0:
            clock[0] += TOLD["evaluation_s"]
    left = 120 - 30 - clock[0]
    pause = TOLD["evaluation_s"] if interval else 0.0
    assert left - TOLD["evaluation_s"] - budget.SHUTDOWN_S == pytest.approx(
        budget.DECAY_SHARE * 120 - pause / 2, abs=step_s + pause / 2
    )
    passed = fall * step_s + (fall // interval if interval else 0) * pause + TOLD["evaluation_s"] + budget.SHUTDOWN_S
    assert passed == pytest.approx(left, abs=step_s + pause)
    assert timer.state()["spent_s"] == pytest.approx(120 - left)


@pytest.fixture
def arranged(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of minutes whose sizes are tiny, and whose fall of 8 updates begins at step 9 or the next."""

    def choose(config: TrainConfig, *_: Any) -> tuple[TrainConfig, dict[str, float]]:
        return replace(config, schedule="constant", warmup_iters=2, max_iters=1000, eval_interval=0), TOLD

    monkeypatch.setattr(budget, "choose", choose)
    calls: dict[int, int] = {}

    def fall(timer: budget.Timer, eval_interval: int) -> int:
        calls[id(timer)] = calls.get(id(timer), 0) + 1
        return 8 if calls[id(timer)] >= 8 else 0

    monkeypatch.setattr(budget.Timer, "fall", fall)


def test_a_run_of_minutes(run: Run, arranged: None, capsys: pytest.CaptureFixture[str]):
    assert run(out_dir="out", minutes=1, min_lr=0.0, lr_decay_iters=...) == 0
    told = capsys.readouterr().out
    assert re.search(r"minutes=1: took .* s; reached a validation loss of \d\.\d+, expected 1\.5000 \(.*%\)", told)
    rates = dict(metrics("out", "step", "lr"))
    began, last = steps("out")  # where the fall begins is saved at once, whatever comes
    assert began == last - 7  # one update had begun when it was read
    assert rates[3] == rates[last - 7] == 1e-2  # of the update that led to the step
    assert [rates[last - k] for k in range(7)] == pytest.approx([1e-2 * (k + 1) / 7 for k in range(7)])
    for step in (began, last):
        state = checkpoint.load(Path(f"out/ckpt/step-{step:06d}")).state
        assert (state["config"]["max_iters"], state["config"]["decay_iters"]) == (last, 7)
        assert state["dial"]["expected_loss"] == 1.5


@pytest.mark.parametrize("stop_after", [5, 13])
def test_from_the_fall_on_a_resume_is_exact(
    run: Run, arranged: None, signal_at: Callable[[int, int], None], stop_after: int
):
    """Before it, the clock decides: here a stop delays the fall by as many steps as the new process waits."""
    keys = {"minutes": 1, "min_lr": 0.0, "lr_decay_iters": ...}
    run(out_dir="whole", **keys)
    signal_at(stop_after, signal.SIGTERM)
    assert run(out_dir="parts", **keys) == 143
    stopped = steps("parts")[-1]
    assert run(out_dir="parts", resume="auto", **keys) == 0  # the command as it was
    if stop_after == 13:
        with pytest.raises(InputError, match="minutes=2: the steps are settled already, as 1 minutes had it"):
            run(out_dir="parts", **keys | {"minutes": 2}, resume=True)
        assert metrics("parts") == metrics("whole")
        assert_same_checkpoint("whole", "parts", steps("whole")[-1])
    else:
        assert steps("parts")[-1] == steps("whole")[-1] + stopped
        state = json.loads(Path(f"parts/ckpt/step-{steps('parts')[-1]:06d}/state.json").read_text())
        assert state["dial"]["spent_s"] > 0


def test_a_run_that_goes_by_steps(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    signal_at: Callable[[int, int], None],
    capsys: pytest.CaptureFixture[str],
):
    """Of little text, and with rates that are the dial's: a resume by the same command is exact from the first step."""

    def choose(config: TrainConfig, *_: Any) -> tuple[TrainConfig, dict[str, Any]]:
        rates = {"learning_rate": 3e-2, "schedule": "trapezoid", "decay_iters": 4, "warmup_iters": 2}
        return replace(config, **rates, max_iters=20, eval_interval=0), TOLD | {"expected_loss": None}

    monkeypatch.setattr(budget, "choose", choose)
    keys = {"minutes": 1, "min_lr": 0.0, "lr_decay_iters": ..., "learning_rate": 1e-3}
    assert run(out_dir="whole", **keys) == 0
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"minutes=1: took .* s; reached a validation loss of \d\.\d+", last_line)
    signal_at(9, signal.SIGTERM)
    assert run(out_dir="parts", **keys) == 143
    with pytest.raises(InputError, match="minutes=2: the steps are settled already"):
        run(out_dir="parts", resume=True, minutes=2)
    with pytest.raises(InputError, match="patience: minutes end a run by the clock"):
        run(out_dir="parts", resume=True, patience=2)
    assert run(out_dir="parts", resume="auto", **keys) == 0
    assert metrics("parts") == metrics("whole")
    assert metrics("whole", "lr")[5] == (3e-2,)
    assert_same_checkpoint("whole", "parts", 20)


def test_other_minutes_than_it_was_chosen_for(run: Run, arranged: None, signal_at: Any, capsys: Any):
    keys = {"min_lr": 0.0, "lr_decay_iters": ...}
    signal_at(5, signal.SIGTERM)
    assert run(out_dir="out", minutes=1, **keys) == 143
    assert run(out_dir="out", resume=True, minutes=2) == 0
    assert re.search(r"minutes=2: took .*, sized for 1 minutes", capsys.readouterr().out.splitlines()[-1])


def test_what_the_dial_cannot_have(run: Run, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(InputError, match="minutes: sizes a new model; leave out --init_from=gpt2, or give --max_iters"):
        run(minutes=1, init_from="gpt2")
    with pytest.raises(InputError, match=r"minutes=0.0001: .* had passed before the first step; give at least"):
        run(minutes=1e-4)
    assert "minutes: the dial chooses n_layer, n_head, n_embd" in capsys.readouterr().out
    assert not Path("out").exists()
    with pytest.raises(InputError, match="patience: minutes end a run by the clock"):
        run(minutes=1, patience=1)
    run(out_dir="steps", max_iters=2)
    with pytest.raises(InputError, match="minutes: this run goes on by steps; leave --minutes out"):
        run(out_dir="steps", resume=True, minutes=1)


@pytest.mark.slow
def test_a_real_run_of_minutes(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """From the command line's keys to the end: four random letters, whose loss nobody can bring below their entropy."""
    began = time.perf_counter()
    monkeypatch.setattr(budget, "process_age", lambda: time.perf_counter() - began)
    assert run(out_dir="out", minutes=40 / 60) == 0
    told = capsys.readouterr().out
    assert "expected a validation loss of" in told
    assert metrics("out", "val_loss")[-1][0] < 1.3
    assert any(line.startswith("minutes=") and "reached" in line for line in told.splitlines())
    assert checkpoint.load(Path("out/ckpt") / f"step-{steps('out')[-1]:06d}").state["config"]["optimizer"] == "muon"
