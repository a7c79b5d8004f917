"""Checkpoints on disk: whole or not there, which are kept, and what is refused."""

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, Run, assert_same_checkpoint, metrics, steps

from model import GPT
from nanogpt import InputError, RunStopped, checkpoint
from nanogpt.tokenizer import Tokenizer


def save(out_dir: Path, step: int, val_loss: float | None = None, size: int = 3) -> Path:
    weights = {"layer.weight": torch.arange(float(size)) + step}
    state = {"step": step, "val_loss": val_loss}
    return checkpoint.save(out_dir, weights, {"layer.weight/step": torch.tensor(float(step))}, state, None)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_what_is_saved_is_loaded(tmp_path: Path):
    tokenizer = Tokenizer.characters("ab")
    matrix = torch.randn(3, 4).t()  # not contiguous
    state = {"step": 5, "val_loss": None, "name": "é"}
    path = checkpoint.save(tmp_path, {"w": matrix}, {"w/exp_avg": matrix * 2}, state, tokenizer)
    assert path == tmp_path / "ckpt" / "step-000005"
    assert sorted(file.name for file in path.iterdir()) == [
        *("MANIFEST.json", "model.safetensors", "optimizer.safetensors", "state.json", "tokenizer.json")
    ]
    found = checkpoint.load(path)
    assert torch.equal(found.model["w"], matrix)
    assert torch.equal(found.optimizer["w/exp_avg"], matrix * 2)
    assert found.state == state
    assert checkpoint.load(path, with_optimizer=False).optimizer == {}
    loaded = Tokenizer.load(path)
    assert loaded is not None
    assert loaded.encode("ba") == [1, 0]
    assert [p.name for p in (tmp_path / "ckpt").iterdir()] == ["step-000005"]  # nothing half made is left


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "SHA-256 of model.safetensors": lambda path: flip_a_bit(path / "model.safetensors"),
    "SHA-256 of optimizer.safetensors": lambda path: (path / "optimizer.safetensors").write_bytes(b""),
    "SHA-256 of state.json": lambda path: shutil.copy(path.parent / "step-000001" / "state.json", path),
    "optimizer.safetensors No such file": lambda path: (path / "optimizer.safetensors").unlink(),
    "MANIFEST.json is missing or unreadable": lambda path: (path / "MANIFEST.json").unlink(),
    "its MANIFEST.json is": lambda path: (path / "MANIFEST.json").write_text('{"sha256": {"state.json": ""}}'),
    "is missing or": lambda path: (path / "MANIFEST.json").write_text('{"sha256": {"state.js'),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damage_is_refused(tmp_path: Path, message: str, capsys: pytest.CaptureFixture[str]):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    DAMAGES[message](path)
    with pytest.raises(InputError) as caught:
        checkpoint.load(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "use another checkpoint" in str(caught.value)
    found = checkpoint.to_resume(tmp_path, True)
    assert found is not None
    assert found.path.name == "step-000001"
    assert "step-000002 is damaged" in capsys.readouterr().out
    flip_a_bit(tmp_path / "ckpt/step-000001/state.json")
    with pytest.raises(InputError, match=r"no checkpoint of .* is whole"):
        checkpoint.to_resume(tmp_path, "auto")


def test_a_name_in_the_manifest_leads_nowhere_else(tmp_path: Path):
    path = save(tmp_path, 1)
    manifest = json.loads((path / "MANIFEST.json").read_text())
    (tmp_path / "secret").write_bytes(b"")
    manifest["sha256"]["../../secret"] = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    (path / "MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="secret No such file"):
        checkpoint.load(path)


def test_newest_two_best_and_every_nth_are_kept(tmp_path: Path):
    losses = {10: 3.0, 20: 2.0, 30: 2.5, 40: None, 50: 2.2, 60: None, 70: 2.4}
    kept = []
    for step, loss in losses.items():
        save(tmp_path, step, loss)
        (tmp_path / "ckpt" / f".step-{step + 1:06d}.partial").mkdir()  # as a kill leaves it
        checkpoint.prune(tmp_path, keep_every=30)
        kept.append(steps(tmp_path))
        assert len([*(tmp_path / "ckpt").iterdir()]) == len(kept[-1])
    assert kept == [[10], [10, 20], [20, 30], [20, 30, 40], [20, 30, 40, 50], [20, 30, 50, 60], [20, 30, 60, 70]]
    assert checkpoint.find(tmp_path).name == "step-000020"
    assert checkpoint.find(tmp_path, "latest").name == "step-000070"
    assert checkpoint.find(tmp_path, "step-000030").name == "step-000030"
    assert checkpoint.find(tmp_path / "ckpt/step-000060").name == "step-000060"
    with pytest.raises(InputError, match=r"it has step-000070, step-000060, step-000030, step-000020"):
        checkpoint.find(tmp_path, "step-000010")
    with pytest.raises(InputError, match=r"holds no checkpoint"):
        checkpoint.find(tmp_path / "elsewhere")


def test_steps_beyond_six_digits_are_newer(tmp_path: Path):
    for step in (999_999, 1_000_000):
        save(tmp_path, step)
    (tmp_path / "ckpt" / "step-1000001-copy").mkdir()
    assert steps(tmp_path) == [999_999, 1_000_000]
    assert checkpoint.find(tmp_path).name == "step-1000000"  # none was evaluated: the newest


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file can grow beyond 100 kB, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [20_000, 10_000_000])  # for the limit too small and too large
@pytest.mark.usefixtures("small_files")
def test_a_full_disk_loses_nothing(tmp_path: Path, size: int):
    save(tmp_path, 1)
    if size < 25_000:
        save(tmp_path, 2, size=size)
        assert steps(tmp_path) == [1, 2]
        return
    with pytest.raises(RunStopped, match=r"step-000002 could not be written .*earlier ones are untouched: make room"):
        save(tmp_path, 2, size=size)
    assert [path.name for path in (tmp_path / "ckpt").iterdir()] == ["step-000001"]
    assert checkpoint.load(tmp_path / "ckpt/step-000001").state["step"] == 1


def test_the_same_step_again_replaces_the_old(tmp_path: Path):
    save(tmp_path, 1, 3.0)
    (tmp_path / "ckpt/.step-000001.partial").mkdir()  # left by a kill
    save(tmp_path, 1, 2.0)
    assert checkpoint.load(tmp_path / "ckpt/step-000001").state["val_loss"] == 2
    assert [path.name for path in (tmp_path / "ckpt").iterdir()] == ["step-000001"]


# ---- in runs of train.py


def test_a_used_out_dir_moves_away(run: Run, capsys: pytest.CaptureFixture[str]):
    for seed in (1, 2, 3):
        run(out_dir="out", seed=seed, max_iters=2)
    told = capsys.readouterr().out
    assert "out held a run already: moved to out.1" in told
    assert "moved to out.2" in told
    seeds = [
        checkpoint.load(Path(name, "ckpt/step-000002")).state["config"]["seed"] for name in ("out.1", "out.2", "out")
    ]
    assert seeds == [1, 2, 3]
    assert len(metrics("out", "loss")) == len(metrics("out.1", "loss")) == 2
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("kept")
    run(out_dir="mine", max_iters=1)  # a folder without a run is not moved
    assert Path("mine/notes.txt").exists()
    assert not Path("mine.1").exists()


@pytest.mark.parametrize("name", ["run/", "deep/er/run", "../run.gpt"])
def test_any_spelling_of_out_dir(run: Run, name: str):
    run(out_dir=name, max_iters=1)
    run(out_dir=name, max_iters=2)
    assert steps(name) == [2]
    assert steps(name.rstrip("/") + ".1") == [1]


def test_the_folder_one_stands_in_cannot_move_away(run: Run):
    run(out_dir=".", max_iters=1)
    with pytest.raises(InputError, match=r"out_dir=\. holds a run that cannot move aside"):
        run(out_dir=".", max_iters=1)
    assert steps(".") == [1]
    assert run(out_dir=".", max_iters=2, resume=True) == 0


def test_only_the_best_are_saved_on_request(run: Run, monkeypatch: pytest.MonkeyPatch):
    import train

    losses = iter([5.0, 4.0, 4.5, 3.0, 3.5, 3.6])
    monkeypatch.setattr(train, "evaluate", lambda *_: next(losses))  # train and val in turn
    saved, original = [], checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda out, *args: (saved.append(args[2]["step"]), original(out, *args))[1])
    run(out_dir="out", eval_interval=8, max_iters=16, always_save_checkpoint=False)
    assert saved == [8, 16]  # at 0 nothing is learnt; at 8 the best; at 16, no better, because it is the end
    losses = iter([5.0, 4.0, 4.5, 3.0, 3.5, 3.6, 3.5, 3.7])
    saved.clear()
    run(out_dir="out", eval_interval=8, max_iters=20, always_save_checkpoint=False)
    assert saved == [8, 20]
    assert checkpoint.find(Path("out")).name == "step-000008"
    losses = iter([5.0, 4.0, 4.5, 3.0, 3.5, 3.6, 3.5, 3.7])
    saved.clear()
    run(out_dir="out", eval_interval=8, max_iters=20)
    assert saved == [8, 16, 20]


