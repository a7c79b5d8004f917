"""Wrong usage: status 2, a line with the problem and its fix, and nothing is touched."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import huggingface_hub
import numpy as np
import pytest
from conftest import NO_SIZES, ROOT, Run, call_main, environment, flags, snapshot

import evaluate
import export
import play
import sample
import train
from model import GPT
from nanogpt import checkpoint, memory
from nanogpt import metrics as metrics_module
from nanogpt.data.rows import Rows
from nanogpt.data.write import write_dataset
from nanogpt.errors import InputError, RunStopped
from nanogpt.rendezvous import Ranks
from nanogpt.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def home(letters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `out`, a run of three steps; `copy` of its dataset; `other`, a dataset of other letters."""
    folder = tmp_path_factory.mktemp("home")
    assert call_main(train.main, *flags(dataset=letters, out_dir=folder / "out", max_iters=3)) == 0
    shutil.copytree(letters, folder / "copy")
    splits = {split: [np.arange(400) % 4] for split in ("train", "val")}
    write_dataset(folder / "other", splits, Tokenizer.characters("wxyz"))
    return folder


@pytest.fixture
def used(run: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory is a copy of `home`. No network."""
    shutil.copytree(home, ".", dirs_exist_ok=True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Mock(side_effect=OSError("no network")))
    return Path("out")


def refuse(run: Run, **keys: Any) -> str:
    """The message for these keys; no file or folder was made or changed."""
    before = snapshot(".")
    with pytest.raises(InputError) as caught:
        run(**keys)
    assert snapshot(".") == before
    return str(caught.value)


# --- Settings


def test_train_reports_all_problems_and_status_2(letters: Path, tmp_path: Path):
    (tmp_path / "wrong.py").write_text("learning_rat = 1e-3\nn_layer = 'two'\nmax_iters = 5\n")
    command = [sys.executable, ROOT / "train.py", *flags("wrong.py", dataset=letters, dropout=1.5, batch_sise=1)]
    done = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "error: wrong.py:1: learning_rat: no such key; did you mean learning_rate?",
        "error: wrong.py:2: n_layer: expected a whole number, got 'two'",
        "error: --dropout=1.5: must be below 1, is 1.5",
        "error: --batch_sise=1: no such key; did you mean --batch_size?",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["wrong.py"]


def test_sizes_that_contradict_each_other_are_refused(run: Run, used: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(train, "join", Ranks)  # the others would not come
    sizes, rows = refuse(run, n_embd=18, n_head=4).splitlines()
    assert re.match(r"n_embd=18 .* n_head=4", sizes)
    assert re.match(r"batch_size .* 4 rows per step .* 3 processes: change one", rows)


def test_what_is_not_installed_is_named(run: Run, used: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(metrics_module, "find_spec", lambda _: None)
    lines = refuse(run, out_dir="out", wandb_log=True, tensorboard=True).splitlines()
    assert [line.partition(" ")[0] for line in lines] == ["tensorboard=True:", "wandb_log=True:"]
    assert all('pip install -e ".[tracking]"' in line for line in lines)
    assert run(wandb_log=True, eval_only=True) == 0  # which logs nothing


@pytest.mark.parametrize(("batch_size", "accumulation", "smaller"), [(8, 3, 4), (15, 2, 6), (7, 1, 1), (1, 4, None)])
def test_too_little_memory_is_refused_with_flags_that_keep_the_steps(
    run: Run, used: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int, accumulation: int, smaller: int | None
):
    monkeypatch.setattr(memory, "free_memory", lambda _: 50_000)
    assert run(eval_only=True) == 0  # which needs neither gradients nor moments
    message = refuse(run, batch_size=batch_size, gradient_accumulation_steps=accumulation)
    if smaller is None:
        assert "try --activation_checkpointing=True and --loss_chunk=1024" in message
    else:
        assert f"--micro_batch_size={smaller}" in message
        assert batch_size * accumulation % smaller == 0


# --- Data


def test_data_that_is_missing_or_damaged_is_refused(run: Run, used: Path):
    message = refuse(run, dataset="shakespear_char", out_dir="deep/er/out")
    assert message.endswith("did you mean shakespeare_char?")
    ids = np.fromfile("copy/train.bin", "<u2")
    ids[::-1].tofile("copy/train.bin")
    assert "copy/train.bin is not the file that meta.json describes" in refuse(run, dataset="copy", verify_data=True)
    Path("copy/val.bin").write_bytes(b"odd")
    assert "copy/val.bin is cut short" in refuse(run, dataset="copy")


def test_data_of_another_tokenizer_is_refused(run: Run, used: Path):
    message = refuse(run, out_dir="out", resume=True, max_iters=5, dataset="other")
    assert message.startswith("dataset=other: its tokenizer is not that of out/ckpt/step-000003")


def test_ids_beyond_the_vocabulary_are_refused(run: Run, used: Path):
    """By meta.json before anything is touched; without it when they are read, before the device sees them."""
    splits = {split: [np.arange(10).repeat(9)] for split in ("train", "val")}
    write_dataset("wide", splits, Tokenizer.characters("abcdefghij"))
    assert "wide holds id 9, but the model's vocab_size is 4" in refuse(run, dataset="wide", resume=True, max_iters=9)
    Path("copy/meta.json").unlink()
    np.full(20_000, 4, "<u2").tofile("copy/train.bin")
    with pytest.raises(InputError, match=r"copy/train.bin holds id 4 at token [\d,]+, .* vocab_size is 4"):
        run(dataset="copy", out_dir="new")
    assert not Path("new/ckpt").exists()


def test_a_bad_id_in_mid_run_stops_the_run(run: Run, used: Path):
    """After the first update the status is 3, and what was saved before is there."""
    ids = np.fromfile("copy/train.bin", "<u2")
    ids[10_000:] = 9
    ids.tofile("copy/train.bin")
    Path("copy/meta.json").unlink()

    def starts(seed: int) -> np.ndarray:
        return Rows(ids, 16, 20_000, seed).starts(slice(0, 4))

    seed = next(s for s in range(100) if max(starts(s)[:3]) < 9_900 and starts(s)[3] > 10_000)
    keys = {"dataset": "copy", "batch_size": 1, "eval_interval": 1, "eval_iters": 1}
    with pytest.raises(RunStopped, match=r"holds id 9 at token .*vocab_size is 4"):
        run(out_dir="broken", seed=seed, **keys)
    assert [path.name for path in checkpoint.list_checkpoints(Path("broken"))] == ["step-000003", "step-000002"]


# --- Folders and checkpoints


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_an_out_dir_that_cannot_be_written_is_refused(run: Run, used: Path, name: str):
    Path("file").write_text("mine")
    assert re.fullmatch(rf"out_dir={name} cannot be written \(.*: give another --out_dir", refuse(run, out_dir=name))


def test_nothing_to_resume_is_refused(run: Run, used: Path):
    message = refuse(run, out_dir="none", resume=True)
    assert message.startswith("out_dir=none holds no run to resume")
    assert refuse(run, out_dir="none", init_from="resume") == message
    Path("theirs").mkdir()
    Path("theirs/ckpt.pt").touch()
    assert "--init_from=theirs/ckpt.pt" in refuse(run, out_dir="theirs", resume=True)


def test_other_sizes_than_the_weights_have_are_refused(run: Run, used: Path):
    lines = refuse(run, out_dir="out", resume=True, n_layer=3, n_embd=32).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["n_layer=3", "n_embd=32"]
    assert "n_layer=3: out has n_layer=1" in refuse(run, out_dir="new", init_from="out", n_layer=3)
    message = refuse(run, init_from="out", out_dir="new", block_size=17, **NO_SIZES)
    assert re.match("init_from=out: block_size=17: .*leave --block_size out or give less", message)


def test_damaged_checkpoints_are_refused(run: Run, used: Path):
    Path("out/ckpt/step-000003/model.safetensors").write_bytes(b"no weights")
    assert "no checkpoint of out is intact" in refuse(run, out_dir="out", resume=True)
    message = refuse(run, out_dir="new", init_from="out/ckpt/step-000003")
    assert "step-000003 is damaged: the SHA-256 of model.safetensors is not the manifest's" in message


IMPOSSIBLE_SIZES: list[dict[str, Any]] = [{name: 2**40} for name in ("n_layer", "n_embd", "vocab_size")]
IMPOSSIBLE_SIZES += [{"vocab_size": 2**63 - 2}, {"arch": "modern", "bias": False, "head_dim": 2**62}]
IMPOSSIBLE_SIZES += [{"n_embd": 32}, {"n_head": 0}, {"n_embd": "16"}, {"n_layers": 1}]


@pytest.mark.parametrize("sizes", IMPOSSIBLE_SIZES, ids=str)
def test_a_state_of_impossible_sizes_is_refused(
    run: Run, used: Path, monkeypatch: pytest.MonkeyPatch, sizes: dict[str, Any]
):
    """Before they take memory, and though the hashes match."""
    original = checkpoint.load

    def load(*args: Any, **keys: Any) -> checkpoint.Checkpoint:
        loaded = original(*args, **keys)
        loaded.state["model"] |= sizes
        return loaded

    monkeypatch.setattr(checkpoint, "load", load)
    message = refuse(run, out_dir="out", resume=True, **NO_SIZES)
    assert message.startswith("out/ckpt/step-000003 is damaged: state.json: ")
    with pytest.raises(InputError, match=re.escape(message)):
        GPT.from_checkpoint("out")
    assert "\n" not in message


def test_weights_that_are_not_there_are_refused(run: Run, used: Path):
    assert "'nonsense' is not a file or folder" in refuse(run, init_from="nonsense", **NO_SIZES)
    Path("empty").mkdir()
    assert "empty/config.json: cannot be read" in refuse(run, init_from="empty", **NO_SIZES)


NO_NAMES = ["a" * 5000, "a/" * 5000, "/dev/null/x"]


@pytest.mark.parametrize("key", ["out_dir", "dataset", "init_from"])
@pytest.mark.parametrize("name", NO_NAMES, ids=range(len(NO_NAMES)))
def test_names_that_no_file_can_have_are_refused(run: Run, used: Path, key: str, name: str):
    for resume in (False, True, "auto") if key == "out_dir" else (False,):
        with pytest.raises(InputError):
            run(max_iters=1, resume=resume, **{"out_dir": "new"} | {key: name})


@pytest.mark.parametrize("script", [sample, evaluate, export, play])
def test_two_models_at_once_are_an_error(script: Any):
    with pytest.raises(InputError, match=r"^--out_dir: --init_from=base takes its place.*\n--checkpoint: "):
        call_main(script.main, "--init_from=base", "--out_dir=out", "--checkpoint=latest")


def test_keys_of_lora_without_it_are_an_error(run: Run):
    with pytest.raises(InputError, match=r"^lora_alpha: has no effect without lora_rank.*\nlora_targets: has no"):
        run(lora_alpha=4, lora_targets="q_proj")
    with pytest.raises(InputError, match=r"^out_dir: is empty"):
        run(out_dir="")
