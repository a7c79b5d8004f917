"""The directory of a run: locked, archived, what is saved in it and when, damaged checkpoints, small disks."""

import contextlib
import errno
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import safetensors.torch
from conftest import AtStep, Run, assert_same_checkpoint, environment, flags, metrics, snapshot, steps

import train
from nanogpt import checkpoint
from nanogpt.errors import InputError
from nanogpt.run_dir import RunDir

IS_LOCKED = "a run is writing there now"


def damage(step: int) -> None:
    path = Path(f"out/ckpt/step-{step:06d}/model.safetensors")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# --- One run at a time


def test_a_locked_folder_is_refused_and_unchanged(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run(out_dir="out", max_iters=2)
    before = snapshot(tmp_path)
    with RunDir(Path("out")):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "load_latest", lambda *_: pytest.fail("read before it is locked"))
            for resume in (True, "auto", False):
                with pytest.raises(InputError, match=f"out_dir=out: {IS_LOCKED}"):
                    run(out_dir="out", resume=resume, max_iters=4)
        assert run(out_dir="out", resume=True, eval_only=True) == 0  # which only reads
    assert snapshot(tmp_path) == before
    assert run(out_dir="out", resume=True, max_iters=4) == 0


def test_a_restarted_run_waits_for_one_that_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with contextlib.ExitStack() as stack:
        stack.enter_context(RunDir(tmp_path))
        with pytest.raises(InputError, match=IS_LOCKED), RunDir(tmp_path, wait_s=0.1):
            pass
        timer = threading.Timer(0.2, stack.close)
        timer.start()
        with RunDir(tmp_path, wait_s=60.0):
            timer.join()
    assert capsys.readouterr().out.count("waiting") == 2


def refuse(out_dir: Path) -> None:
    with pytest.raises(InputError, match=IS_LOCKED), RunDir(out_dir):
        pass


