"""Checkpoints on disk: whole or not there, which are kept, and what is refused."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, Run, assert_same_checkpoint, environment, flags, metrics, steps

import train
from model import GPT
from nanogpt import checkpoint
from nanogpt.errors import InputError, RunStopped
from nanogpt.metrics import MetricsWriter
from nanogpt.run_dir import RunLock, archive_previous_run
from nanogpt.text.tokenizer import Tokenizer


def facts(step: int, val_loss: float | None = None) -> dict[str, Any]:
    losses = {"val_loss": val_loss, "best_val_loss": val_loss}
    counts = {"step": step, "samples": 4 * step, "time_s": 0.5, "processes": 1, "wandb_id": None}
    return {**counts, **losses, "scaler": {}, "guard": {}, "model": {}, "config": {}}


def save(out_dir: Path, step: int, val_loss: float | None = None, size: int = 3) -> Path:
    weights = {"layer.weight": torch.arange(float(size)) + step}
    optimizer = {"layer.weight/step": torch.tensor(float(step))}
    return checkpoint.save(out_dir, weights, optimizer, facts(step, val_loss), None)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_what_is_saved_is_loaded(tmp_path: Path):
    tokenizer = Tokenizer.characters("ab")
    matrix = torch.randn(3, 4).t()  # not contiguous
    state = facts(5) | {"name": "é"}
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
    found = checkpoint.load_latest(tmp_path, True)
    assert found is not None
    assert found.path.name == "step-000001"
    assert "step-000002 is damaged" in capsys.readouterr().out
    flip_a_bit(tmp_path / "ckpt/step-000001/state.json")
    with pytest.raises(InputError, match=r"no checkpoint of .* is whole"):
        checkpoint.load_latest(tmp_path, "auto")


def test_a_name_in_the_manifest_leads_nowhere_else(tmp_path: Path):
    path = save(tmp_path, 1)
    manifest = json.loads((path / "MANIFEST.json").read_text())
    (tmp_path / "secret").write_bytes(b"")
    manifest["sha256"]["../../secret"] = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    (path / "MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"its MANIFEST\.json is"):
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


@pytest.mark.parametrize("step", [1, 2])  # the only one, and the newest
def test_a_kill_between_two_names_is_mended(tmp_path: Path, step: int):
    """A step that is saved again is for a moment under neither of its names."""
    for number in range(1, step + 1):
        save(tmp_path, number)
    final = tmp_path / f"ckpt/step-{step:06d}"
    final.rename(final.with_name(f".{final.name}.old.partial"))
    found = checkpoint.load_latest(tmp_path, "auto")
    assert found
    assert found.path == final


# ---- the writer


def write(writer: checkpoint.Writer, step: int, size: int = 3) -> None:
    writer.save({f"w{size}": torch.full((size,), float(step))}, {"w/step": torch.tensor(1.0)}, facts(step))


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    go, begun, original = threading.Event(), threading.Semaphore(0), checkpoint.save

    def slow(*args: Any) -> Path:
        begun.release()
        assert go.wait(10)
        return original(*args)

    monkeypatch.setattr(checkpoint, "save", slow)
    weights = torch.zeros(3)
    with checkpoint.Writer(tmp_path, 0, 0.0, None) as writer:
        writer.save({"w": weights}, {"w/step": weights}, facts(1))
        assert begun.acquire(timeout=10)
        weights += 1  # the next update, before anything is on the disk
        assert steps(tmp_path) == []
        threading.Timer(0.1, go.set).start()
        write(writer, 2)  # waits for the first
        assert steps(tmp_path)[0] == 1
        assert not writer.overdue()
    assert steps(tmp_path) == [1, 2]
    assert checkpoint.load(tmp_path / "ckpt/step-000001").model["w"].tolist() == [0, 0, 0]


def test_an_interrupt_does_not_wait_for_a_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_alone, go = checkpoint.save, threading.Event()
    write_alone(tmp_path, {}, {}, facts(1), None)
    monkeypatch.setattr(checkpoint, "save", lambda *args: go.wait(10) and write_alone(*args))
    writer = checkpoint.Writer(tmp_path, 0, 0.0, None)
    write(writer, 2)
    began = time.monotonic()
    writer.__exit__(KeyboardInterrupt)
    assert time.monotonic() - began < 5  # the write waits for twice as long
    assert steps(tmp_path) == [1]
    go.set()
    writer.finish()


@pytest.mark.usefixtures("small_files")
def test_a_save_that_fails_is_told_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(checkpoint, "RETRY_S", 0.0)
    with checkpoint.Writer(tmp_path, 0, 15.0, None) as writer:
        write(writer, 1)
        assert not writer.overdue()
        write(writer, 2, size=1_000_000)
        writer._thread.join()
        assert writer.overdue()
        assert re.search(
            r"warning: .*step-000002 could not be written .*; trying again in 0 s", capsys.readouterr().out
        )
        write(writer, 3)
        writer.finish()  # the fault before it is mended
        write(writer, 4, size=1_000_000)
        with pytest.raises(RunStopped, match=r"step-000004 could not be written .*; then go on with --resume=True"):
            writer.finish()
    assert steps(tmp_path) == [1, 3]


@pytest.mark.usefixtures("small_files")
def test_a_failure_that_the_next_save_waits_for_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with checkpoint.Writer(tmp_path, 0, 15.0, None) as writer:
        write(writer, 1, size=1_000_000)
        write(writer, 2)
        assert "step-000001 could not be written" in capsys.readouterr().out
        writer.finish()
    assert steps(tmp_path) == [2]


def test_what_is_renamed_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every file is synced before its folder gets its name, the folders around it after that; a step that is saved
    again is under a name that `to_resume` knows while the new one has none."""
    save(tmp_path, 1)
    told: list[tuple[str, str]] = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda of: (told.append(("sync", os.readlink(f"/proc/self/fd/{of}"))), fsync(of)))

    def watched(path: Path, target: Path) -> Path:
        told.append(("rename", f"{path.name} {target.name}"))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", watched)
    ckpt = tmp_path / "ckpt"
    (ckpt / ".step-000001.old.partial").mkdir()  # as a kill may have left it
    save(tmp_path, 1)
    partial = ckpt / ".step-000001.partial"
    first, second = (n for n, (what, _) in enumerate(told) if what == "rename")
    names = {path.name for path in (ckpt / "step-000001").iterdir()}
    assert {where for _, where in told[:first]} >= {str(partial), *(str(partial / name) for name in names)}
    assert [told[first][1], told[second][1]] == [
        "step-000001 .step-000001.old.partial",
        ".step-000001.partial step-000001",
    ]
    assert told[second + 1 :] == [("sync", str(ckpt))]


