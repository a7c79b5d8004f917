"""Stopwatch, values read a step late, and metrics.jsonl."""

import os
import resource
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from nanogpt.errors import InputError
from nanogpt.metrics import DeferredRead, MetricsWriter, Stopwatch, Tracker, read_stop_reason
from nanogpt.run_dir import RunDir


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """time.perf_counter's seconds, set by the test."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_stopwatch_counts_while_it_runs(clock: list[float]):
    watch = Stopwatch(100.0)
    clock[0] = 7
    assert watch.seconds == 100
    watch.start()
    clock[0] = 9
    watch.start()  # runs already
    clock[0] = 10
    assert watch.seconds == 103
    watch.stop()
    clock[0] = 50
    watch.stop()
    assert watch.seconds == 103


def test_deferred_read_holds_back_the_last_value(clock: list[float]):
    watch = Stopwatch()
    watch.start()
    deferred = DeferredRead(watch)
    assert deferred.take() == []
    for step in (1, 2, 3):
        clock[0] = 10.0 * step
        deferred.put(step, torch.tensor([step, step / 2]))
        if step > 1:
            assert deferred.take() == [(step - 1, [step - 1, (step - 1) / 2], 10.0 * (step - 1))]
    assert deferred.take() == []
    assert deferred.take(everything=True) == [(3, [3, 1.5], 30.0)]
    assert deferred.take(everything=True) == []


def write(out_dir: Path, step: int, *lines: dict[str, Any], is_evaluated: bool = True) -> list[str]:
    """Resume metrics.jsonl at `step`, append lines, and return the file's lines."""
    writer = MetricsWriter(RunDir(out_dir), step, is_evaluated)
    for line in lines:
        writer.log(line)
    writer.close()
    return (out_dir / "metrics.jsonl").read_text().splitlines()


def test_metrics_are_strict_json_without_lines_after_the_checkpoint(tmp_path: Path):
    nan = float("nan")
    lines = write(tmp_path, 0, {"step": 1, "loss": nan, "norms": {"a": nan}}, {"step": 2, "loss": -1e999}, {"step": 3})
    assert lines == ['{"step": 1, "loss": null, "norms": {"a": null}}', '{"step": 2, "loss": null}', '{"step": 3}']
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1')  # cut by a kill
    assert write(tmp_path, 2, {"step": 3, "loss": 0.5}) == [*lines[:2], '{"step": 3, "loss": 0.5}']
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(("is_evaluated", "kept"), [(True, 3), (False, 2)])
def test_an_evaluation_that_is_repeated_is_dropped(tmp_path: Path, is_evaluated: bool, kept: int):
    lines = ['{"step": 2, "val_loss": 1.5}', '{"step": 4, "loss": 1.5}', '{"step": 4, "val_loss": 1.25}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert write(tmp_path, 4, is_evaluated=is_evaluated) == lines[:kept]


def test_a_full_disk_loses_no_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    writer = MetricsWriter(RunDir(tmp_path), 0, is_evaluated=True)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        writer.log({"step": 1})
        writer.log({"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1'
    assert capsys.readouterr().out.count("cannot be written (File too large)") == 1
    writer.log({"step": 3})
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def edit(path: Path, content: str) -> None:
    """Save as editors do: a new file takes the name."""
    path.with_suffix(".swp").write_text(content)
    path.with_suffix(".swp").replace(path)


@pytest.mark.parametrize(
    ("deed", "expected", "warning"),
    [
        (lambda path: path.unlink(), "1 2 3 4", "was replaced or deleted"),
        (lambda path: edit(path, '{"step": 1}\n'), "1 2 3 4", "was replaced"),  # as it was when the editor read it
        (lambda path: edit(path, '{"step": 0}\n{"step": 1}'), "0 1 2 3 4", "was replaced"),  # without the last newline
        (lambda path: edit(path, '{"step": 2}\n'), "2 3 4", "was replaced"),  # a line that was removed on purpose
        (lambda path: path.write_text('{"step": 1}'), "1 4", "was cut by another program: its last lines are lost"),
        (lambda path: path.write_text("# mine\n" * 9), "mine " * 9 + "4", ""),  # only longer: nothing to report
    ],
)
def test_lines_survive_an_editor(tmp_path: Path, capsys: Any, deed: Any, expected: str, warning: str):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(RunDir(tmp_path), 0, is_evaluated=True)
    for step in (1, 2, 3):
        writer.log({"step": step})
    deed(path)
    writer.log({"step": 4})
    writer.sync()
    writer.close()
    assert [line.rstrip("}").rpartition(" ")[2] for line in path.read_text().splitlines()] == expected.split()
    output = capsys.readouterr().out
    assert warning in output
    assert bool(warning) == bool(output)


def test_a_pipe_is_refused_at_once(tmp_path: Path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    assert read_stop_reason(tmp_path) is None
    with pytest.raises(InputError, match=r"metrics.jsonl cannot be written .is not a regular file"):
        MetricsWriter(RunDir(tmp_path), 0, is_evaluated=True)


def test_the_reason_of_a_stop_is_in_the_last_line_that_is_not_blank(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2, "stopped": "why"}\n \n')
    assert read_stop_reason(tmp_path) == "why"


def test_a_tracker_that_fails_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    logged = []

    def fail(scalars: dict[str, float], step: int) -> None:
        logged.append(step)
        raise OSError("No space left on device")

    with RunDir(tmp_path / "out") as run_dir:
        writer = MetricsWriter(run_dir, 0, is_evaluated=False)
        writer._trackers["tensorboard"] = Tracker(fail, lambda: None)
        for step in (1, 2):
            writer.log({"step": step, "loss": 1.0})
        writer.close()
    assert logged == [1]
    assert capsys.readouterr().out.count("tensorboard failed (No space left on device)") == 1
    assert len((tmp_path / "out/metrics.jsonl").read_text().splitlines()) == 2


def test_lines_that_are_never_written_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    writer = MetricsWriter(RunDir(tmp_path), 0, is_evaluated=True)
    writer.log({"step": 1})
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    for step in (2, 3):
        writer.log({"step": step})
    writer.close()
    assert capsys.readouterr().out.splitlines()[-1].endswith("metrics.jsonl lacks its last 2 lines")
