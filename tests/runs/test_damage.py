"""Files that are damaged or evil: none is loaded, none runs code or takes memory, and each is told in one line."""

import hashlib
import json
import os
import pickle
import random
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
from conftest import ROOT, environment, flags, save_as_nanogpt

from nanogpt import checkpoint
from nanogpt.data.write import write_dataset
from nanogpt.errors import InputError
from nanogpt.interop.huggingface import read_weights
from nanogpt.text.tokenizer import Tokenizer

NAMES = ("MANIFEST.json", "model.safetensors", "optimizer.safetensors", "state.json", "tokenizer.json")
HUGE = 2**40  # bytes, or ids: more than any machine of ours has


@pytest.fixture(scope="module")
def run_of_three(letters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The out_dir of a run with checkpoints at 8, 16 and 24, in which scaler and guard have a state."""
    out_dir = tmp_path_factory.mktemp("run")
    keys = {"max_iters": 24, "keep_every": 8, "dtype": "float16", "skip_spikes": 99, "dataset": letters}
    command = [sys.executable, ROOT / "train.py", *flags(out_dir=out_dir, resume="auto", **keys)]
    subprocess.run(command, env=environment(), check=True, stdout=subprocess.DEVNULL)
    return out_dir


@pytest.fixture
def out_dir(run_of_three: Path, tmp_path: Path) -> Path:
    """A copy, free to be spoilt."""
    return shutil.copytree(run_of_three, tmp_path / "out")


def sign(path: Path) -> None:
    """Make a manifest of what is there now, as `save` does."""
    hashes = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in NAMES[1:]}
    (path / "MANIFEST.json").write_text(json.dumps({"sha256": hashes}, indent=1))


def assert_falls_back(out_dir: Path, capsys: pytest.CaptureFixture[str], to: int = 16) -> None:
    """Those after step `to` are refused and named, and that one is loaded."""
    capsys.readouterr()
    for step in range(24, to, -8):
        with pytest.raises(InputError, match=f"step-{step:06d} is damaged: .*; use another checkpoint") as caught:
            checkpoint.load(out_dir / f"ckpt/step-{step:06d}")
        assert "\n" not in str(caught.value)
    found = checkpoint.load_latest(out_dir, True)
    assert found
    assert found.state["step"] == to
    told = capsys.readouterr().out.splitlines()
    assert [line.partition(" is damaged")[0] for line in told] == [
        f"warning: {out_dir}/ckpt/step-{step:06d}" for step in range(24, to, -8)
    ]


def test_a_whole_run_is_whole(out_dir: Path, capsys: pytest.CaptureFixture[str]):
    newest = out_dir / "ckpt/step-000024"
    assert sorted(path.name for path in newest.iterdir()) == [*NAMES]
    assert checkpoint.load(newest).state["scaler"]["scale"] > 0
    before = (newest / "MANIFEST.json").read_bytes()
    sign(newest)
    assert (newest / "MANIFEST.json").read_bytes() == before
    (newest / "notes.txt").write_text("what the manifest does not name is left alone")
    assert_falls_back(out_dir, capsys, to=24)


def test_300_flipped_bits(out_dir: Path, capsys: pytest.CaptureFixture[str]):
    chance = random.Random(1)
    for _ in range(300):
        path = out_dir / "ckpt/step-000024" / chance.choice(NAMES)
        whole = path.read_bytes()
        spoilt = bytearray(whole)
        spoilt[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        path.write_bytes(spoilt)
        assert_falls_back(out_dir, capsys)
        path.write_bytes(whole)
    assert_falls_back(out_dir, capsys, to=24)


def test_every_bit_of_a_manifest(out_dir: Path):
    path = out_dir / "ckpt/step-000024/MANIFEST.json"
    whole = path.read_bytes()
    for place in range(len(whole)):
        for bit in range(8):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            with pytest.raises(InputError, match="is damaged"):
                checkpoint.load(path.parent)


def test_60_truncations(out_dir: Path, capsys: pytest.CaptureFixture[str]):
    chance = random.Random(2)
    for _ in range(60):
        path = out_dir / "ckpt/step-000024" / chance.choice(NAMES)
        whole = path.read_bytes()
        os.truncate(path, chance.randrange(len(whole)))
        assert_falls_back(out_dir, capsys)
        path.write_bytes(whole)


def swap(path: Path, name: str) -> None:
    one, other = path / name, path.parent / "step-000016" / name
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)


@pytest.mark.parametrize("name", NAMES[:4])  # the tokenizer is the same in both
def test_files_of_other_checkpoints(out_dir: Path, capsys: pytest.CaptureFixture[str], name: str):
    swap(out_dir / "ckpt/step-000024", name)
    assert_falls_back(out_dir, capsys, to=8)


def replace(path: Path, make: Callable[[Path], Any]) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    make(path)


@pytest.mark.parametrize("name", ["", *NAMES])  # "": the checkpoint's own folder
@pytest.mark.parametrize(
    "make",
    [
        lambda path: None,
        lambda path: path.mkdir(),
        lambda path: path.touch(),
        os.mkfifo,  # which would be waited on forever
        lambda path: path.symlink_to("/dev/zero"),  # which never ends
        lambda path: path.symlink_to(path),
    ],
    ids=["missing", "folder", "empty", "pipe", "device", "loop"],
)
def test_no_such_file(out_dir: Path, capsys: pytest.CaptureFixture[str], name: str, make: Callable[[Path], Any]):
    replace(out_dir / "ckpt/step-000024" / name, make)
    if name or (out_dir / "ckpt/step-000024").exists():
        assert_falls_back(out_dir, capsys)
    else:  # no folder: nothing to name
        found = checkpoint.load_latest(out_dir, True)
        assert found
        assert found.state["step"] == 16


NO_OBJECT = [b"", b"{", b"null", b"[]", b"7", b'"x"', b"\xff\xfe{}", b"\0", b"[" * 10**6, b'{"a":' * 10**6, b"9" * 9999]


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("content", NO_OBJECT, ids=range(len(NO_OBJECT)))
def test_json_that_cannot_be_read(out_dir: Path, capsys: pytest.CaptureFixture[str], content: bytes, signed: bool):
    path = out_dir / "ckpt/step-000024"
    if signed:
        (path / "state.json").write_bytes(content)
        sign(path)
    else:
        (path / "MANIFEST.json").write_bytes(content)
    assert_falls_back(out_dir, capsys)


HASHES = [None, [], {}, "x", ["model.safetensors", "optimizer.safetensors", "state.json"]]
HASHES += [dict.fromkeys(NAMES[1:4], value) for value in (None, 7, [], "", "0" * 64)]


@pytest.mark.parametrize("hashes", HASHES, ids=range(len(HASHES)))
def test_manifests_without_hashes(out_dir: Path, capsys: pytest.CaptureFixture[str], hashes: Any):
    path = out_dir / "ckpt/step-000024/MANIFEST.json"
    path.write_text(json.dumps({"sha256": hashes}, indent=1))
    assert_falls_back(out_dir, capsys)


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "..", ".", "", "\0", "\ud800", "ckpt.pt", "x" * 999])
def test_a_manifest_names_nothing_else(out_dir: Path, capsys: pytest.CaptureFixture[str], name: str):
    path = out_dir / "ckpt/step-000024/MANIFEST.json"
    hashes = json.loads(path.read_text())["sha256"]
    path.write_text(json.dumps({"sha256": hashes | {name: hashlib.sha256(b"").hexdigest()}}, indent=1))
    (out_dir / "secret").touch()
    assert_falls_back(out_dir, capsys)


NEVER = [True, "1", [], {}, {"a": 1}, -1, 2**63, 10**400]
LIES = [(key, value) for key in ("step", "samples", "processes") for value in (*NEVER, None, 1.5, 1e999)]
LIES += [(key, value) for key in ("val_loss", "best_val_loss") for value in NEVER]
LIES += [("time_s", value) for value in (*NEVER, None, 1e999, float("nan"))]
LIES += [(key, value) for key in ("model", "config") for value in (None, 1, "x", [])]
LIES += [(key, value) for key in ("scaler", "guard") for value in (None, 1, "x", [], {"scale": 1.0}, {"norms": []})]
LIES += [("guard", {"skipped": 0.0, "norms": norms, "checked": 1}) for norms in (None, 1, ["x"], [[]], {})]
LIES += [("wandb_id", value) for value in (1, False, [], {})]
LIES += [(key, ...) for key in ("step", "samples", "time_s", "val_loss", "best_val_loss", "scaler", "model", "config")]


def test_a_state_of_other_kinds(out_dir: Path, capsys: pytest.CaptureFixture[str]):
    """The hashes are right; what they vouch for is not what a run can go on from."""
    path = out_dir / "ckpt/step-000024"
    state = json.loads((path / "state.json").read_text())
    for key, value in LIES:
        changed = {name: kept for name, kept in (state | {key: value}).items() if kept is not ...}
        (path / "state.json").write_text(json.dumps(changed))
        sign(path)
        with pytest.raises(InputError, match=f"state.json lacks {key}, or has another kind of it"):
            checkpoint.load(path)
        assert_falls_back(out_dir, capsys)


def test_a_state_of_the_version_before(out_dir: Path):
    path = out_dir / "ckpt/step-000024"
    state = json.loads((path / "state.json").read_text())
    for key in ("guard", "processes", "wandb_id"):
        state.pop(key, None)
    (path / "state.json").write_text(json.dumps(state | {"val_loss": float("nan"), "more": [1]}))
    sign(path)
    found = checkpoint.load(path).state
    assert (found["guard"], found["processes"], found["wandb_id"], found["val_loss"]) == ({}, 1, None, None)


def test_the_best_is_not_a_damaged_one(out_dir: Path):
    paths = checkpoint.list_checkpoints(out_dir)
    best = checkpoint.best(paths)
    others = [path for path in paths if path != best]
    for path, lie in zip(others, (0.0, "x"), strict=True):
        state = json.loads((path / "state.json").read_text())
        (path / "state.json").write_text(json.dumps(state | {"val_loss": lie}))
    assert checkpoint.best(paths) == checkpoint.find(out_dir) == best
    for path in paths:
        (path / "MANIFEST.json").unlink()
    assert checkpoint.best(paths) is None


def test_sizes_that_no_model_has(out_dir: Path, letters: Path, monkeypatch: pytest.MonkeyPatch):
    import train

    path = out_dir / "ckpt/step-000024"
    state = json.loads((path / "state.json").read_text())
    monkeypatch.setattr(sys, "argv", ["train.py", f"--out_dir={out_dir}", "--resume=True", "--device=cpu"])
    for older in (8, 16):
        shutil.rmtree(out_dir / f"ckpt/step-{older:06d}")
    sizes: list[dict[str, Any]] = [{"n_layer": HUGE}, {"n_embd": HUGE}, {"vocab_size": HUGE}, {"n_embd": 32}]
    sizes += [{"n_head": 0}, {"n_embd": "16"}, {"n_layers": 1}, {"arch": "new"}, {"norm_eps": None}, {"n_kv_head": -1}]
    for wrong in sizes:
        (path / "state.json").write_text(json.dumps(state | {"model": state["model"] | wrong}))
        sign(path)
        with pytest.raises(InputError, match=re.escape(f"{path}/state.json: ")) as caught:
            train.main()
        assert "\n" not in str(caught.value)


# ---- evil files, read in a process of their own that tells how much memory they took

CHILD = """
import json, sys
from pathlib import Path
from nanogpt import InputError, checkpoint, data, pretrained
from nanogpt.tokenizer import Tokenizer

def dataset(folder):
    found = data.open_dataset(folder, block_size=8)
    return found.tokenizer

READ = {"ckpt.pt": pretrained.read_weights, "config.json": pretrained.read_weights, "meta.pkl": Tokenizer.load}
READ |= {"tokenizer.json": Tokenizer.load, "meta.json": dataset, "checkpoint": checkpoint.load}
for folder in map(Path, sys.argv[1:]):
    try:
        told = f"it was read: {READ[folder.name.split()[0].strip(',')](folder)}"[:300]
    except InputError as error:
        told = str(error)
    except BaseException as error:
        told = f"a traceback: {error!r}"[:300]
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))  # the most so far, in kB
    print(json.dumps([told, int(line.split()[1]) / 1024]))
