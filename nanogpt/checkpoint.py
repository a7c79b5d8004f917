"""Checkpoints: folders `out_dir/ckpt/step-NNNNNN` that are whole or not there, read without pickle.

Each holds `model.safetensors`, `optimizer.safetensors`, `state.json`, `tokenizer.json` where the data has one, and
`MANIFEST.json` with the SHA-256 of each file, written last. The hashes find damage, not malice.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nanogpt import InputError, RunStopped
from nanogpt.distributed import say

if TYPE_CHECKING:
    from nanogpt.tokenizer import Tokenizer

FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
MANIFEST = "MANIFEST.json"


@dataclass
class Checkpoint:
    """A loaded checkpoint: tensors by name on the CPU, and what `state.json` says."""

    path: Path
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def is_run(out_dir: Path) -> bool:
    """Whether a training run has written into `out_dir`."""
    return (out_dir / "metrics.jsonl").exists() or bool(steps(out_dir))


def is_ours(source: Path) -> bool:
    """Whether `source` is a run's folder or one of its checkpoints."""
    return (source / MANIFEST).exists() or bool(steps(source))


def steps(out_dir: Path) -> list[Path]:
    """The checkpoints of a run, the newest first."""
    found = [path for path in (out_dir / "ckpt").glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def to_resume(out_dir: Path, resume: bool | str) -> Checkpoint | None:
    """The newest whole checkpoint that a run started with `resume` goes on from; None for a new run. A damaged one that
    is passed over is named in a printed line. Raises InputError where there is nothing to resume, or none is whole."""
    if resume is False or (resume == "auto" and not steps(out_dir)):
        return None
    if not steps(out_dir):
        theirs = f"; for nanoGPT's checkpoint there use --init_from={out_dir / 'ckpt.pt'}"
        hint = theirs if (out_dir / "ckpt.pt").exists() else ", or start anew without --resume"
        raise InputError(f"out_dir={out_dir} holds no run to resume (no ckpt/step-*): check the path{hint}")
    for path in steps(out_dir):
        try:
            return load(path)
        except InputError as error:
            say(f"warning: {error}; trying the one before it")
    raise InputError(f"no checkpoint of {out_dir} is whole: start anew without --resume")


def make_room(out_dir: Path) -> Path | None:
    """Create `out_dir` for a new run. A run that is there already moves to `out_dir.1` (`.2` …), which is returned.

    Raises InputError where the folder cannot be written.
    """
    moved = None
    if is_run(out_dir) and not out_dir.name:
        raise InputError(f"out_dir={out_dir} holds a run that cannot move aside from here: give another --out_dir")
    try:
        if is_run(out_dir):
            taken = (out_dir.with_name(f"{out_dir.name}.{n}") for n in range(1, 10**6))
            moved = out_dir.rename(next(path for path in taken if not path.exists()))
        out_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out_dir):
            pass
    except OSError as error:
        raise InputError(f"out_dir={out_dir} cannot be written ({error.strerror}): give another --out_dir") from error
    return moved


def save(
    out_dir: Path,
    model: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    state: dict[str, Any],
    tokenizer: "Tokenizer | None",
) -> Path:
    """Write `ckpt/step-NNNNNN` for `state["step"]`: aside, synced to disk, then renamed. Returns its path.

    Raises RunStopped where the disk does not take it; what was there before stays.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    final = out_dir / "ckpt" / f"step-{state['step']:06d}"
    partial = final.with_name(f".{final.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file({name: t.detach().cpu().contiguous() for name, t in model.items()}, partial / "model.safetensors")
        save_file({name: t.cpu().contiguous() for name, t in optimizer.items()}, partial / "optimizer.safetensors")
        (partial / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save(partial)
        hashes = {path.name: _sync_and_hash(path) for path in sorted(partial.iterdir())}
        (partial / MANIFEST).write_text(json.dumps({"sha256": hashes}, indent=1), encoding="utf-8")
        _sync_and_hash(partial / MANIFEST)
        _sync_folder(partial)
        old = final.with_name(f".{final.name}.old.partial")
        if final.exists():  # the same step again, evaluated after a resume
            final.rename(old)
        partial.rename(final)
        shutil.rmtree(old, ignore_errors=True)
        _sync_folder(final.parent)
    except (OSError, SafetensorError) as error:  # the latter stands for any fault of the disk
        shutil.rmtree(partial, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise RunStopped(
            f"the checkpoint {final} could not be written ({reason}); earlier ones are untouched: "
            f"make room or mend {out_dir}, then go on with --resume=True"
        ) from error
    return final


def prune(out_dir: Path, keep_every: int) -> None:
    """Delete all checkpoints but the newest two, the best, and those at multiples of `keep_every` (0: none of them)."""
    newest_first = steps(out_dir)
    for path in (out_dir / "ckpt").glob(".step-*.partial"):  # left by a kill
        shutil.rmtree(path, ignore_errors=True)
    for path in newest_first[2:]:
        keep = keep_every and int(path.name[5:]) % keep_every == 0
        if not keep and path != best(newest_first):
            shutil.rmtree(path, ignore_errors=True)


def best(paths: list[Path]) -> Path | None:
    """The checkpoint with the lowest validation loss; None where none was evaluated."""
    losses = [(loss, path) for path in paths if (loss := _read_json(path / "state.json").get("val_loss")) is not None]
    return min(losses, key=lambda pair: pair[0])[1] if losses else None


def find(source: str | Path, which: str = "best") -> Path:
    """The folder of a run's "best" or "latest" checkpoint, or of the step that `which` or `source` itself names.

    Raises InputError where there is none.
    """
    source = Path(source)
    if (source / MANIFEST).exists():
        return source
    paths = steps(source)
    if which not in ("best", "latest"):
        named = [path for path in (Path(which), source / "ckpt" / which) if (path / MANIFEST).exists()]
        if not named:
            raise InputError(f"checkpoint={which}: no such checkpoint in {source}; it has {_names(paths)}")
        return named[0]
    if not paths:
        raise InputError(f"{source} holds no checkpoint (no ckpt/step-*): train one with --out_dir={source} first")
    return (best(paths) if which == "best" else None) or paths[0]


def load(path: Path, with_optimizer: bool = True) -> Checkpoint:
    """Read a checkpoint folder and compare each file with the manifest. Raises InputError for a damaged one."""
    from safetensors.torch import load_file

    hashes = _read_json(path / MANIFEST).get("sha256")
    if not isinstance(hashes, dict) or not set(FILES) <= set(hashes):
        raise InputError(f"{path} is damaged: its {MANIFEST} is missing or unreadable; use another checkpoint")
    wanted = set(hashes) - (set() if with_optimizer else {"optimizer.safetensors"})
    for name in sorted(wanted):
        try:
            with (path / Path(name).name).open("rb") as content:
                found = hashlib.file_digest(content, "sha256").hexdigest()
        except OSError as error:
            raise InputError(f"{path} is damaged: {name} {error.strerror}; use another checkpoint") from error
        if found != hashes[name]:
            raise InputError(f"{path} is damaged: the SHA-256 of {name} is not the manifest's; use another checkpoint")
    # Clones, because the file's memory is mapped and not aligned as torch aligns its own.
    model, optimizer = (
        {key: tensor.clone() for key, tensor in load_file(path / name).items()} if name in wanted else {}
        for name in FILES[:2]
    )
    return Checkpoint(path, model, optimizer, _read_json(path / "state.json"))


def _names(paths: list[Path]) -> str:
    return ", ".join(path.name for path in paths) or "none"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _sync_and_hash(path: Path) -> str:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(path: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