def test_a_folder_moves_with_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Between the old run's folder and the new one there is no instant for another run."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "metrics.jsonl").touch()
    original, renamed = Path.rename, []

    def rename(path: Path, target: Path) -> Path:
        refuse(out)
        renamed.append(path)
        return original(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with RunDir(out) as run_dir:
        assert run_dir.archive_previous_run() == tmp_path / "out.1"
        assert renamed == [out]
        refuse(out)
        with RunDir(tmp_path / "out.1"):  # the old folder is free
            pass


def test_a_folder_is_claimed_at_once_under_all_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("disk").mkdir()
    Path("link").symlink_to("disk/run")
    with RunDir(Path("link")) as run_dir:
        for name in ("link", "disk/run", "disk/../disk/run", str(tmp_path / "disk/run")):
            refuse(Path(name))
        Path("link").unlink()
        Path("link").symlink_to("elsewhere")  # which is no business of the run
        assert run_dir.follow() == tmp_path / "disk/run"
    assert [*Path("disk").iterdir()] == []  # created for nothing
    Path("disk/run").mkdir()
    Path("disk/run/metrics.jsonl").touch()
    Path("link").unlink()
    Path("link").symlink_to("disk/run")
    with RunDir(Path("link")) as run_dir:
        assert run_dir.archive_previous_run() == tmp_path / "disk/run.1"  # the link keeps its target
        assert [path.name for path in Path("link").iterdir()] == [".lock"]


def rename(run_dir: RunDir) -> str:
    Path("out").rename("moved")
    return "moved"


def rename_and_start_another(run_dir: RunDir) -> str:
    Path("out").rename("moved")
    shutil.copytree("moved", "out")
    return "moved"


def delete(run_dir: RunDir) -> str:
    shutil.rmtree("out")
    return "out"


def delete_with_the_folder_above(run_dir: RunDir) -> str:
    shutil.rmtree(Path().resolve())
    return "out"


def delete_the_lock(run_dir: RunDir) -> str:
    Path("out/.lock").unlink()
    return "out"


def replace(run_dir: RunDir) -> str:
    Path("away").mkdir()
    Path("out").rename("away/out")
    Path("out/ckpt/step-000001").mkdir(parents=True)
    return "out.1"


@pytest.mark.parametrize(
    "deed", [rename, rename_and_start_another, delete, delete_with_the_folder_above, delete_the_lock, replace]
)
def test_a_run_follows_its_own_folder(
    deed: Callable[[RunDir], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    with RunDir(home / "out") as run_dir:
        Path("out/metrics.jsonl").touch()
        expected = home / deed(run_dir)
        monkeypatch.chdir(tmp_path)
        before = snapshot(home / "out")
        assert run_dir.follow() == expected
        assert capsys.readouterr().out.count("warning: ") == 1
        assert run_dir.follow() == expected
        assert capsys.readouterr().out == ""
        refuse(expected)
        if expected.name != "out":
            assert snapshot(home / "out") == before


@pytest.mark.parametrize("name", ["out", "."])
def test_a_lost_lock_that_another_run_has_taken_is_not_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out" if name == "." else tmp_path)
    with RunDir(Path(name)) as run_dir:
        (tmp_path / "out/.lock").unlink()
        with RunDir(tmp_path / "out") as other:
            assert run_dir.follow().absolute() == tmp_path / "out.1"
            assert other.follow() == tmp_path / "out"


def sync_files_alone(handle: int) -> None:
    if stat.S_ISDIR(os.fstat(handle).st_mode):
        raise OSError(errno.EINVAL, "Invalid argument")


@pytest.mark.parametrize(
    ("call", "action"),
    [
        ("fcntl.flock", Mock(side_effect=OSError(errno.ENOLCK, "No locks available"))),
        ("os.fsync", sync_files_alone),
        ("pathlib.Path.chmod", Mock(side_effect=OSError(errno.EPERM, "Operation not permitted"))),
    ],
)
def test_a_file_system_without_locks_sync_of_folders_or_modes_is_used(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], call: str, action: Any
):
    monkeypatch.setattr(call, action)
    assert run(out_dir="out") == 0
    assert ("warning: out cannot be locked" in capsys.readouterr().out) == (call == "fcntl.flock")
    assert steps("out")[-1] == 20


@pytest.mark.parametrize("deed", [rename, rename_and_start_another, delete, replace])
@pytest.mark.parametrize("step", [3, 10])
def test_a_folder_taken_away_in_mid_run_costs_no_step(
    run: Run, at_step: AtStep, monkeypatch: pytest.MonkeyPatch, deed: Callable[[RunDir], str], step: int
):
    """Before the first save, and between two."""
    entered: list[checkpoint.Writer] = []
    enter = checkpoint.Writer.__enter__
    monkeypatch.setattr(checkpoint.Writer, "__enter__", lambda writer: entered.append(writer) or enter(writer))
    places: list[Any] = []

    def act() -> None:
        entered[0].wait()  # or it would write into the folder that is being deleted
        places.append(deed(entered[0].run_dir))
        places.append(snapshot("out"))

    at_step(step, act)
    assert run(out_dir="out") == 0
    place, others = places
    assert steps(place)[-1] == 20
    assert [n for (n,) in metrics(place, "step") if n] == [*range(1, 9), 8, *range(9, 17), 16, *range(17, 21), 20]
    if place != "out":
        assert snapshot("out") == others
    assert run(out_dir=place, resume=True, max_iters=22) == 0


def test_a_folder_renamed_amid_a_save_gets_it(run: Run, monkeypatch: pytest.MonkeyPatch):
    save_file = safetensors.torch.save_file

    def rename_and_save(tensors: Any, path: Path) -> None:
        if "step-000016" in str(path) and Path("out").exists():
            Path("out").rename("moved")
        save_file(tensors, path)

    monkeypatch.setattr(safetensors.torch, "save_file", rename_and_save)
    assert run(out_dir="out") == 0
    assert steps("moved") == [8, 16, 20] or steps("moved") == [16, 20]
    assert not Path("out").exists()


# --- The previous run


def test_a_previous_run_is_archived(run: Run, capsys: pytest.CaptureFixture[str]):
    for seed in (1, 2, 3):
        run(out_dir="out", seed=seed, max_iters=2)
    output = capsys.readouterr().out
    assert "out.1" in output
    assert "out.2" in output
    for seed, name in enumerate(("out.1", "out.2", "out"), 1):
        assert checkpoint.load(Path(name, "ckpt/step-000002")).state["config"]["seed"] == seed
        assert len(metrics(name, "loss")) == 2
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("kept")
    run(out_dir="mine", max_iters=1)  # a folder without a run does not move
    assert Path("mine/notes.txt").exists()
    assert not Path("mine.1").exists()


@pytest.mark.parametrize("name", ["run/", "deep/er/run", "../run.gpt", "out of 出力/ö", os.fsdecode(b"\xff")])
def test_out_dir_in_any_spelling(run: Run, name: str):
    run(out_dir=name, max_iters=1)
    run(out_dir=name, max_iters=2)
    assert steps(name) == [2]
    assert steps(name.rstrip("/") + ".1") == [1]
    assert run(out_dir=name, resume=True, max_iters=3) == 0
    assert steps(name)[-1] == 3


def test_data_beside_a_run_is_not_archived(tmp_path: Path):
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "train.bin").touch()
    with RunDir(tmp_path) as run_dir, pytest.raises(InputError, match=r"holds a run and .bin files of data"):
        run_dir.archive_previous_run()


def test_the_current_directory_cannot_be_archived(run: Run):
    run(out_dir=".", max_iters=1)
    for name in (".", Path.cwd()):
        with pytest.raises(InputError, match=r"out_dir=.* holds a run that cannot move"):
            run(out_dir=name, max_iters=1)
    assert steps(".") == [1]
    assert run(out_dir=".", max_iters=2, resume=True) == 0


# --- What is saved


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that are saved."""
    original, steps_saved = checkpoint.save, []

    def save(out_dir: Path, *args: Any) -> Path:
        steps_saved.append(args[2]["step"])
        return original(out_dir, *args)

    monkeypatch.setattr(checkpoint, "save", save)
    return steps_saved


@pytest.mark.parametrize(
    ("always", "max_iters", "expected"), [(False, 16, [8, 16]), (False, 20, [8, 20]), (True, 20, [8, 16, 20])]
)
def test_only_the_best_are_saved_on_request(
    run: Run, saved: list[int], monkeypatch: pytest.MonkeyPatch, always: bool, max_iters: int, expected: list[int]
):
    """Not at 0; at 8, the best; at 16, which is no better, only if it is the last."""
    losses = iter([5.0, 4.0, 4.5, 3.0, 3.5, 3.6, 3.5, 3.7])
    monkeypatch.setattr(train, "evaluate", lambda *_: next(losses))  # train and val in turn
    run(out_dir="out", eval_interval=8, max_iters=max_iters, always_save_checkpoint=always)
    assert saved == expected
    assert checkpoint.find(Path("out")).name == "step-000008"


def test_saves_by_the_clock_change_nothing(run: Run, saved: list[int]):
    run(out_dir="often", checkpoint_minutes=1e-7, eval_interval=100, max_iters=6, lr_decay_iters=20)
    assert saved == [2, 4, 6]  # due at each step, seen a step late, when the next is done
    saved.clear()
    run(out_dir="whole", eval_interval=100, max_iters=6, lr_decay_iters=20)
    assert saved == [6]
    assert_same_checkpoint("often", "whole", 6)


# --- Damaged checkpoints


def test_damaged_checkpoints_displace_no_intact_one(run: Run, capsys: pytest.CaptureFixture[str]):
    """The newest two are damaged: a run resumed from the third keeps that, and what it saves itself."""
    run(out_dir="out", max_iters=24, keep_every=8)
    for step in (16, 24):
        damage(step)
    capsys.readouterr()
    assert run(out_dir="out", resume="auto", max_iters=11) == 0
    assert "step-000024 is damaged: renamed to damaged-step-000024" in capsys.readouterr().out
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


# --- On a file system of its own

# Runs in a mount namespace of its own: nothing else sees what it mounts.
DISKS = """
import json, subprocess, sys
from pathlib import Path
import torch, train
from nanogpt import checkpoint
from nanogpt.errors import InputError, RunStopped
from nanogpt.schedule import StepSchedule

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
lr_scale = StepSchedule.lr_scale

def fill(schedule, step):  # from step 3 to step 250 there is not a byte left
    if step == 3:
        with open("disk/filler", "wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                pass
    if step == 250:
        Path("disk/filler").unlink(missing_ok=True)
    return lr_scale(schedule, step)

StepSchedule.lr_scale = fill
print("crowded", run("disk/crowded", "--max_iters=300", "--eval_interval=50"))
StepSchedule.lr_scale = lr_scale
lines = [json.loads(line) for line in Path("disk/crowded/metrics.jsonl").read_text().splitlines()]
print("lines", [line["step"] for line in lines if "loss" in line] == list(range(1, 301)))
mount("-o", "remount,ro", "disk")
print("read-only", run("disk/run"), run("disk/run", "--resume=True", "--max_iters=10"), run("disk/new"))
print("evaluated", run("disk/run", "--resume=True", "--eval_only=True"))
subprocess.run(["cp", "-r", "disk/run", "filled"], check=True)
"""


def test_a_small_disk_and_a_read_only_one(letters: Path, tmp_path: Path):
    """A tmpfs that holds two checkpoints and a half."""
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*namespace, "true"], capture_output=True).returncode:
        pytest.skip("needs Linux and the right to make a mount namespace")
    command = [*namespace, sys.executable, "-c", DISKS, *flags(dataset=letters, eval_interval=2, max_iters=8)]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    results = dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
    assert results["undisturbed"] == results["larger"] == results["crowded"] == results["evaluated"] == "0"
    assert results["full"] == "3 8"  # all steps were made nevertheless
    assert re.search(r"error: the checkpoint disk/run/ckpt/step-00000\d could not be written \(", done.stdout)
    assert re.fullmatch(r"step-00000\d step-00000\d", results["kept"])
    assert_same_checkpoint(tmp_path / "whole", tmp_path / "filled", 8)
    assert results["lines"] == "True"
    assert re.search(r"warning: the checkpoint disk/crowded/ckpt/step-000050 could not be written", done.stdout)
    assert results["read-only"] == "2 2 2"
    assert done.stdout.count("cannot be written (Read-only file system)") == 3
