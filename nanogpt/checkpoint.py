"""Checkpoints: folders `out_dir/ckpt/step-NNNNNN` that are whole or not there, read without pickle.

Each holds `model.safetensors`, `optimizer.safetensors`, `state.json`, the tokenizer where the data has one, and
`MANIFEST.json` with the SHA-256 of each file, written last. The hashes find damage, not malice; a manifest counts only
if it is exactly what `save` writes, so that a flipped bit in it is found too. Other files there are not looked at.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nanogpt.console import format_bytes, print0
from nanogpt.errors import InputError, RunStopped
from nanogpt.files import matches_schema, read_json, regular_file_size, sync_and_hash, sync_directory

if TYPE_CHECKING:
    from nanogpt.text.tokenizer import Tokenizer

FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
OPTIONAL = ("tokenizer.json", "chat_template.jinja")
MANIFEST = "MANIFEST.json"
STEP = r"step-\d{6,}"
RETRY_S = 60.0  # until a save that failed is tried again
# What is in state.json, and of which kind (nanogpt/files.py); OLDER is what earlier versions did not write.
SCALER = {
    "scale": float,
    "growth_factor": float,
    "backoff_factor": float,
    "growth_interval": int,
    "_growth_tracker": int,
}
STATE = {
    "step": int,
    "samples": int,
    "time_s": float,
    "val_loss": (float, None),
    "best_val_loss": (float, None),
    "scaler": ({}, SCALER),  # {}: none was in use
    "guard": ({}, {"skipped": float, "norms": [(float, None)], "checked": int}),
    "processes": int,
    "wandb_id": (str, None),
    "model": dict,
    "config": dict,
}
OLDER: dict[str, Any] = {"processes": 1, "wandb_id": None, "guard": {}}


@dataclass
class Checkpoint:
    """A loaded checkpoint: tensors by name on the CPU, and what `state.json` says."""

    path: Path
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def is_checkpoint(source: Path) -> bool:
    """Whether `source` is a run's folder or one of its checkpoints."""
    return os.path.exists(source / MANIFEST) or bool(list_checkpoints(source))


