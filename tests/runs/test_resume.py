"""Stop and resume: to the bit, whatever stopped the run; settings and sizes after a resume."""

import hashlib
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MIXTURE, NO_SIZES, Run, SignalAt, assert_same_checkpoint, call_main, flags, metrics, steps

import train
from configurator import ExplicitKeys
from nanogpt import checkpoint
from nanogpt.data.rows import EvalWindows, Rows
from nanogpt.errors import InputError

KEYS: dict[str, Any] = {"dropout": 0.2, "gradient_accumulation_steps": 2, "n_layer": 2, "batch_growth_tokens": 800}
MODERN = {"arch": "modern", "bias": False, "n_kv_head": 1, "tied": False, "optimizer": "muon", "schedule": "trapezoid"}
MODERN |= {"look_back": True, "ngram_targets": 3}
LOGS = {"log_interval": 3, "log_layers": True, "skip_spikes": 6.0}


@pytest.mark.parametrize(
    ("recipe", "dtype", "stop_after"),
    [
        (LOGS, "bfloat16", 12),
        ({"row_order": "epoch"}, "float16", 15),
        (MODERN | LOGS, "float16", 12),
        (MIXTURE | MODERN, "float32", 9),
    ],
)
def test_resume_is_exact_to_the_bit(
    run: Run, signal_at: SignalAt, one_and_two: Path, recipe: dict[str, Any], dtype: str, stop_after: int
):
    for name in ("one", "two"):
        Path(name).symlink_to(one_and_two / name)
    keys = KEYS | recipe | {"dtype": dtype}
    assert run(out_dir="whole", **keys) == 0
    signal_at(stop_after, signal.SIGTERM)
    assert run(out_dir="parts", **keys) == 143
    assert stop_after < steps("parts")[-1] <= stop_after + 2  # read a step late
    assert run(out_dir="parts", resume=True, **keys) == 0
    assert metrics("parts") == metrics("whole")
    assert len(metrics("whole", "val_loss")) == 4  # at 0, 8, 16 and the end
    assert_same_checkpoint("whole", "parts", 20)


