"""Malicious files of every kind: each is refused in one line, and takes neither memory nor time."""

import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import AtStep, Run, environment, steps
from random_models import save_as_nanogpt

from nanogpt.data.write import write_dataset
from nanogpt.errors import RunStopped
from nanogpt.interop.huggingface import read_weights
from nanogpt.text.tokenizer import Tokenizer

HUGE = 2**40  # bytes, or ids: more than any machine of ours has

# In a process of its own: reads each folder as the beginning of its name says, and prints what comes of it.
CHILD = """
import json, sys
from pathlib import Path
from nanogpt import checkpoint
from nanogpt.data.dataset import open_dataset
from nanogpt.errors import InputError
from nanogpt.interop.huggingface import read_weights
from nanogpt.text.tokenizer import Tokenizer

READ = {"ckpt.pt": read_weights, "config.json": read_weights, "meta.pkl": Tokenizer.load}
READ |= {"tokenizer.json": Tokenizer.load, "checkpoint": checkpoint.load}
READ |= {"meta.json": lambda folder: open_dataset(folder, block_size=8).tokenizer}
for folder in map(Path, sys.argv[1:]):
    try:
        result = f"it was read: {READ[folder.name.split()[0].strip(',')](folder)}"[:300]
    except InputError as error:
        result = str(error)
    except BaseException as error:
        result = f"a traceback: {error!r}"[:300]
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))  # peak memory in kB
    print(json.dumps([result, int(line.split()[1]) / 1024]))
"""
ARGS = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 8, "vocab_size": 8, "bias": False, "dropout": 0.0}


class Allocates:
    def __reduce__(self) -> Any:
        return bytearray, (2**30,)


def write_ckpt(folder: Path, old: bool = False, **content: Any) -> Path:
    content = {"model": {"transformer.wte.weight": torch.zeros(1000)}, "model_args": ARGS} | content
    torch.save(content, folder / "ckpt.pt", _use_new_zipfile_serialization=not old)
    return folder / "ckpt.pt"


def edit_pickle(path: Path, edit: Callable[[bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    if not zipfile.is_zipfile(path):
        path.write_bytes(edit(path.read_bytes()))
        return
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression, compresslevel=1) as archive:
        for name, content in entries.items():
            archive.writestr(name, edit(content) if name.endswith("data.pkl") else content)


def declare_huge_storage(content: bytes) -> bytes:
    """1000 numbers become HUGE ones."""
    return content.replace(b"M" + struct.pack("<H", 1000), b"\x8a\x06" + struct.pack("<Q", HUGE)[:6])


def write_meta(folder: Path, **changes: Any) -> None:
    ids = torch.arange(100).numpy() % 4
    write_dataset(folder, {"train": [ids], "val": [ids]}, Tokenizer.characters("abcd"))
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | changes))


