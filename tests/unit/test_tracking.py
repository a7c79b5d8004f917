"""metrics.jsonl, the stopwatch, and values read a step late."""

import json
import resource
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Run, metrics

import train
from nanogpt import metrics as metrics_module
from nanogpt.console import format_bytes, format_duration
from nanogpt.errors import InputError
from nanogpt.metrics import DeferredRead, MetricsWriter, Stopwatch
from train import TrainConfig

SETTINGS = {"tensorboard": False, "wandb_log": False}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, set by hand."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_stopwatch_counts_only_while_it_runs(clock: list[float]):
    watch = Stopwatch(100.0)
    clock[0] = 7
    assert watch.seconds == 100
    watch.start()
    clock[0] = 9
    assert watch.seconds == 102
    watch.start()  # runs already: not started anew
    clock[0] = 10
    watch.stop()
    clock[0] = 50
    watch.stop()
    assert watch.seconds == 103
    watch.start()
    clock[0] = 51
    assert watch.seconds == 104


def test_late_holds_back_the_last_value(clock: list[float]):
    watch = Stopwatch()
    watch.start()
    late = DeferredRead(watch)
    assert late.take() == []
    for step in (1, 2, 3):
        clock[0] = 10.0 * step
        late.put(step, torch.tensor([step, step / 2]))
        if step > 1:
            assert late.take() == [(step - 1, [step - 1, (step - 1) / 2], 10.0 * (step - 1))]
    assert late.take() == []
    assert late.take(everything=True) == [(3, [3, 1.5], 30.0)]
    assert late.take(everything=True) == []


def test_tracker_writes_strict_json_and_drops_what_comes_after_the_checkpoint(tmp_path: Path):
    def track(step: int, *lines: dict[str, Any]) -> list[str]:
        tracker = MetricsWriter(tmp_path, step, True, SETTINGS)
        for line in lines:
            tracker.log(line)
        tracker.close()
        return path.read_text().splitlines()

    path = tmp_path / "metrics.jsonl"
    lines = track(0, {"step": 1, "loss": float("nan"), "mfu": None}, {"step": 2, "loss": float("-inf")}, {"step": 3})
    assert lines == ['{"step": 1, "loss": null, "mfu": null}', '{"step": 2, "loss": null}', '{"step": 3}']
    with path.open("a") as file:
        file.write('{"step": 1')  # cut by a kill
    assert track(2, {"step": 3, "loss": 0.5}) == [*lines[:2], '{"step": 3, "loss": 0.5}']
    assert track(3) == [*lines[:2], '{"step": 3, "loss": 0.5}']
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(("evaluated", "kept"), [(True, 3), (False, 2)])
def test_an_evaluation_that_will_come_again_is_dropped(tmp_path: Path, evaluated: bool, kept: int):
    lines = ['{"step": 2, "val_loss": 1.5}', '{"step": 4, "loss": 1.5}', '{"step": 4, "val_loss": 1.25}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    MetricsWriter(tmp_path, 4, evaluated, SETTINGS).close()
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == lines[:kept]


def test_a_disk_that_takes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The run goes on, is told once, and no line is lost."""
    tracker = MetricsWriter(tmp_path, 0, True, SETTINGS)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        for step in (1, 2, 3):
            tracker.log({"step": step, "loss": 0.5})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1'
    assert capsys.readouterr().out.count("metrics.jsonl could not be written (File too large): its lines wait") == 1
    tracker.log({"step": 4, "loss": 0.5})
    tracker.close()
    assert metrics(tmp_path, "step", "loss") == [(step, 0.5) for step in (1, 2, 3, 4)]
    (tmp_path / "other" / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(InputError, match=r"metrics.jsonl cannot be written \(Is a directory\): mend"):
        MetricsWriter(tmp_path / "other", 0, True, SETTINGS)


def test_fields_of_a_run(run: Run):
    run(out_dir="out", batch_size=2, gradient_accumulation_steps=3, log_interval=4, eval_interval=10)
    lines = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "loss" not in line]
    assert {tuple(line) for line in training} == {
        ("step", "tokens", "time_s", "loss", "lr", "grad_norm", "tokens_per_s", "mfu")
    }
    assert {tuple(line) for line in evaluations} == {("step", "tokens", "time_s", "train_loss", "val_loss")}
    assert [line["step"] for line in lines] == [0, 4, 8, 10, 12, 16, 20, 20]
    assert all(line["tokens"] == line["step"] * 2 * 3 * 16 for line in lines)
    # The rate is that of the update which led to the step; a CPU's peak is unknown.
    config = TrainConfig(max_iters=20, learning_rate=1e-2, warmup_iters=2)
    assert metrics("out", "step", "lr") == [(k, config.learning_rate_at(k - 1)) for k in (4, 8, 12, 16, 20)]
    assert {line["mfu"] for line in training} == {None}
    times = [line["time_s"] for line in lines]
    assert times == sorted(times)
    assert times[0] == 0 < times[-1]
    # Each line's speed is that since the line before, so the seconds add up.
    passed = sum(4 * 6 * 16 / line["tokens_per_s"] for line in training)
    assert passed == pytest.approx(training[-1]["time_s"], rel=2e-3, abs=2e-3)


def test_time_without_evaluation_and_saving(run: Run, monkeypatch: pytest.MonkeyPatch):
    slept = 0.0

    def slow(function: Any) -> Any:
        def wrapped(*args: Any) -> Any:
            nonlocal slept
            time.sleep(0.05)
            slept += 0.05
            return function(*args)

        return wrapped

    monkeypatch.setattr(train, "evaluate", slow(train.evaluate))
    began = time.perf_counter()
    run(out_dir="out", eval_interval=4)
    monkeypatch.setattr(train.checkpoint, "save", slow(train.checkpoint.save))
    run(out_dir="out", eval_interval=100, checkpoint_minutes=1e-7)  # saves that no evaluation comes before
    took = time.perf_counter() - began
    assert slept > 1
    seconds = [
        json.loads(Path(name, "metrics.jsonl").read_text().splitlines()[-1])["time_s"] for name in ("out", "out.1")
    ]
    assert 0 < sum(seconds) < took - slept


def test_words_for_times_and_sizes():
    said = [format_duration(s) for s in (0.4, 59, 60, 187, 3599.6, 20530, 48 * 3600, 273600)]
    assert said == ["0 s", "59 s", "1:00 min", "3:07 min", "1:00:00 h", "5:42:10 h", "2 d 0 h", "3 d 4 h"]
    assert [format_bytes(n) for n in (0, 999, 1e3, 1.5e6, 2.54e9, 3e12)] == [
        "0 B",
        "999 B",
        "1 kB",
        "1.5 MB",
        "2.54 GB",
        "3 TB",
    ]


def test_a_resumed_run_goes_on_in_wandb(run: Run, monkeypatch: pytest.MonkeyPatch):
    """With a stand-in for wandb that hands out ids: the second start asks for the first one's."""
    asked, logged = [], []

    class Session:
        id = "id-of-the-first"

        def log(self, numbers: dict[str, float], step: int) -> None:
            logged.append(step)

        def finish(self) -> None:
            pass

    def init(**keys: Any) -> Session:
        asked.append((keys["id"], keys["resume"]))
        return Session()

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    monkeypatch.setattr(metrics_module, "find_spec", lambda _: True)
    run(out_dir="out", max_iters=3, wandb_log=True, eval_interval=0)
    run(out_dir="out", max_iters=5, resume=True)
    assert asked == [(None, "allow"), ("id-of-the-first", "allow")]
    assert sorted(set(logged)) == [1, 2, 3, 4, 5]
