"""What the user got wrong: status 2, a line that says what, why and what to do, and nothing touched."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import ROOT, Run, environment, flags

from nanogpt import checkpoint, distributed
from nanogpt import metrics as metrics_module
from nanogpt.data.rows import Rows
from nanogpt.data.write import write_dataset
from nanogpt.errors import InputError, RunStopped
from nanogpt.text.tokenizer import Tokenizer


@pytest.fixture
def used(run: Run, letters: Path) -> Path:
    """`out`, a run of three steps; `copy`, its dataset, free to be spoilt."""
    run(out_dir="out", max_iters=3)
    shutil.copytree(letters, "copy")
    return Path("out")


def everything() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def refused(run: Run, *files: str, **keys: Any) -> str:
    """The message for these keys, of which each line is a fault and its remedy; no file was written or changed."""
    before = everything()
    with pytest.raises(InputError) as caught:
        run(*files, **keys)
    assert everything() == before
    assert [*Path().glob("out.*")] == []
    return str(caught.value)


# ---- settings


def test_settings(run: Run, used: Path):
    Path("wrong.py").write_text("learning_rat = 1e-3\nn_layer = 'two'\nmax_iters = 5\n")
    message = refused(run, "wrong.py", batch_sise=3, dropout=1.5, block_size="long", n_layer=...)
    assert message.splitlines() == [
        "wrong.py:1: learning_rat: no such key; did you mean learning_rate?",
        "wrong.py:2: n_layer: expected a whole number, got 'two'",
        "--block_size=long: expected a whole number, got 'long'",
        "--batch_sise=3: no such key; did you mean --batch_size?",
        "--dropout=1.5: must be below 1",
    ]


def test_sizes_that_do_not_fit_together(run: Run, used: Path, monkeypatch: pytest.MonkeyPatch):
    assert refused(run, n_embd=17) == "n_embd=17 is not divisible by n_head=2: change one of them"
    monkeypatch.setenv("WORLD_SIZE", "3")
    message = refused(run, n_embd=18, n_head=4)
    assert message.startswith("n_embd=18 is not divisible by n_head=4")
    assert "4 rows per step do not divide by 3 processes: change one of the three" in message


def test_trackers_that_are_not_installed(run: Run, used: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(metrics_module, "find_spec", lambda _: None)
    assert refused(run, out_dir="out", wandb_log=True, tensorboard=True).splitlines() == [
        "tensorboard=True: tensorboard is not installed; run `pip install -e .[tracking]`, or give --tensorboard=False",
        "wandb_log=True: wandb is not installed; run `pip install -e .[tracking]`, or give --wandb_log=False",
    ]
    assert run(wandb_log=True, eval_only=True) == 0  # which logs nothing


def test_no_such_machine(run: Run, used: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "device=cuda: this machine has no usable CUDA device; use --device=cpu" in refused(run, device="cuda")


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "smaller"),
    [(8, 3, 4), (15, 2, 6), (7, 1, 1), (1, 4, None)],
)
def test_too_little_memory(
    run: Run, used: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int, accumulation: int, smaller: Any
):
    """The flags that are named keep the rows per step."""
    monkeypatch.setattr(metrics_module, "free_memory", lambda _: 50_000)
    assert run(eval_only=True) == 0  # which needs neither gradients nor moments
    message = refused(run, batch_size=batch_size, gradient_accumulation_steps=accumulation)
    assert f"too little memory for {batch_size} rows of 16 tokens at a time" in message
    assert "were free" in message
    assert "are needed" in message
    if smaller is None:
        assert "try --activation_checkpointing=True and --loss_chunk=1024" in message
    else:
        assert f"--micro_batch_size={smaller} takes fewer, and the steps stay as they are" in message
        assert batch_size * accumulation % smaller == 0


# ---- data


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("train.bin", lambda b: b"", r"copy/train.bin is empty: prepare the dataset again"),
        ("train.bin", lambda b: b[:-1], r"train.bin is cut short: 39999 bytes are not whole uint16 tokens; prepare"),
        ("val.bin", lambda b: b[:-2], r"val.bin holds 1,999 tokens where meta.json counts 2,000: prepare the dataset"),
        ("meta.json", lambda b: b[:-9], r"meta.json is damaged .*: prepare the dataset again"),
        ("tokenizer.json", lambda b: b[:99], r"tokenizer.json is damaged .*: prepare the dataset again, or restore"),
    ],
)
def test_spoilt_data(run: Run, used: Path, name: str, change: Callable[[bytes], bytes], message: str):
    path = Path("copy") / name
    path.write_bytes(change(path.read_bytes()))
    assert re.search(message, refused(run, dataset="copy"))


def test_missing_data(run: Run, used: Path):
    assert refused(run, dataset="shakespear_char").endswith("did you mean shakespeare_char?")
    Path("data/mine").mkdir(parents=True)
    Path("data/mine/prepare.py").touch()
    assert refused(run, dataset="mine") == "dataset 'mine' is not prepared yet: run `python data/mine/prepare.py`"
    Path("copy/val.bin").unlink()
    assert "copy/val.bin is missing: prepare the dataset again" in refused(run, dataset="copy")


def test_a_text_shorter_than_a_block(run: Run, used: Path):
    message = refused(run, dataset="copy", block_size=2000)
    assert (
        "val.bin is shorter than one block: 2,000 tokens, block_size 2000 needs 2,001; set --block_size=1999" in message
    )
    assert "train.bin" not in message


def test_ids_beyond_the_vocabulary(run: Run, used: Path):
    """Told by meta.json; and where nothing tells it, met while reading, before the device sees the id."""
    text = "abcdefghij" * 9
    splits = {split: [np.arange(10).repeat(9)] for split in ("train", "val")}
    write_dataset("wide", splits, Tokenizer.characters(text))
    message = refused(run, dataset="wide", resume=True, max_iters=9)
    assert message.startswith(
        "wide holds id 9, but the model's vocab_size is 4: use the dataset that the model was made"
    )
    Path("copy/meta.json").unlink()
    ids = np.fromfile("copy/train.bin", dtype="<u2")
    ids[:] = 4
    ids.tofile("copy/train.bin")
    with pytest.raises(
        InputError, match=r"copy/train.bin holds id 4 at token \d[\d,]*, but the model's vocab_size is 4"
    ):
        run(dataset="copy", out_dir="new")
    assert not Path("new/ckpt").exists()


# ---- folders and checkpoints


def test_an_out_dir_that_cannot_be_written(run: Run, used: Path):
    Path("file").write_text("mine")
    for name in ("file", "file/below"):
        message = refused(run, out_dir=name)
        assert message.startswith(f"out_dir={name} cannot be written (")
        assert message.endswith("give another --out_dir")


def test_nothing_to_resume(run: Run, used: Path):
    message = refused(run, out_dir="none", resume=True)
    assert message.startswith("out_dir=none holds no run to resume (no ckpt/step-*): check the path, or start anew")
    assert refused(run, out_dir="none", init_from="resume") == message
    Path("theirs").mkdir()
    Path("theirs/ckpt.pt").touch()
    assert "for nanoGPT's checkpoint there use --init_from=theirs/ckpt.pt" in refused(
        run, out_dir="theirs", resume=True
    )


def test_another_shape(run: Run, used: Path):
    message = refused(run, out_dir="out", resume=True, n_layer=3, n_embd=32)
    assert message.splitlines() == [
        f"{given}: the run in out has {has}, which cannot change; leave it out"
        for given, has in (("n_layer=3", "n_layer=1"), ("n_embd=32", "n_embd=16"))
    ]


def test_weights_of_another_shape(run: Run, used: Path):
    message = refused(run, out_dir="new", init_from="out", n_layer=3)
    assert message == "n_layer=3: out has n_layer=1, which cannot change; leave it out"


def test_resume_with_data_of_another_tokenizer(run: Run, used: Path):
    ids = np.arange(400) % 4
    write_dataset("other", {"train": [ids], "val": [ids]}, Tokenizer.characters("wxyz"))
    message = refused(run, out_dir="out", resume=True, max_iters=5, dataset="other")
    assert message.startswith(
        "dataset=other: its tokenizer is not that of out/ckpt/step-000003; use the run's own data"
    )


def test_ranks_that_found_different_checkpoints(run: Run, used: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(distributed.World, "all_reduce_sum", lambda world, values: values + 1)
    message = refused(run, out_dir="out", resume=True, max_iters=5)
    assert message == "out_dir=out does not hold the same checkpoints for all ranks: share it between the nodes"


def test_data_changed_in_place(run: Run, used: Path):
    ids = np.fromfile("copy/train.bin", "<u2")
    ids[7] = (ids[7] + 1) % 4
    ids.tofile("copy/train.bin")
    assert run(dataset="copy", out_dir="unaware", max_iters=1) == 0
    assert "copy/train.bin is not the file that meta.json describes" in refused(run, dataset="copy", verify_data=True)


def test_a_bad_id_in_mid_run_stops_the_run(run: Run, used: Path):
    """After the first update it is status 3, and what was saved before is there."""
    ids = np.fromfile("copy/train.bin", "<u2")
    ids[10_000:] = 9
    ids.tofile("copy/train.bin")
    Path("copy/meta.json").unlink()
    keys = {"dataset": "copy", "row_order": "random", "batch_size": 1, "eval_interval": 1, "eval_iters": 1}
    seeds = (
        seed for seed in range(100) if all(starts(seed, step) < 9_900 for step in range(3)) and starts(seed, 3) > 10_000
    )
    with pytest.raises(RunStopped, match=r"holds id 9 at token .*vocab_size is 4"):
        run(out_dir="broken", seed=next(seeds), **keys)
    assert [path.name for path in checkpoint.list_checkpoints(Path("broken"))] == ["step-000003", "step-000002"]


def starts(seed: int, index: int) -> int:
    """The token at which row `index` begins, read from the row itself."""
    ramp = np.arange(20_000, dtype=np.uint16)
    return int(Rows(ramp, 16, 20_000, seed)[index : index + 1][0][0, 0])


def test_a_damaged_checkpoint(run: Run, used: Path):
    Path("out/ckpt/step-000003/model.safetensors").write_bytes(b"no weights")
    assert refused(run, out_dir="out", resume=True) == "no checkpoint of out is whole: start anew without --resume"
    message = refused(run, out_dir="new", init_from="out/ckpt/step-000003")
    assert "out/ckpt/step-000003 is damaged: the SHA-256 of model.safetensors is not the manifest's" in message


def test_weights_that_are_none(run: Run, used: Path, monkeypatch: pytest.MonkeyPatch):
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    shape = dict.fromkeys(("n_layer", "n_head", "n_embd", "bias"), ...)
    assert "'nonsense' is not a file or folder here and was not downloaded" in refused(
        run, init_from="nonsense", **shape
    )
    Path("empty").mkdir()
    assert "empty has no config.json: give a folder with config.json" in refused(run, init_from="empty", **shape)
    message = refused(run, init_from="out", out_dir="new", block_size=17, **shape)
    assert message == (
        "init_from=out: block_size=17: this model's context ends at 16; leave --block_size out or give less"
    )


# ---- the process itself


def test_status_2_and_a_line_for_each_fault(letters: Path, tmp_path: Path):
    command = [sys.executable, ROOT / "train.py", *flags(dataset=letters, learning_rat=1, dtype="int8")]
    done = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    first, second = done.stderr.splitlines()
    assert first == "error: --dtype=int8: expected auto or float32 or bfloat16 or float16, got 'int8'"
    assert second == "error: --learning_rat=1: no such key; did you mean --learning_rate?"
    assert [*tmp_path.iterdir()] == []