def test_the_room_is_known_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 80, 20))  # type: ignore[attr-defined]
    with pytest.raises(RunStopped, match=r"could not be written \(24 B are needed, 20 B are free\)"):
        checkpoint.save(tmp_path, {"w": torch.zeros(5)}, {"w/step": torch.zeros(())}, facts(1), None)
    assert [*(tmp_path / "ckpt").iterdir()] == []


# ---- in runs of train.py


def test_one_run_at_a_time_writes_into_a_folder(run: Run, tmp_path: Path):
    run(out_dir="out", max_iters=2)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with RunLock(Path("out")):
        for resume in (True, "auto", False):
            with pytest.raises(InputError, match="out_dir=out: a run is writing there now"):
                run(out_dir="out", resume=resume, max_iters=4)
        assert run(out_dir="out", resume=True, eval_only=True) == 0  # which reads alone
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert run(out_dir="out", resume=True, max_iters=4) == 0


def test_a_folder_that_is_deleted_is_made_anew(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    original, pending = train.TrainConfig.learning_rate_at, [10]

    def delete(config: train.TrainConfig, at: int) -> float:
        if pending == [at]:
            pending.clear()
            shutil.rmtree("out")
        return original(config, at)

    monkeypatch.setattr(train.TrainConfig, "learning_rate_at", delete)
    original_sync, refused = MetricsWriter.sync, []

    def sync(tracker: MetricsWriter, lock: RunLock) -> None:
        original_sync(tracker, lock)
        with pytest.raises(InputError, match="a run is writing there now"):
            RunLock(Path("out")).take()
        refused.append(True)

    monkeypatch.setattr(MetricsWriter, "sync", sync)
    assert run(out_dir="out") == 0
    assert len(refused) == 3
    assert "warning: out/metrics.jsonl is gone" in capsys.readouterr().out
    assert steps("out") == [16, 20]
    assert metrics("out", "step", "loss")[-1][0] == 20


@pytest.mark.parametrize("name", ["out of März", "出力/ö"])
def test_names_with_spaces_and_letters_of_all_kinds(run: Run, name: str):
    run(out_dir=name, max_iters=10)
    assert run(out_dir=name, resume=True, max_iters=12) == 0
    assert steps(name)[-1] == 12


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


def damage(step: int, name: str = "model.safetensors") -> None:
    flip_a_bit(Path(f"out/ckpt/step-{step:06d}", name))


def test_damaged_checkpoints_take_no_whole_one_s_place(run: Run, capsys: pytest.CaptureFixture[str]):
    """The newest two are damaged: a run that goes on from the third keeps that, and what it saves itself."""
    run(out_dir="out", max_iters=24, keep_every=8)
    for step in (16, 24):
        damage(step)
    capsys.readouterr()
    assert run(out_dir="out", resume="auto", max_iters=11) == 0
    told = capsys.readouterr().out
    assert "step-000024 is damaged: renamed to damaged-step-000024" in told
    assert steps("out") == [8, 11]
    assert (Path("out/ckpt/damaged-step-000016")).is_dir()
    assert run(out_dir="out", resume=True, max_iters=24) == 0
    assert steps("out")[-1] == 24


def test_a_damaged_best_is_not_the_best(run: Run, monkeypatch: pytest.MonkeyPatch):
    losses = iter([9.0, 1.0, 3.0, 4.0, 5.0])
    monkeypatch.setattr(train, "evaluate", lambda *_: next(losses))
    run(out_dir="out", max_iters=12, eval_interval=4, eval_train=False)
    assert steps("out") == [4, 8, 12]
    damage(4)
    run(out_dir="out", resume=True, max_iters=16)
    assert steps("out") == [8, 12, 16]  # of those that are left 8 has the lowest loss
    Path("out/ckpt/step-000012").rename("out/ckpt/step-000090")
    with pytest.raises(InputError, match=r"step-000090 is damaged: it holds step 12"):
        checkpoint.load(Path("out/ckpt/step-000090"))


def test_nothing_is_read_before_the_folder_is_one_s_own(run: Run, monkeypatch: pytest.MonkeyPatch):
    run(out_dir="out", max_iters=2)
    monkeypatch.setattr(checkpoint, "load_latest", lambda *_: pytest.fail("it was read"))
    with RunLock(Path("out")), pytest.raises(InputError, match="a run is writing there now"):
        run(out_dir="out", resume=True)


def test_a_folder_moves_with_its_lock(tmp_path: Path):
    """Between the old run's folder and the new one there is no instant for another run."""
    out = tmp_path / "out"
    save(out, 1)
    with RunLock(out) as lock:
        original, tried = Path.rename, []

        def rename(path: Path, target: Path) -> Path:
            with pytest.raises(InputError, match="a run is writing there now"):
                RunLock(out).take()
            tried.append(path)
            return original(path, target)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "rename", rename)
            assert archive_previous_run(lock) == tmp_path / "out.1"
        assert tried == [out]
        with pytest.raises(InputError, match="a run is writing there now"):
            RunLock(out).take()
        RunLock(tmp_path / "out.1").take()  # the old folder is free