"""


class Runs:
    """A pickle of it makes a file when it is read."""

    def __init__(self, sentinel: Path):
        self.sentinel = sentinel

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.sentinel),)


class Allocates:
    def __reduce__(self) -> Any:
        return bytearray, (2**30,)


ARGS = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 8, "vocab_size": 8, "bias": False, "dropout": 0.0}


def ckpt(folder: Path, old: bool = False, shape: tuple[int, ...] = (1000,), **content: Any) -> Path:
    content = {"model": {"transformer.wte.weight": torch.zeros(1000)}, "model_args": ARGS} | content
    torch.save(content, folder / "ckpt.pt", _use_new_zipfile_serialization=not old)
    return folder / "ckpt.pt"


def declares(path: Path) -> None:
    """Have the storage of 1000 numbers count itself as HUGE ones."""
    counts = b"M" + struct.pack("<H", 1000), b"\x8a\x06" + struct.pack("<Q", HUGE)[:6]
    if not zipfile.is_zipfile(path):
        path.write_bytes(path.read_bytes().replace(*counts))
        return
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content.replace(*counts) if name.endswith("data.pkl") else content)


def bomb(path: Path) -> None:
    """300 MB of zeros behind the pickle, packed into 300 kB."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in entries.items():
            archive.writestr(name, content + bytes(3 * 10**8) if name.endswith("data.pkl") else content)