def list_checkpoints(out_dir: Path) -> list[Path]:
    """The checkpoints of a run, the newest first."""
    found = [path for path in _listed(out_dir, "step-*") if re.fullmatch(STEP, path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def load_latest(out_dir: Path, resume: bool | str) -> Checkpoint | None:
    """The newest whole checkpoint that a run started with `resume` goes on from; None for a new run. A damaged one that
    is passed over is named in a printed line. Raises InputError where there is nothing to resume, or none is whole."""
    if resume is False:
        return None
    for old in _listed(out_dir, ".step-*.old.partial"):  # a kill came between the two renames of `save`
        final = old.with_name(old.name.removeprefix(".").removesuffix(".old.partial"))
        if not final.exists():
            with contextlib.suppress(OSError):  # another rank was first, or the folder cannot be written
                old.rename(final)
    if resume == "auto" and not list_checkpoints(out_dir):
        return None
    if not list_checkpoints(out_dir):
        theirs = f"; for nanoGPT's checkpoint there use --init_from={out_dir / 'ckpt.pt'}"
        hint = theirs if os.path.exists(out_dir / "ckpt.pt") else ", or start anew without --resume"
        raise InputError(f"out_dir={out_dir} holds no run to resume (no ckpt/step-*): check the path{hint}")
    for path in list_checkpoints(out_dir):
        try:
            return load(path)
        except InputError as error:
            print0(f"warning: {error}; trying the one before it")
    raise InputError(f"no checkpoint of {out_dir} is whole: start anew without --resume")


class Writer:
    """Saves a run's checkpoints in a thread beside the training, one at a time, and prunes them.

    minutes: a save is overdue when the last was longer ago; 0: never.
    """

    def __init__(self, out_dir: Path, keep_every: int, minutes: float, tokenizer: "Tokenizer | None"):
        self.out_dir, self.keep_every, self.tokenizer = out_dir, keep_every, tokenizer
        self.every_s = 60 * minutes or float("inf")
        self._due_at = time.monotonic() + self.every_s
        self._fault: str | None = None
        self._thread = threading.Thread()
        self._copies: dict[tuple[int, str], Tensor] = {}  # kept: memory that is new costs more than copying into it

    def save(self, model: dict[str, Tensor], optimizer: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Returns once the save before this one has ended and the state is copied to the host's memory."""
        self._join()
        self.tell_fault()
        self._due_at = time.monotonic() + self.every_s
        copies = [self._copy(number, part) for number, part in enumerate((model, optimizer))]
        if any(t.is_cuda for part in (model, optimizer) for t in part.values()):
            torch.cuda.synchronize()
        # A daemon, so that a second Ctrl-C need not wait for it: what it leaves half written is never read.
        self._thread = threading.Thread(target=self._write, args=(*copies, state), daemon=True)
        self._thread.start()

    def _copy(self, number: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for name, t in tensors.items():
            if (number, name) not in self._copies:
                self._copies[number, name] = torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda)
            self._copies[number, name].copy_(t.detach(), non_blocking=t.is_cuda)
        return {name: self._copies[number, name] for name in tensors}

    def overdue(self) -> bool:
        """Whether a save is due by the clock, one that failed being due again soon. Says so when it has failed."""
        if not self._thread.is_alive():
            self.tell_fault()
        return time.monotonic() > self._due_at

    def tell_fault(self) -> None:
        """Say that the last save has failed, if it has, and that it is due again soon."""
        if self._fault:
            print0(f"warning: {self._fault}; trying again in {RETRY_S:.0f} s")
            self._fault, self._due_at = None, time.monotonic() + RETRY_S

    def finish(self) -> None:
        """Wait for the last save. Raises RunStopped where it failed."""
        self._join()
        if self._fault:
            raise RunStopped(f"{self._fault}; then go on with --resume=True")

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is not KeyboardInterrupt or not list_checkpoints(self.out_dir):  # the first one is worth a wait
            self._join()

    def _join(self) -> None:
        if self._thread.ident is not None:
            self._thread.join()

    def _write(self, model: dict[str, Tensor], optimizer: dict[str, Tensor], state: dict[str, Any]) -> None:
        try:
            save(self.out_dir, model, optimizer, state, self.tokenizer)
            prune(self.out_dir, self.keep_every)
        except Exception as error:  # whatever it is, the training goes on, and says so
            self._fault = str(error) or repr(error)


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
        sync_directory(out_dir)  # the first time `ckpt` is new in it
        needed = sum(t.nbytes for part in (model, optimizer) for t in part.values())
        if (free := shutil.disk_usage(partial).free) < needed:
            raise OSError(errno.ENOSPC, f"{format_bytes(needed)} are needed, {format_bytes(free)} are free")
        for name, part in zip(FILES, (model, optimizer), strict=False):
            save_file({key: t.detach().cpu().contiguous() for key, t in part.items()}, partial / name)
        (partial / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save(partial)
        hashes = {path.name: sync_and_hash(path) for path in sorted(partial.iterdir())}
        (partial / MANIFEST).write_text(_manifest(hashes), encoding="utf-8")
        sync_and_hash(partial / MANIFEST)
        sync_directory(partial)
        old = final.with_name(f".{final.name}.old.partial")
        if final.exists():  # the same step again, evaluated after a resume
            shutil.rmtree(old, ignore_errors=True)
            final.rename(old)
        partial.rename(final)
        shutil.rmtree(old, ignore_errors=True)
        sync_directory(final.parent)
    except (OSError, SafetensorError) as error:  # the latter stands for any fault of the disk
        shutil.rmtree(partial, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise RunStopped(
            f"the checkpoint {final} could not be written ({reason}); earlier ones are untouched: "
            f"make room or mend {out_dir}"
        ) from error
    return final


def prune(out_dir: Path, keep_every: int) -> None:
    """Delete all checkpoints but the newest two, the best, and those at multiples of `keep_every` (0: none of them)."""
    newest_first = list_checkpoints(out_dir)
    for path in (out_dir / "ckpt").glob(".step-*.partial"):  # left by a kill
        shutil.rmtree(path, ignore_errors=True)
    for path in newest_first[2:]:
        keep = keep_every and int(path.name[5:]) % keep_every == 0
        if not keep and path != best(newest_first):
            shutil.rmtree(path, ignore_errors=True)


def best(paths: list[Path]) -> Path | None:
    """The checkpoint with the lowest validation loss; None where none was evaluated. What a damaged one says is not
    believed."""
    losses = []
    for path in paths:
        with contextlib.suppress(InputError):
            if (loss := _verify(path, {"state.json"})["val_loss"]) is not None:
                losses.append((loss, path))
    return min(losses, key=lambda pair: pair[0])[1] if losses else None


def find(source: str | Path, which: str = "best") -> Path:
    """The folder of a run's "best" or "latest" checkpoint, or of the step that `which` or `source` itself names.

    Raises InputError where there is none.
    """
    source = Path(source)
    if os.path.exists(source / MANIFEST):
        return source
    paths = list_checkpoints(source)
    if which not in ("best", "latest"):
        named = [path for path in (Path(which), source / "ckpt" / which) if os.path.exists(path / MANIFEST)]
        if not named:
            raise InputError(f"checkpoint={which}: no such checkpoint in {source}; it has {_names(paths)}")
        return named[0]
    if not paths:
        raise InputError(f"{source} holds no checkpoint (no ckpt/step-*): train one with --out_dir={source} first")
    return (best(paths) if which == "best" else None) or paths[0]


def load(path: Path, with_optimizer: bool = True) -> Checkpoint:
    """Read a checkpoint folder and compare each file with the manifest. Raises InputError for a damaged one."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    left_out = set() if with_optimizer else {"optimizer.safetensors"}
    state = _verify(path, {*FILES, *OPTIONAL} - left_out)
    try:
        # Clones, because the file's memory is mapped and not aligned as torch aligns its own.
        model, optimizer = (
            {key: tensor.clone() for key, tensor in load_file(path / name).items()} if name not in left_out else {}
            for name in FILES[:2]
        )
    except SafetensorError as error:  # of a manifest that is right
        raise _damaged(path, f"its tensors cannot be read ({error})") from error
    return Checkpoint(path, model, optimizer, state)


def _verify(path: Path, wanted: set[str]) -> dict[str, Any]:
    """What state.json says, once those of the `wanted` files that the manifest names are found to be its own. Raises
    InputError for a damaged one."""
    try:
        hashes: Any = read_json(path / MANIFEST).get("sha256")
        named = matches_schema(hashes, dict.fromkeys(FILES, str)) and set(hashes) <= {*FILES, *OPTIONAL}
        if not named or (path / MANIFEST).read_text(encoding="utf-8") != _manifest(hashes):
            raise ValueError
    except (OSError, ValueError) as error:
        raise _damaged(path, f"its {MANIFEST} is missing or unreadable") from error
    for name in sorted(wanted & set(hashes)):
        try:
            regular_file_size(path / name)
            with (path / name).open("rb") as content:
                found = hashlib.file_digest(content, "sha256").hexdigest()
        except OSError as error:
            raise _damaged(path, f"{name} {error.strerror}") from error
        if found != hashes[name]:
            raise _damaged(path, f"the SHA-256 of {name} is not the manifest's")
    try:
        state = OLDER | read_json(path / "state.json")
    except (OSError, ValueError) as error:
        raise _damaged(path, f"state.json is unreadable ({error})") from error
    if wrong := [name for name, kind in STATE.items() if not matches_schema(state.get(name, ...), kind)]:
        raise _damaged(path, f"state.json lacks {', '.join(wrong)}, or has another kind of it")
    if re.fullmatch(STEP, path.name) and state["step"] != int(path.name[5:]):
        raise _damaged(path, f"it holds step {state['step']}")
    return state


def _manifest(hashes: dict[str, str]) -> str:
    return json.dumps({"sha256": hashes}, indent=1)


def _damaged(path: Path, why: str) -> InputError:
    return InputError(f"{path} is damaged: {why}; use another checkpoint")


def _listed(out_dir: Path, pattern: str) -> list[Path]:
    folder = out_dir / "ckpt"
    return [*folder.glob(pattern)] if os.path.isdir(folder) else []  # glob raises for a name too long to be one


def _names(paths: list[Path]) -> str:
    return ", ".join(path.name for path in paths) or "none"
