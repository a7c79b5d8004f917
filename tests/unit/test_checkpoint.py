"""Checkpoints on disk: complete or absent, which are kept, and that damage in any form is refused in one line."""

import contextlib
import errno
import hashlib
import json
import os
import random
import re
import resource
import shutil
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import steps

from nanogpt import checkpoint
from nanogpt.errors import InputError, RunStopped
from nanogpt.rendezvous import Ranks
from nanogpt.run_dir import RunDir
from nanogpt.text.tokenizer import Tokenizer

FILES = ("MANIFEST.json", "model.safetensors", "optimizer.safetensors", "state.json", "tokenizer.json")
SCALER = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 0}
GUARD = {"skipped": 0.0, "norms": [None, 0.5], "checked": 2}


def make_state(step: int, val_loss: float | None = None) -> dict[str, Any]:
    state: dict[str, Any] = {"step": step, "samples": 4 * step, "time_s": 0.5, "processes": 1, "wandb_id": None}
    state |= {"val_loss": val_loss, "best_val_loss": val_loss, "scaler": SCALER, "guard": GUARD}
    return state | {"model": {}, "config": {}}


def save(out_dir: Path, step: int, val_loss: float | None = None, size: int = 3) -> Path:
    weights = {"layer.weight": torch.arange(float(size)) + step}
    optimizer = {"layer.weight/step": torch.tensor(float(step))}
    return checkpoint.save(out_dir, weights, optimizer, make_state(step, val_loss), Tokenizer.characters("ab"))


def sign(path: Path) -> None:
    """Write a manifest of the present files, as `save` does."""
    hashes = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in FILES[1:]}
    (path / "MANIFEST.json").write_text(json.dumps({"sha256": hashes}, indent=1))


@pytest.fixture
def out_dir(tmp_path: Path) -> Path:
    """A run with checkpoints at 8, 16 and 24."""
    for step, loss in ((8, 3.0), (16, 2.0), (24, 2.5)):
        save(tmp_path, step, loss)
    return tmp_path


@pytest.fixture
def newest(out_dir: Path) -> Path:
    return out_dir / "ckpt/step-000024"


# --- Save, find, prune


def test_checkpoint_holds_what_was_saved(tmp_path: Path):
    """In files with the parameter names of version 0.1."""
    from safetensors.torch import load_file

    names = {
        "token_embedding.weight": "tokens.weight",
        "position_embedding.weight": "positions.weight",
        "norm.w": "norm.w",
    }
    weights = {name: torch.randn(3, 4).t() for name in names}  # not contiguous
    moments = {f"{name}/exp_avg": 2 * matrix for name, matrix in weights.items()}
    state = make_state(5) | {"name": "é"}
    path = checkpoint.save(tmp_path, weights, moments, state, Tokenizer.characters("ab"))
    assert [*tmp_path.glob("ckpt/*")] == [path] == [tmp_path / "ckpt/step-000005"]  # nothing temporary is left
    assert sorted(file.name for file in path.iterdir()) == [*FILES]
    assert load_file(path / "model.safetensors").keys() == {*names.values()}
    assert load_file(path / "optimizer.safetensors").keys() == {f"{name}/exp_avg" for name in names.values()}
    loaded = checkpoint.load(path)
    torch.testing.assert_close(loaded.model, weights, rtol=0, atol=0)
    torch.testing.assert_close(loaded.optimizer, moments, rtol=0, atol=0)
    assert loaded.state == checkpoint.ADDED_LATER | state
    assert checkpoint.load(path, with_optimizer=False).optimizer == {}
    tokenizer = Tokenizer.load(path)
    assert tokenizer
    assert tokenizer.encode("ba") == [1, 0]


def test_prune_keeps_the_newest_two_the_best_and_every_nth(tmp_path: Path):
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
    with pytest.raises(InputError, match="it has step-000070, step-000060, step-000030, step-000020"):
        checkpoint.find(tmp_path, "step-000010")
    with pytest.raises(InputError, match="holds no checkpoint"):
        checkpoint.find(tmp_path / "elsewhere")