# ---- on a file system of its own

# What follows runs in a mount namespace of its own: `mount` there is seen by nobody else.
DISKS = """
import json, subprocess, sys
from pathlib import Path
import torch, train
from nanogpt import InputError, RunStopped, checkpoint

def mount(*words): subprocess.run(["mount", *words], check=True)

def run(out_dir, *more):
    sys.argv = ["train.py", *flags, f"--out_dir={out_dir}", *more]
    try:
        return train.main()
    except (InputError, RunStopped) as error:
        print("error:", error)
        return 3 if isinstance(error, RunStopped) else 2

flags = sys.argv[1:]
torch.set_num_threads(1)
print("undisturbed", run("whole"))
each = sum(path.stat().st_size for path in Path("whole/ckpt/step-000008").iterdir())
Path("disk").mkdir()
mount("-t", "tmpfs", "-o", f"size={each * 5 // 2 // 4096 * 4096}", "none", "disk")
print("full", run("disk/run"), Path("disk/run/metrics.jsonl").read_text().count('"lr"'))
print("kept", *(path.name for path in checkpoint.list_checkpoints(Path("disk/run"))))
mount("-o", "remount,size=100m", "disk")
print("larger", run("disk/run", "--resume=auto"))
rate = train.TrainConfig.learning_rate_at

def fill(config, at):
    # from step 3 to step 250 there is not a byte left
    if at == 3:
        with open("disk/filler", "wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                pass
    if at == 250:
        Path("disk/filler").unlink(missing_ok=True)
    return rate(config, at)

train.TrainConfig.learning_rate_at = fill
print("crowded", run("disk/crowded", "--max_iters=300", "--eval_interval=50"))
train.TrainConfig.learning_rate_at = rate
lines = [json.loads(line) for line in Path("disk/crowded/metrics.jsonl").read_text().splitlines()]
print("lines", [line["step"] for line in lines if "loss" in line] == list(range(1, 301)))
mount("-o", "remount,ro", "disk")
print("read-only", run("disk/run"), run("disk/run", "--resume=True", "--max_iters=10"), run("disk/new"))
print("measured", run("disk/run", "--resume=True", "--eval_only=True"))
subprocess.run(["cp", "-r", "disk/run", "filled"], check=True)
"""


def test_a_small_disk_and_a_read_only_one(letters: Path, tmp_path: Path):
    """A tmpfs that holds two checkpoints and a half."""
    apart = ["unshare", "--user", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*apart, "true"], capture_output=True).returncode:
        pytest.skip("needs Linux and the right to make a mount namespace")
    command = [*apart, sys.executable, "-c", DISKS, *flags(dataset=letters, eval_interval=2, max_iters=8)]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    told = dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
    assert told["undisturbed"] == "0"
    assert told["full"] == "3 8"  # all steps were done all the same
    assert re.search(r"error: the checkpoint disk/run/ckpt/step-00000\d could not be written \(", done.stdout)
    assert re.fullmatch(r"step-00000\d step-00000\d", told["kept"])
    assert told["larger"] == "0"
    assert_same_checkpoint(tmp_path / "whole", tmp_path / "filled", 8)
    assert told["crowded"] == "0"
    assert told["lines"] == "True"
    assert done.stdout.count("its lines wait until it can be") == 1
    assert re.search(r"warning: the checkpoint disk/crowded/ckpt/step-000050 could not be written", done.stdout)
    assert told["read-only"] == "2 2 2"
    assert told["measured"] == "0"
    assert done.stdout.count("cannot be written (Read-only file system)") == 3