def test_saves_in_between(run: Run, monkeypatch: pytest.MonkeyPatch):
    saved, original = [], checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda out, *args: (saved.append(args[2]["step"]), original(out, *args))[1])
    run(out_dir="often", checkpoint_minutes=1e-7, eval_interval=100, max_iters=6, lr_decay_iters=20)
    assert saved == [2, 4, 6]  # due at each step, seen a step late, when the next is done
    saved.clear()
    run(out_dir="whole", eval_interval=100, max_iters=6, lr_decay_iters=20)
    assert saved == [6]
    assert_same_checkpoint("often", "whole", 6)  # and saving changes nothing


def test_names_and_rows_of_weights(run: Run):
    """A checkpoint loads into a GPT as it is; a compiled or wrapped one could not have these names."""
    run(out_dir="out")
    found = checkpoint.load(Path("out/ckpt/step-000020"))
    model = GPT.from_checkpoint("out")
    assert found.model.keys() == dict(model.named_parameters()).keys()
    assert {name.rpartition("/")[0] for name in found.optimizer} == found.model.keys()
    assert all(found.state["config"][name] == value for name, value in TINY.items())
    assert found.state["model"]["vocab_size"] == 4
    tokenizer = Tokenizer.load(found.path)
    assert tokenizer is not None
    assert tokenizer.decode([3, 0]) == "da"