def test_steps_beyond_six_digits_are_newer(tmp_path: Path):
    for step in (999_999, 1_000_000):
        save(tmp_path, step)
    (tmp_path / "ckpt" / "step-1000001-copy").mkdir()
    assert steps(tmp_path) == [999_999, 1_000_000]
    assert checkpoint.find(tmp_path).name == "step-1000000"  # none was evaluated: the newest


@pytest.mark.parametrize("step", [8, 24])
def test_a_kill_between_two_renames_loses_nothing(out_dir: Path, step: int):
    """A step that is saved again has neither of its names for a moment."""
    for path in checkpoint.list_checkpoints(out_dir):
        if path.name > f"step-{step:06d}":
            shutil.rmtree(path)
    final = out_dir / f"ckpt/step-{step:06d}"
    final.rename(final.with_name(f".{final.name}.old.partial"))
    with contextlib.ExitStack() as stack:
        assert checkpoint.claim_and_load(RunDir(out_dir), "auto", False, Ranks(), stack) is None or step > 8
        assert not final.exists()  # a run that writes nothing holds no lock, and leaves this to those that do
        loaded = checkpoint.claim_and_load(RunDir(out_dir), "auto", True, Ranks(), stack)
    assert loaded
    assert loaded.path == final


def test_files_are_synced_before_their_directory_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And the directories around it after that; a step saved again has a name that the next run recovers."""
    save(tmp_path, 1, 3.0)
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, Path.rename

    def watched_fsync(handle: int) -> None:
        events.append(("sync", os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def watched_rename(path: Path, target: Path) -> Path:
        events.append(("rename", f"{path.name} {target.name}"))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "rename", watched_rename)
    ckpt = tmp_path / "ckpt"
    for name in (".step-000001.old.partial", ".step-000001.partial"):
        (ckpt / name).mkdir()  # as a kill may have left them
    save(tmp_path, 1, 2.0)
    partial = ckpt / ".step-000001.partial"
    first, second = (n for n, (kind, _) in enumerate(events) if kind == "rename")
    assert {place for _, place in events[:first]} >= {str(partial), *(str(partial / name) for name in FILES)}
    assert events[first][1] == "step-000001 .step-000001.old.partial"
    assert events[second][1] == ".step-000001.partial step-000001"
    assert events[second + 1 :] == [("sync", str(ckpt))]
    assert [*ckpt.iterdir()] == [ckpt / "step-000001"]
    assert checkpoint.load(ckpt / "step-000001").state["val_loss"] == 2


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file can grow beyond 100 kB, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("small_files")
def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save(tmp_path, 1, size=20_000)
    with pytest.raises(RunStopped, match=r"step-000002 could not be written .*earlier ones are untouched"):
        save(tmp_path, 2, size=10_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 80, 20))  # type: ignore[attr-defined]
    with pytest.raises(RunStopped, match=r"could not be written \(24 B are needed, 20 B are free\)"):
        save(tmp_path, 3, size=5)
    assert [path.name for path in (tmp_path / "ckpt").iterdir()] == ["step-000001"]
    assert checkpoint.load(tmp_path / "ckpt/step-000001").state["step"] == 1


# --- The writer


def write(writer: checkpoint.Writer, step: int, size: int = 3) -> None:
    writer.save({f"w{size}": torch.full((size,), float(step))}, {"w/step": torch.tensor(1.0)}, make_state(step))


def test_writer_saves_while_training_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    may_write, has_begun, original = threading.Event(), threading.Semaphore(0), checkpoint.save

    def slow_save(*args: Any) -> Path:
        has_begun.release()
        assert may_write.wait(10)
        return original(*args)

    monkeypatch.setattr(checkpoint, "save", slow_save)
    weights = torch.zeros(3)
    with checkpoint.Writer(RunDir(tmp_path), 0, 0.0, None) as writer:
        writer.save({"w": weights}, {"w/step": weights}, make_state(1))
        assert has_begun.acquire(timeout=10)
        weights += 1  # the next update, before anything is on disk
        assert steps(tmp_path) == []
        threading.Timer(0.1, may_write.set).start()
        write(writer, 2)  # waits for the first
        assert steps(tmp_path)[0] == 1
        assert not writer.overdue()
    assert steps(tmp_path) == [1, 2]
    assert checkpoint.load(tmp_path / "ckpt/step-000001").model["w"].tolist() == [0, 0, 0]


def test_an_interrupt_does_not_wait_for_the_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save(tmp_path, 1)
    may_write, original = threading.Event(), checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *args: may_write.wait(60) and original(*args))
    writer = checkpoint.Writer(RunDir(tmp_path), 0, 0.0, None)
    write(writer, 2)
    writer.__exit__(KeyboardInterrupt)  # would wait for a minute
    assert steps(tmp_path) == [1]
    may_write.set()
    writer.finish()
    assert steps(tmp_path) == [1, 2]


@pytest.mark.usefixtures("small_files")
def test_writer_reports_a_failed_save_and_tries_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(checkpoint, "RETRY_S", 0.0)
    warning = "warning: .*step-00000{} could not be written .*; trying again in 0 s"
    with checkpoint.Writer(RunDir(tmp_path), 0, 15.0, None) as writer:
        write(writer, 1)
        assert not writer.overdue()
        write(writer, 2, size=1_000_000)
        writer.wait()
        assert writer.overdue()
        assert re.search(warning.format(2), capsys.readouterr().out)
        write(writer, 3, size=1_000_000)
        write(writer, 4)  # waits for the one before it
        assert re.search(warning.format(3), capsys.readouterr().out)
        writer.finish()
        write(writer, 5, size=1_000_000)
        with pytest.raises(RunStopped, match=r"step-000005 could not be written .*--resume=True"):
            writer.finish()
    assert steps(tmp_path) == [1, 4]


# --- Damage


@pytest.fixture
def assert_refused(out_dir: Path, newest: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[], None]:
    """`assert_refused()`: the newest checkpoint is damaged, and named; the one before it is loaded."""

    def check() -> None:
        capsys.readouterr()
        with pytest.raises(InputError, match=r"step-000024 is damaged: .*; step-000016 may be intact") as caught:
            checkpoint.load(newest)
        assert "\n" not in str(caught.value)
        loaded = checkpoint.load_latest(out_dir, True)
        assert loaded
        assert loaded.state["step"] == 16
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith(f"warning: {newest} is damaged")

    return check


def test_an_intact_run_is_not_refused(out_dir: Path, newest: Path, capsys: pytest.CaptureFixture[str]):
    before = (newest / "MANIFEST.json").read_bytes()
    sign(newest)  # the oracle of the tests below
    assert (newest / "MANIFEST.json").read_bytes() == before
    (newest / "notes.txt").write_text("ignored")
    loaded = checkpoint.load_latest(out_dir, True)
    assert loaded
    assert loaded.path == newest
    assert capsys.readouterr().out == ""


def test_flipped_bits_and_truncations_are_found(newest: Path, assert_refused: Callable[[], None]):
    rng = random.Random(1)
    for n in range(360):
        path = newest / rng.choice(FILES)
        intact = path.read_bytes()
        damaged = bytearray(intact)
        place = rng.randrange(len(intact))
        if n % 6:
            damaged[place] ^= 1 << rng.randrange(8)
        else:
            del damaged[place:]
        path.write_bytes(damaged)
        assert_refused()
        path.write_bytes(intact)
    checkpoint.load(newest)


@pytest.mark.parametrize("name", FILES[:4])  # the tokenizer is the same in both
def test_a_file_of_another_checkpoint_is_found(
    out_dir: Path, newest: Path, assert_refused: Callable[[], None], name: str
):
    shutil.copy(out_dir / "ckpt/step-000016" / name, newest / name)
    assert_refused()


@pytest.mark.parametrize("name", ["", "MANIFEST.json", "model.safetensors", "tokenizer.json"])  # "": the directory
@pytest.mark.parametrize(
    "make",
    [
        lambda path: None,
        lambda path: path.mkdir(),
        os.mkfifo,  # reading it would block forever
        lambda path: path.symlink_to("/dev/zero"),  # reading it would never end
        lambda path: path.symlink_to(path),
    ],
    ids=["missing", "directory", "pipe", "device", "loop"],
)
def test_irregular_files_are_refused(
    out_dir: Path, newest: Path, assert_refused: Callable[[], None], name: str, make: Callable[[Path], Any]
):
    path = newest / name
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    make(path)
    if not name and not os.path.lexists(path):
        assert checkpoint.load_latest(out_dir, True)  # nothing to name
    else:
        assert_refused()


NO_OBJECT = [b"", b"{", b"null", b"[]", b"\xff\xfe{}", b"[" * 10**6, b'{"a":' * 10**6, b"9" * 9999]


@pytest.mark.parametrize("name", ["state.json", "MANIFEST.json"])
@pytest.mark.parametrize("content", NO_OBJECT, ids=range(len(NO_OBJECT)))
def test_unreadable_json_is_refused(newest: Path, assert_refused: Callable[[], None], content: bytes, name: str):
    (newest / name).write_bytes(content)
    if name == "state.json":
        sign(newest)
    assert_refused()


HASHES: list[Any] = [None, [], {}, "x", ["model.safetensors", "optimizer.safetensors", "state.json"]]
HASHES += [dict.fromkeys(FILES[1:4], value) for value in (None, 7, "", "0" * 64)]


def test_a_manifest_names_our_files_alone(out_dir: Path, newest: Path, assert_refused: Callable[[], None]):
    ours = json.loads((newest / "MANIFEST.json").read_text())["sha256"]
    (out_dir / "secret").touch()
    names = ["../../secret", "/etc/passwd", "..", "", "\0", "\ud800", "ckpt.pt", "x" * 999]
    for hashes in [*HASHES, *(ours | {name: hashlib.sha256(b"").hexdigest()} for name in names)]:
        (newest / "MANIFEST.json").write_text(json.dumps({"sha256": hashes}, indent=1))
        assert_refused()


LIES: list[tuple[str, Any]] = [(key, ...) for key in make_state(1) if key not in ("guard", "processes", "wandb_id")]
LIES += [(key, value) for key in ("step", "samples", "processes", "val_loss", "time_s") for value in (-1, "1", 10**400)]
LIES += [(key, value) for key in ("scaler", "guard") for value in (None, "x", {"scale": 1.0}, {"norms": []})]
LIES += [("guard", GUARD | {"norms": ["x"]}), ("best_val_loss", []), ("data", {"train": "0", "val": 1})]
LIES += [("scaler", SCALER | {"_growth_tracker": -1}), ("model", []), ("config", None), ("wandb_id", 1)]


def test_a_state_of_other_types_is_refused(newest: Path):
    """Though the hashes match."""
    state = json.loads((newest / "state.json").read_text())
    for key, value in LIES:
        changed = {name: kept for name, kept in (state | {key: value}).items() if kept is not ...}
        (newest / "state.json").write_text(json.dumps(changed))
        sign(newest)
        with pytest.raises(InputError, match=rf"step-000024 is damaged: state.json: {key}[.:]"):
            checkpoint.load(newest)
    (newest / "state.json").write_text(json.dumps(state | {"step": 25}))
    sign(newest)
    with pytest.raises(InputError, match="it holds step 25"):
        checkpoint.load(newest)


def test_states_of_earlier_versions_are_completed(newest: Path):
    state = json.loads((newest / "state.json").read_text())
    for key in ("guard", "processes", "wandb_id"):
        del state[key]
    (newest / "state.json").write_text(json.dumps(state | {"val_loss": float("nan"), "scaler": {}, "more": [1]}))
    sign(newest)
    loaded = checkpoint.load(newest).state
    assert (loaded["guard"], loaded["processes"], loaded["wandb_id"], loaded["val_loss"]) == ({}, 1, None, None)


def test_the_best_is_not_a_damaged_one(out_dir: Path):
    paths = checkpoint.list_checkpoints(out_dir)
    best = checkpoint.best(paths)
    assert best == out_dir / "ckpt/step-000016"
    for path, lie in ((paths[0], 0.0), (paths[2], "x")):
        state = json.loads((path / "state.json").read_text())
        (path / "state.json").write_text(json.dumps(state | {"val_loss": lie}))
    assert checkpoint.best(paths) == checkpoint.find(out_dir) == best
    (best / "MANIFEST.json").unlink()
    assert checkpoint.best(paths) is None
    with pytest.raises(InputError, match=r"no checkpoint of .* is intact"):
        checkpoint.load_latest(out_dir, "auto")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize(
    ("numbers", "end", "length"), [(2**40, 2**42, None), (2**40, 100, None), (25, 4, None), (25, 100, 2**63)]
)
def test_tensors_that_the_file_does_not_hold_are_refused(
    newest: Path, assert_refused: Callable[[], None], name: str, numbers: int, end: int, length: int | None
):
    header = json.dumps({"w": {"dtype": "F32", "shape": [numbers], "data_offsets": [0, end]}}).encode()
    size = struct.pack("<Q", len(header) if length is None else length)
    (newest / name).write_bytes(size + header + bytes(100))
    sign(newest)
    assert_refused()


def test_losses_on_other_data_are_not_compared(out_dir: Path):
    """Those of version 0.1, which did not save its data, are compared with all."""
    for step, val in ((8, None), (16, "old"), (24, "new")):
        path = out_dir / f"ckpt/step-{step:06d}"
        state = json.loads((path / "state.json").read_text()) | ({"data": {"train": "t", "val": val}} if val else {})
        (path / "state.json").write_text(json.dumps(state))
        sign(path)
    paths = checkpoint.list_checkpoints(out_dir)  # losses 2.5, 2.0, 3.0
    assert checkpoint.best(paths) == paths[0]
    assert checkpoint.best(paths[1:]) == paths[1]
    assert checkpoint.best(paths[2:]) == paths[2]


class Shards:
    """Stands for nanogpt.sharding on a rank: tensors of at least one dimension are sharded in two."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rank: int, error: Exception | None = None):
        self.gathered = 0
        self.error = error
        monkeypatch.setattr(checkpoint.dist, "get_rank", lambda: rank)
        monkeypatch.setattr(checkpoint, "is_sharded", lambda tensor: tensor.dim() > 0)
        monkeypatch.setattr(checkpoint, "local", lambda tensor: tensor[: len(tensor) // 2] if tensor.dim() else tensor)
        monkeypatch.setattr(checkpoint, "gather_rows", self.gather_rows)

    def gather_rows(self, copy: torch.Tensor, group: Any) -> None:
        if self.error:
            raise self.error
        self.gathered += 1


def test_writer_of_another_rank_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shards = Shards(monkeypatch, rank=1)
    (tmp_path / "ckpt/.step-000001.partial").mkdir(parents=True)  # the main process's
    with checkpoint.Writer(RunDir(tmp_path), 0, 0.0, None, group="two") as writer:
        write(writer, 3, size=4)
        writer.finish()
    assert shards.gathered == 1
    assert [path.name for path in (tmp_path / "ckpt").iterdir()] == [".step-000001.partial"]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("error", [RunStopped("rank 1 did not send its part"), ZeroDivisionError("of another kind")])
def test_a_failed_gathering_ends_all_saving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, error: Exception
):
    """Its group cannot be used again: what a rank sent last time may still be under way."""
    shards = Shards(monkeypatch, rank, error)
    writer = checkpoint.Writer(RunDir(tmp_path), 0, 15.0, None, group="two")
    write(writer, 1)
    writer.wait()
    assert writer.overdue()
    shards.error = None
    for deed in (lambda: write(writer, 2), writer.finish):
        with pytest.raises(RunStopped, match=str(error)):
            deed()
    assert not shards.gathered
    assert steps(tmp_path) == []


def test_a_network_that_fails_is_no_damage(out_dir: Path, newest: Path, monkeypatch: pytest.MonkeyPatch):
    def stale(path: Path) -> str:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(checkpoint, "file_sha256", stale)
    with pytest.raises(RunStopped, match=f"{newest} cannot be read .*try again"):
        checkpoint.load_latest(out_dir, "auto")
    assert newest.exists()