@pytest.fixture(scope="module")
def whole(letters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The out_dir of an undisturbed run with KEYS."""
    out_dir = tmp_path_factory.mktemp("whole") / "out"
    assert call_main(train.main, *flags(dataset=letters, out_dir=out_dir, **KEYS)) == 0
    return out_dir


@pytest.mark.parametrize(("nth", "saved"), [(1, [0]), (5, [8, 16]), (7, [16, 20])])  # of two passes each
def test_a_signal_stops_an_evaluation_which_the_resumed_run_makes(
    run: Run, whole: Path, monkeypatch: pytest.MonkeyPatch, nth: int, saved: list[int]
):
    passes = 0
    original = EvalWindows.__getitem__

    def getitem(windows: EvalWindows, span: slice) -> Any:
        nonlocal passes
        passes += 1
        if passes == nth:
            signal.raise_signal(signal.SIGTERM)
        return original(windows, span)

    monkeypatch.setattr(EvalWindows, "__getitem__", getitem)
    assert run(out_dir="parts", **KEYS) == 143
    assert passes == nth
    assert steps("parts") == saved
    assert run(out_dir="parts", resume=True, **KEYS) == 0
    assert metrics("parts") == metrics(whole)
    assert_same_checkpoint(whole, "parts", 20)


def test_a_killed_run_repeats_what_it_had_not_saved(run: Run, whole: Path, capsys: pytest.CaptureFixture[str]):
    shutil.copytree(whole, "killed")
    shutil.rmtree("killed/ckpt/step-000020")
    with Path("killed/metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "loss"')
    capsys.readouterr()
    assert run(out_dir="killed", resume="auto", **KEYS) == 0
    assert "resuming killed/ckpt/step-000016" in capsys.readouterr().out
    assert metrics("killed") == metrics(whole)
    assert_same_checkpoint(whole, "killed", 20)


def test_resume_with_another_batch_size_continues_with_the_next_row(
    run: Run, signal_at: SignalAt, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    rows_read: list[tuple[int, int]] = []
    original = Rows.__getitem__

    def getitem(rows: Rows, span: slice) -> Any:
        rows_read.append((span.start, span.stop))
        return original(rows, span)

    run(out_dir="whole", batch_size=8)
    monkeypatch.setattr(Rows, "__getitem__", getitem)
    signal_at(9, signal.SIGTERM)
    run(out_dir="parts", batch_size=8)
    capsys.readouterr()
    run(out_dir="parts", batch_size=2, gradient_accumulation_steps=4, eval_iters=8, resume=True)
    output = capsys.readouterr().out
    assert "batch_size: 8 -> 2" in output
    assert "learning_rate" not in output  # given again, but unchanged
    assert {last - first for first, last in rows_read} == {8, 2}
    assert [first for first, _ in rows_read] == [0, *(last for _, last in rows_read[:-1])]
    assert rows_read[-1][1] == 20 * 8
    assert metrics("parts", "step", "tokens", "lr") == metrics("whole", "step", "tokens", "lr")
    for field in ("loss", "val_loss"):
        values = [value for (value,) in metrics("parts", field)]
        assert values == pytest.approx([value for (value,) in metrics("whole", field)], rel=1e-5)


def test_resume_takes_more_steps_and_another_rate(run: Run):
    run(out_dir="out")
    assert run(out_dir="out", resume=True) == 0  # done already: nothing changes
    assert steps("out") == [16, 20]
    assert run(init_from="resume", out_dir="out", max_iters=24, learning_rate=1e-3, decay_lr=False) == 0
    assert [line for line in metrics("out", "step", "lr") if line[0] > 20] == [(step, 1e-3) for step in range(21, 25)]
    before, after = (checkpoint.load(Path(f"out/ckpt/step-{step:06d}")).state for step in (20, 24))
    assert (after["config"]["max_iters"], after["config"]["n_embd"]) == (24, 16)
    assert after["time_s"] > before["time_s"]


def test_gelu_comes_from_a_checkpoint_that_is_older_than_its_key(run: Run):
    run(out_dir="out", max_iters=1, gelu="erf")
    resumed = checkpoint.load(Path("out/ckpt/step-000001"))
    resumed.state["config"]["gelu"] = "tanh"  # the default, which train.main fills in
    config = train.TrainConfig(out_dir="out")
    assert train.resume_config(config, ExplicitKeys({}, flags=set()), resumed).gelu == "erf"
    with pytest.raises(InputError, match="gelu=tanh"):
        train.resume_config(config, ExplicitKeys({"gelu": "tanh"}, flags={"gelu"}), resumed)


def test_sizes_come_from_the_checkpoint(run: Run, capsys: pytest.CaptureFixture[str]):
    """A config file that names others is overruled with a printed line; a flag that contradicts is an error."""
    run(out_dir="out", n_layer=2, max_iters=1, gelu="erf")
    sizes = NO_SIZES | {"block_size": ...}
    Path("wider.py").write_text("n_embd = 32\nn_layer = 2\nn_head = 2\nn_inner = 0\nlook_back = True\ngelu = 'tanh'\n")
    capsys.readouterr()
    assert run("wider.py", out_dir="out", resume=True, max_iters=3, **sizes) == 0
    output = capsys.readouterr().out
    assert "n_embd: 32 in a config file is ignored; the run has 16" in output
    assert "look_back: True in a config file is ignored; the run has False" in output
    assert "gelu: tanh in a config file is ignored; the run has erf" in output
    assert "n_layer" not in output
    assert "n_inner" not in output  # 0 leaves it open
    saved = checkpoint.load(Path("out/ckpt/step-000003"))
    assert (saved.state["model"]["n_layer"], saved.state["model"]["n_embd"]) == (2, 16)
    assert saved.state["config"]["n_embd"] == 16
    with pytest.raises(InputError, match=r"^n_embd=32: the run in out has n_embd=16"):
        run("wider.py", out_dir="out", resume=True, max_iters=4, **sizes | {"n_embd": 32})
    assert steps("out") == [1, 3]


def prepare_anew(folder: Path, split: str, has_meta: bool) -> None:
    """Other tokens, as many as before."""
    ids = np.fromfile(folder / f"{split}.bin", "<u2")
    np.roll(ids, 1).tofile(folder / f"{split}.bin")
    if has_meta:
        meta = json.loads((folder / "meta.json").read_text())
        meta["splits"][split]["sha256"] = hashlib.sha256((folder / f"{split}.bin").read_bytes()).hexdigest()
        (folder / "meta.json").write_text(json.dumps(meta))


@pytest.mark.parametrize(("split", "has_meta"), [("train", True), ("val", False)])
def test_data_that_changed_is_refused_unless_it_is_accepted(
    run: Run, letters: Path, capsys: pytest.CaptureFixture[str], split: str, has_meta: bool
):
    shutil.copytree(letters, "data")
    if not has_meta:
        Path("data/meta.json").unlink()
    run(dataset="data", out_dir="out", max_iters=8)
    shutil.copytree("data", "moved")
    assert run(dataset="moved", out_dir="out", max_iters=9, resume=True) == 0  # the same data elsewhere
    prepare_anew(Path("moved"), split, has_meta)
    keys = {"dataset": "moved", "out_dir": "out", "max_iters": 16}
    for resume in (True, "auto"):
        with pytest.raises(InputError, match=f"dataset=moved: the {split} tokens are not .* give --new_data=True"):
            run(resume=resume, **keys)
    assert run(resume=True, eval_only=True, **keys) == 0
    capsys.readouterr()
    best = checkpoint.load(Path("out/ckpt/step-000009")).state["best_val_loss"]
    assert run(resume=True, new_data=True, **keys) == 0
    assert ("earlier losses are no longer compared" in capsys.readouterr().out) == (split == "val")
    state = checkpoint.load(Path("out/ckpt/step-000016")).state
    own = min(loss for step, loss in metrics("out", "step", "val_loss") if step > 9)
    assert state["best_val_loss"] == (own if split == "val" else min(best, own))
    assert run(resume=True, **keys | {"max_iters": 17}) == 0  # accepted once is enough


def test_steps_beyond_the_integers_of_float32(run: Run):
    run(out_dir="out", max_iters=2)
    step = 2**24 + 1
    path = Path("out/ckpt/step-000002").rename(f"out/ckpt/step-{step}")
    state = json.dumps(json.loads((path / "state.json").read_text()) | {"step": step})
    (path / "state.json").write_text(state)
    manifest = json.loads((path / "MANIFEST.json").read_text())
    manifest["sha256"]["state.json"] = hashlib.sha256(state.encode()).hexdigest()
    (path / "MANIFEST.json").write_text(json.dumps(manifest, indent=1))
    assert run(out_dir="out", resume=True, max_iters=step + 1) == 0
    assert steps("out") == [step, step + 1]