def meta(folder: Path, **changes: Any) -> None:
    ids = torch.arange(100).numpy() % 4
    write_dataset(folder, {"train": [ids], "val": [ids]}, Tokenizer.characters("abcd"))
    found = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(found | changes))


def checkpoint_with(folder: Path, name: str, content: bytes) -> None:
    for file in NAMES[1:]:
        (folder / file).write_bytes(content if file == name else b"")
    sign(folder)


def tensors(header: dict[str, Any], length: int | None = None) -> bytes:
    content = json.dumps(header).encode()
    return struct.pack("<Q", len(content) if length is None else length) + content + bytes(100)


def huggingface(folder: Path, **sizes: int) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"} | sizes))
    header = {"wte.weight": {"dtype": "F32", "shape": [25], "data_offsets": [0, 100]}}
    (folder / "model.safetensors").write_bytes(tensors(header))


VIEW = torch.zeros(1).expand(HUGE, 1000)
SPLITS = {"val": {"tokens": 10**18, "sha256": "0" * 64}}
PANIC = {"type": "BPE", "continuing_subword_prefix": "long", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
COUNT = {"w": {"dtype": "F32", "shape": [HUGE], "data_offsets": [0, 4 * HUGE]}}
# What the folder's name begins with is read; (how the folder is filled, what is told)
EVIL: dict[str, tuple[Callable[[Path], Any], str]] = {
    "ckpt.pt with code": (lambda f: ckpt(f, config=Runs(f / "ran")), r"it asks to run posix\.mkdir"),
    "ckpt.pt with code, old": (lambda f: ckpt(f, old=True, config=Runs(f / "ran")), r"it asks to run posix\.mkdir"),
    "ckpt.pt with a view": (lambda f: ckpt(f, model={"w": VIEW}), "states tensors larger than itself"),
    "ckpt.pt with a view, old": (lambda f: ckpt(f, True, model={"w": VIEW}), "states tensors larger than itself"),
    "ckpt.pt that declares": (lambda f: declares(ckpt(f)), r"ckpt\.pt was not read"),
    "ckpt.pt that declares, old": (lambda f: declares(ckpt(f, old=True)), r"ckpt\.pt was not read"),
    "ckpt.pt that swells": (lambda f: bomb(ckpt(f)), "it is packed as torch.save never does"),
    "ckpt.pt that allocates": (lambda f: ckpt(f, config=Allocates()), r"it asks to run (__builtin__|builtins)\.bytea"),
    "ckpt.pt of many layers": (lambda f: ckpt(f, model_args=ARGS | {"n_layer": HUGE}), "impossible sizes .n_layer"),
    "ckpt.pt with odd names": (lambda f: ckpt(f, model={7: torch.zeros(1)}), "has no weights under 'model'"),
    "ckpt.pt with odd sizes": (
        lambda f: ckpt(f, model_args=ARGS | {"dropout": "x"}),
        "dropout or bias in 'model_args'",
    ),
    "ckpt.pt as a pipe": (lambda f: os.mkfifo(f / "ckpt.pt"), "is not a plain file"),
    "config.json of many layers": (lambda f: huggingface(f, n_layer=HUGE), "impossible sizes .n_layer"),
    "config.json of wide layers": (lambda f: huggingface(f, n_embd=12 * HUGE), "is no model of the sizes it states"),
    "config.json, nested": (lambda f: (f / "config.json").write_bytes(b'{"a":' * 10**6), "nested too deeply"),
    "meta.pkl with code": (lambda f: (f / "meta.pkl").write_bytes(pickle.dumps(Runs(f / "ran"))), r"run posix\.mkdir"),
    "meta.pkl that allocates": (
        lambda f: (f / "meta.pkl").write_bytes(b"\x80\x04K\x01r" + struct.pack("<I", 2**27) + b"."),
        r"meta\.pkl was not read",
    ),
    "meta.pkl that counts": (
        lambda f: (f / "meta.pkl").write_bytes(b"\x80\x05\x96" + struct.pack("<Q", 2**31) + b"."),
        r"meta\.pkl was not read",
    ),
    "meta.pkl, huge": (lambda f: (f / "meta.pkl").write_bytes(bytes(2**24 + 1)), "is larger than 16,777,216 bytes"),
    "meta.pkl of floats": (lambda f: (f / "meta.pkl").write_bytes(pickle.dumps({"stoi": {"a": 0.0}})), "was not read"),
    "meta.pkl of nothing": (lambda f: (f / "meta.pkl").write_bytes(pickle.dumps({"stoi": {}})), "was not read"),
    "tokenizer.json, nested": (
        lambda f: (f / "tokenizer.json").write_bytes(b'{"version":"1.0","model":' + b'{"a":' * 10**6),
        "recursion limit exceeded",
    ),
    "tokenizer.json, huge": (
        lambda f: (f / "tokenizer.json").touch() or os.truncate(f / "tokenizer.json", 10**10),
        "is larger than 67,108,864 bytes",
    ),
    "tokenizer.json that panics": (
        lambda f: (f / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": PANIC})),
        "tokenizer.json is damaged .range end",
    ),
    "meta.json of many tokens": (
        lambda f: meta(f, splits=SPLITS),
        "holds 100 tokens where meta.json counts 1,000,000,",
    ),
    "meta.json of many ids": (lambda f: meta(f, vocab_size=10**18, dtype="uint32"), "its numbers do not fit together"),
    "meta.json, nested": (lambda f: meta(f) or (f / "meta.json").write_bytes(b"[" * 10**6), "nested too deeply"),
    "meta.json, huge": (lambda f: meta(f) or os.truncate(f / "meta.json", 10**10), "is larger than 16,777,216 bytes"),
    "meta.json of folders": (lambda f: meta(f) or replace(f / "val.bin", Path.mkdir), "val.bin is unreadable: prepare"),
    "checkpoint of huge MANIFEST.json": (
        lambda f: checkpoint_with(f, "", b"") or os.truncate(f / "MANIFEST.json", 10**10),
        "MANIFEST.json is missing or unreadable",
    ),
    "checkpoint of huge state.json": (
        lambda f: checkpoint_with(f, "state.json", bytes(2**24 + 1)),
        "state.json is larger than 16,777,216 bytes",
    ),
}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, float]]:
    """What reading each of EVIL told, and how many MB it took by then at most; {"": before the first}."""
    home = tmp_path_factory.mktemp("evil")
    for name, (make, _) in EVIL.items():
        (home / name).mkdir()
        make(home / name)
    (home / "meta.json as it should be").mkdir()
    meta(home / "meta.json as it should be")
    folders = [home / "meta.json as it should be", *(home / name for name in EVIL)]
    command = [sys.executable, "-c", CHILD, *map(str, folders)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [*home.glob("*/ran")] == []
    return dict(zip(["", *EVIL], lines, strict=True))


@pytest.mark.parametrize("name", EVIL)
def test_evil_files(told: dict[str, tuple[str, float]], name: str):
    message, _ = told[name]
    assert re.search(EVIL[name][1], message), message
    assert "\n" not in message


def test_evil_files_take_no_memory(told: dict[str, tuple[str, float]]):
    assert told[""][0].startswith("it was read")
    most = [megabytes for _, megabytes in told.values()]
    rises = {name: after - before for name, before, after in zip(EVIL, most, most[1:], strict=False)}
    assert max(rises.values()) < 150, rises


@pytest.mark.parametrize(
    "header",
    [
        COUNT,
        {"w": COUNT["w"] | {"data_offsets": [0, 100]}},
        {"w": {"dtype": "F32", "shape": [25], "data_offsets": [0, 4]}},
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("length", [None, 2**60, 2**63])
def test_tensors_that_are_not_there(
    out_dir: Path, capsys: pytest.CaptureFixture[str], name: str, header: dict[str, Any], length: int | None
):
    path = out_dir / "ckpt/step-000024"
    (path / name).write_bytes(tensors(header, length))
    sign(path)
    assert_falls_back(out_dir, capsys)


@pytest.mark.parametrize("old", [False, True])
def test_what_nanogpt_saves_is_read(foreign: Any, tmp_path: Path, old: bool):
    """The guards against evil files let pass all that its train.py writes, and what its forks may add."""
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
    assert torch.equal(weights.tensors["tokens.weight"], foreign.transformer.wte.weight)
