"""Trials of the machine's speed: the choice by timings that the tests set, and the outcomes that are kept."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, assert_same_checkpoint

import budget
from nanogpt import checkpoint, trials
from nanogpt.distributed import World
from nanogpt.files import read_json
from train import TrainConfig, train_step

CPU = torch.device("cpu")
BFLOAT16_SPEEDUP = trials.bfloat16_speedup  # which conftest.py replaces


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The shapes that were measured; the n-th outcome is n + 0.5. The home directory is tmp_path."""
    shapes: list[Any] = []

    def measure(shape: Any) -> float:
        shapes.append(tuple(shape))
        return len(shapes) + 0.5

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(trials, "bfloat16_speedup", BFLOAT16_SPEEDUP)
    monkeypatch.setattr(trials, "measure_bfloat16_speedup", measure)
    return shapes


def test_outcome_is_kept_for_a_machine_and_a_rounded_shape(measured: list[Any], monkeypatch: pytest.MonkeyPatch):
    assert trials.bfloat16_speedup(1536, 96, 192) == 1.5
    assert trials.bfloat16_speedup(1500, 98, 200) == 1.5
    assert trials.bfloat16_speedup(1024, 768, 3072) == 2.5
    assert measured == [(1536, 96, 192), (512, 768, 3072)]
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert trials.bfloat16_speedup(1536, 96, 192) == 3.5
    monkeypatch.setattr(trials, "cpu_info", lambda: {"model name": "EPYC", "flags": "avx2"})
    assert trials.bfloat16_speedup(1536, 96, 192) == 4.5
    monkeypatch.setattr(trials, "cpu_info", lambda: {"model name": "EPYC", "flags": "avx2 amx_bf16"})
    assert trials.bfloat16_speedup(1536, 96, 192) == 5.5


@pytest.mark.parametrize(
    ("text", "replacement"),
    [("}", ""), ("1.5", "NaN"), ("1.5", "-1.5"), ("1.5", "0.0"), ("1.5", '"1.5"'), ("96", "97"), ("outcome", "income")],
)
@pytest.mark.usefixtures("measured")
def test_damaged_outcome_is_measured_anew(tmp_path: Path, text: str, replacement: str):
    trials.bfloat16_speedup(1536, 96, 192)
    (file,) = (tmp_path / ".cache/nanogpt/trials").iterdir()
    assert text in file.read_text()
    file.write_text(file.read_text().replace(text, replacement))
    assert trials.bfloat16_speedup(1536, 96, 192) == 2.5
    assert trials.bfloat16_speedup(1536, 96, 192) == 2.5
    assert read_json(file)["outcome"] == 2.5


def test_home_that_cannot_be_written_does_not_matter(measured: list[Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/dev/null")
    assert trials.bfloat16_speedup(8, 8, 8) == 1.5
    assert trials.bfloat16_speedup(8, 8, 8) == 2.5


@pytest.mark.parametrize(("small", "whole", "expected"), [(0.02, 9.0, 0.02), (0.9, 2.0, 2.0), (3.0, 0.5, 0.5)])
def test_emulated_bfloat16_is_tried_on_a_small_product_alone(
    monkeypatch: pytest.MonkeyPatch, small: float, whole: float, expected: float
):
    """`small` and `whole`: the speeds that products of these sizes have in bfloat16."""

    def linear_layer(dtype: torch.dtype, shape: Any) -> Any:
        speed = whole if max(shape) > 256 else small
        return lambda: 0.1 if dtype == torch.float32 else 0.1 / speed

    monkeypatch.setattr(trials, "TRIAL_S", 0.0)
    monkeypatch.setattr(trials, "linear_layer", linear_layer)
    monkeypatch.setattr(trials, "time_call", lambda layer: layer())
    assert trials.measure_bfloat16_speedup([512, 768, 3072]) == pytest.approx(expected)


def test_trial_multiplies_in_both_dtypes_and_leaves_no_trace(monkeypatch: pytest.MonkeyPatch):
    dtypes = set()
    linear = torch.nn.functional.linear

    def record(*args: Any) -> torch.Tensor:
        y = linear(*args)
        dtypes.add((y.dtype, torch.get_num_threads()))
        return y

    monkeypatch.setattr(trials, "TRIAL_S", 0.0)
    monkeypatch.setattr(trials.F, "linear", record)
    torch.set_num_threads(2)
    before = torch.get_rng_state()
    assert trials.measure_bfloat16_speedup([8, 16, 24]) > 0
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert dtypes == {(torch.float32, 1), (torch.bfloat16, 1)}


def test_try_dtypes_takes_the_faster_one_on_all_ranks(monkeypatch: pytest.MonkeyPatch):
    class SecondOfTwo(World):
        def all_reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
            return values + main

    for main, dtype in ((3.0, torch.bfloat16), (1.1, torch.float32), (0.02, torch.float32)):
        monkeypatch.setattr(trials, "bfloat16_speedup", lambda *_, main=main: main)
        assert trials.try_dtypes(World(0, 1, CPU, torch.float32), "auto", 8, 8, 8).dtype == dtype
        assert trials.try_dtypes(World(0, 1, CPU, torch.float32), "float16", 8, 8, 8).dtype == torch.float16
        monkeypatch.setattr(trials, "bfloat16_speedup", lambda *_: 1 / 0)  # the main rank's alone counts
        second = trials.try_dtypes(SecondOfTwo(1, 2, CPU, torch.float32), "auto", 8, 8, 8)
        assert (second.dtype, second.bfloat16_speedup) == (dtype, main)


def test_time_budget_keeps_one_dtype(letters: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trials, "bfloat16_speedup", lambda *shape: float(shape == (2048, 128, 384)) + 1)
    config = TrainConfig(dataset=str(letters), minutes=1.0, block_size=16, device="cpu")
    trial = budget.SpeedTrial(config, World(0, 1, CPU, torch.float32), train_step)
    assert trial.config.dtype == "bfloat16"
    assert trial.world.dtype == trial.single.dtype == torch.bfloat16


def test_resumed_run_keeps_its_dtype(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Whatever a trial would say by now; a flag given again wins."""
    monkeypatch.setattr(trials, "bfloat16_speedup", lambda *_: 2.0)
    assert run(out_dir="whole", dtype="auto") == 0
    assert run(out_dir="parts", dtype="auto", max_iters=8) == 0
    assert "bfloat16 (bfloat16: 2 × float32 here)" in capsys.readouterr().out
    monkeypatch.setattr(trials, "bfloat16_speedup", lambda *_: 0.5)
    assert run(out_dir="parts", dtype=..., resume=True) == 0
    assert_same_checkpoint("whole", "parts", 20)

    def resume(**keys: Any) -> str:
        assert run(out_dir="parts", resume=True, **keys) == 0
        return read_json(checkpoint.find(Path("parts"), "latest") / "state.json")["config"]["dtype"]

    assert resume(dtype=..., max_iters=21) == "bfloat16"
    assert resume(dtype="auto", max_iters=22) == "float32"  # as a checkpoint from before the trial has it
