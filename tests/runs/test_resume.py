"""Stopping and going on: to the bit, whatever stopped the run."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ALL_OF_IT as DATA
from conftest import Run, assert_same_checkpoint, metrics, steps

from nanogpt import checkpoint
from nanogpt.data.rows import Rows

SignalAt = Callable[[int, int], None]
ALL_OF_IT = {"dropout": 0.2, "gradient_accumulation_steps": 2, "n_layer": 2, "batch_growth_tokens": 800}
GPT2: dict[str, Any] = {}
MODERN = {"arch": "modern", "bias": False, "n_kv_head": 1, "tied": False, "optimizer": "muon", "schedule": "trapezoid"}


@pytest.fixture
def rows_read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Which rows are read, as pairs (first, last), filled while a run goes on."""
    read, original = [], Rows.__getitem__

    def spy(self: Rows, rows: slice) -> Any:
        read.append((rows.start, rows.stop))
        return original(self, rows)

    monkeypatch.setattr(Rows, "__getitem__", spy)
    return read


@pytest.mark.parametrize(
    ("recipe", "dtype", "row_order", "stop_after"),
    [
        *((GPT2, "float32", "random", 6), (GPT2, "bfloat16", "epoch", 12), (GPT2, "float16", "random", 15)),
        *((MODERN, "float32", "epoch", 15), (MODERN, "bfloat16", "random", 6), (MODERN, "float16", "random", 12)),
    ],
)
def test_resume_to_the_bit(
    run: Run, signal_at: SignalAt, recipe: dict[str, Any], dtype: str, row_order: str, stop_after: int
):
    keys = ALL_OF_IT | recipe | {"dtype": dtype, "row_order": row_order}
    assert run(out_dir="whole", **keys) == 0
    signal_at(stop_after, signal.SIGTERM)
    assert run(out_dir="parts", **keys) == 143
    stopped_at = steps("parts")[-1]
    assert stop_after < stopped_at <= stop_after + 2  # read a step late
    assert run(out_dir="parts", resume=True, **keys) == 0
    assert metrics("parts") == metrics("whole")
    assert len(metrics("whole", "val_loss")) == 4  # at 0, 8, 16 and the end
    assert_same_checkpoint("whole", "parts", 20)


@pytest.mark.parametrize("recipe", [GPT2, MODERN])
def test_resume_to_the_bit_with_mixed_masked_shards(
    run: Run, signal_at: SignalAt, one_and_two: Path, recipe: dict[str, Any]
):
    for name in ("one", "two"):
        Path(name).symlink_to(one_and_two / name)
    test_resume_to_the_bit(run, signal_at, recipe | DATA, "float32", "epoch", 9)


def test_a_killed_run_repeats_what_it_had_not_saved(run: Run, capsys: pytest.CaptureFixture[str]):
    run(out_dir="whole", **ALL_OF_IT)
    shutil.copytree("whole", "killed")
    shutil.rmtree("killed/ckpt/step-000020")  # as if the kill came before the last save …
    with Path("killed/metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "loss"')  # … in the middle of a line
    capsys.readouterr()
    assert run(out_dir="killed", resume="auto", **ALL_OF_IT) == 0
    assert "resuming killed/ckpt/step-000016" in capsys.readouterr().out
    assert metrics("killed") == metrics("whole")
    assert_same_checkpoint("whole", "killed", 20)


def test_another_split_of_the_batch_goes_on_with_the_same_rows(
    run: Run, signal_at: SignalAt, rows_read: list[tuple[int, int]], capsys: pytest.CaptureFixture[str]
):
    run(out_dir="whole", batch_size=8)
    rows_read.clear()
    signal_at(9, signal.SIGTERM)
    run(out_dir="parts", batch_size=8)
    capsys.readouterr()
    run(out_dir="parts", batch_size=2, gradient_accumulation_steps=4, eval_iters=8, resume=True)
    told = capsys.readouterr().out
    assert "batch_size: 8 -> 2" in told
    assert "gradient_accumulation_steps: 1 -> 4" in told
    assert "learning_rate" not in told  # given again, but as it was
    assert {last - first for first, last in rows_read} == {8, 2}
    assert [first for first, _ in rows_read] == [0, *(last for _, last in rows_read[:-1])]
    assert rows_read[-1][1] == 20 * 8
    whole, parts = metrics("whole", "step", "tokens", "loss"), metrics("parts", "step", "tokens", "loss")
    assert [line[:2] for line in parts] == [line[:2] for line in whole] == [(k, k * 8 * 16) for k in range(1, 21)]
    assert [line[2] for line in parts] == pytest.approx([line[2] for line in whole], rel=1e-5)
    assert [loss for (loss,) in metrics("parts", "val_loss")] == pytest.approx(
        [loss for (loss,) in metrics("whole", "val_loss")], rel=1e-5
    )


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(run: Run, capsys: pytest.CaptureFixture[str]):
    run(out_dir="whole")
    shutil.copytree("whole", "hurt")
    weights = Path("hurt/ckpt/step-000020/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    capsys.readouterr()
    assert run(out_dir="hurt", resume=True) == 0
    told = capsys.readouterr().out
    assert "warning: hurt/ckpt/step-000020 is damaged: the SHA-256 of model.safetensors" in told
    assert "resuming hurt/ckpt/step-000016" in told
    assert metrics("hurt") == metrics("whole")
    assert_same_checkpoint("whole", "hurt", 20)


def test_more_steps_and_another_rate(run: Run):
    run(out_dir="out")
    assert run(out_dir="out", resume=True) == 0  # done already: nothing to do, nothing changed
    assert steps("out") == [16, 20]
    assert run(init_from="resume", out_dir="out", max_iters=24, learning_rate=1e-3, decay_lr=False) == 0
    assert [line for line in metrics("out", "step", "lr") if line[0] > 20] == [(k, 1e-3) for k in range(21, 25)]
    assert steps("out")[-1] == 24
    state = json.loads(Path("out/ckpt/step-000024/state.json").read_text())
    assert (state["config"]["max_iters"], state["config"]["n_embd"]) == (24, 16)
    assert state["time_s"] > json.loads(Path("out/ckpt/step-000020/state.json").read_text())["time_s"]


def test_the_shape_of_a_run_is_its_own(run: Run):
    run(out_dir="out", n_layer=2, max_iters=1)
    given = dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size", "bias", "dropout"), ...)
    assert run(out_dir="out", resume=True, max_iters=3, **given) == 0
    found = checkpoint.load(Path("out/ckpt/step-000003"))
    assert found.state["model"]["n_layer"] == 2
    assert "blocks.1.mlp.up.weight" in found.model