def write_huggingface(folder: Path, **sizes: int) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"} | sizes))
    header = json.dumps({"wte.weight": {"dtype": "F32", "shape": [25], "data_offsets": [0, 100]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(100))


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def truncate(path: Path, size: int) -> None:
    path.touch()
    os.truncate(path, size)


VIEW = torch.zeros(1).expand(HUGE, 1000)
SPLITS = {"val": {"tokens": 10**18, "sha256": "0" * 64}}
PANIC = {"type": "BPE", "continuing_subword_prefix": "long", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
TOO_LARGE = "is larger than 16,777,216 bytes"
# The folder's name begins with what is read; (how the folder is filled, the message).
EVIL: dict[str, tuple[Callable[[Path], Any], str]] = {
    "ckpt.pt with a view, old": (lambda f: write_ckpt(f, True, model={"w": VIEW}), "states tensors larger than"),
    "ckpt.pt that declares": (lambda f: edit_pickle(write_ckpt(f), declare_huge_storage), r"ckpt\.pt"),
    "ckpt.pt that declares, old": (lambda f: edit_pickle(write_ckpt(f, True), declare_huge_storage), r"ckpt\.pt"),
    "ckpt.pt that swells": (
        lambda f: edit_pickle(write_ckpt(f), lambda content: content + bytes(2 * 10**8), zipfile.ZIP_DEFLATED),
        "it is compressed",
    ),
    "ckpt.pt that allocates": (
        lambda f: write_ckpt(f, config=Allocates()),
        r"it would run (__builtin__|builtins)\.bytea",
    ),
    "ckpt.pt as a pipe": (lambda f: os.mkfifo(f / "ckpt.pt"), "is not a regular file"),
    "config.json of wide layers": (lambda f: write_huggingface(f, n_embd=12 * HUGE), r"evil\d*/config"),
    "config.json, nested": (lambda f: (f / "config.json").write_bytes(b'{"a":' * 10**6), "nested too deeply"),
    "meta.pkl that allocates": (
        lambda f: (f / "meta.pkl").write_bytes(b"\x80\x04K\x01r" + struct.pack("<I", 2**27) + b"."),
        r"meta\.pkl was not read",
    ),
    "meta.pkl that counts": (
        lambda f: (f / "meta.pkl").write_bytes(b"\x80\x05\x96" + struct.pack("<Q", 2**31) + b"."),
        r"meta\.pkl was not read",
    ),
    "meta.pkl, huge": (lambda f: truncate(f / "meta.pkl", 2**24 + 1), TOO_LARGE),
    "meta.pkl, nested": (
        lambda f: (f / "meta.pkl").write_bytes(pickle.dumps({"stoi": {}})[:-1] * 10**5),
        "was not read",
    ),
    "tokenizer.json, nested": (
        lambda f: (f / "tokenizer.json").write_bytes(b'{"version":"1.0","model":' + b'{"a":' * 10**6),
        "recursion limit exceeded",
    ),
    "tokenizer.json, huge": (lambda f: truncate(f / "tokenizer.json", 10**10), "is larger than 67,108,864 bytes"),
    "tokenizer.json that panics": (
        lambda f: (f / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": PANIC})),
        "tokenizer.json is damaged",
    ),
    "meta.json of many tokens": (lambda f: write_meta(f, splits=SPLITS), "where meta.json counts 1,000,000,"),
    "meta.json of many ids": (lambda f: write_meta(f, vocab_size=10**18, dtype="uint32"), "vocab_size: must be at"),
    "meta.json, nested": (
        lambda f: write_meta(f) or (f / "meta.json").write_bytes(b"[" * 10**6),
        "nested too deeply",
    ),
    "meta.json, huge": (lambda f: write_meta(f) or truncate(f / "meta.json", 10**10), TOO_LARGE),
    "meta.json of folders": (lambda f: write_meta(f) or replace_by_folder(f / "val.bin"), "val.bin is unreadable"),
    "checkpoint of huge MANIFEST.json": (lambda f: truncate(f / "MANIFEST.json", 10**10), "is missing or unreadable"),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, float]]:
    """For each of EVIL the outcome, and the peak memory in MB so far; {"": of an intact dataset, the first}."""
    home = tmp_path_factory.mktemp("evil")
    (home / "meta.json, intact").mkdir()
    write_meta(home / "meta.json, intact")
    for name, (make, _) in EVIL.items():
        (home / name).mkdir()
        make(home / name)
    folders = [home / "meta.json, intact", *(home / name for name in EVIL)]
    command = [sys.executable, "-c", CHILD, *map(str, folders)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return dict(zip(["", *EVIL], lines, strict=True))


@pytest.mark.parametrize("name", EVIL)
def test_malicious_files_are_refused_in_a_line(results: dict[str, tuple[str, float]], name: str):
    message, _ = results[name]
    assert re.search(EVIL[name][1], message), message
    assert "\n" not in message
    assert "traceback" not in message


def test_malicious_files_take_no_memory(results: dict[str, tuple[str, float]]):
    assert results[""][0].startswith("it was read")
    peaks = [megabytes for _, megabytes in results.values()]
    rises = {name: after - before for name, before, after in zip(EVIL, peaks, peaks[1:], strict=False)}
    assert max(rises.values()) < 150, rises


@pytest.mark.parametrize("old", [False, True])
def test_all_that_nanogpt_may_save_is_read(foreign: Any, tmp_path: Path, old: bool):
    """The guards let pass what its train.py writes, and what its forks may add."""
    save_as_nanogpt(foreign, tmp_path / "ckpt.pt")
    content = torch.load(tmp_path / "ckpt.pt")
    network = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(3)).sum().backward()
    optimizer.step()
    content |= {"optimizer": optimizer.state_dict(), "config": {"dataset": "x", "decay_lr": True, "min_lr": 6e-5}}
    content |= {"dtype": torch.float16, "device": torch.device("cuda"), "network": network.state_dict()}
    content |= {"shape": torch.Size([3]), "ema": list(network.parameters())}
    torch.save(content, tmp_path / "ckpt.pt", _use_new_zipfile_serialization=not old)
    weights = read_weights(tmp_path / "ckpt.pt")
    assert weights.train_config["dataset"] == "x"
    assert torch.equal(weights.tensors["token_embedding.weight"], foreign.transformer.wte.weight)


def test_data_that_is_cut_in_mid_run_stops_the_run(run: Run, letters: Path, at_step: AtStep):
    """Memory beyond the end of a mapped file kills a process that reads it."""
    shutil.copytree(letters, "data")
    at_step(10, lambda: os.truncate("data/train.bin", 100))
    with pytest.raises(RunStopped, match=r"data/train.bin or its mask was cut short"):
        run(dataset="data", out_dir="out")
    assert steps("out") == [8]
