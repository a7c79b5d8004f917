"""Checkpoints: directories `out_dir/ckpt/step-NNNNNN` that are complete or absent, read without pickle.

Each holds `model.safetensors`, `optimizer.safetensors`, `state.json`, the tokenizer where the data has one, and
`MANIFEST.json` with the SHA-256 of each file. Hashes detect corruption, not tampering. A manifest counts only if it is
exactly what `save` writes, so that a flipped bit in it is found too. Other files in the directory are ignored.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import threading
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Never, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor

from nanogpt import lora
from nanogpt.console import format_bytes, print0
from nanogpt.errors import InputError, RunStopped
from nanogpt.files import atomic_directory, file_sha256, read_json, recover_directories, sync, utf8_path
from nanogpt.metrics import AFTER_A_STOP, read_stop_reason
from nanogpt.rendezvous import Ranks
from nanogpt.run_dir import RunDir
from nanogpt.schema import Config, Count, NonNegative, check, check_keys, matches
from nanogpt.sharding import gather_rows, is_sharded, local

if TYPE_CHECKING:
    from nanogpt.text.tokenizer import Tokenizer

FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
OPTIONAL_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
MANIFEST = "MANIFEST.json"
STEP_NAME = re.compile(r"step-(\d{6,})")
RETRY_S = 60.0  # after which a failed save is tried again
# model.py's names of parameters and theirs in the files, which version 0.1 chose; other names are equal.
NAMES_IN_FILES = {"token_embedding.weight": "tokens.weight", "position_embedding.weight": "positions.weight"}
NAMES_IN_MODEL = {theirs: ours for ours, theirs in NAMES_IN_FILES.items()}


class ScalerState(TypedDict):
    """The state of torch's GradScaler."""

    scale: NonNegative
    growth_factor: NonNegative
    backoff_factor: NonNegative
    growth_interval: Count
    _growth_tracker: Count


class GuardState(TypedDict):
    """The state of UpdateGuard."""

    skipped: NonNegative
    norms: list[float | None]
    checked: Count


class Plan(TypedDict):
    """The plan of a time budget, of budget.py."""

    minutes: NonNegative
    expected_loss: NonNegative | None
    evaluation_s: NonNegative
    spent_s: NonNegative


class Fingerprints(TypedDict):
    """A hash of each split's tokens."""

    train: str
    val: str


class Lora(TypedDict):
    """The scale of adapters, where their base came from, and the hash of its weights."""

    alpha: NonNegative
    base: str
    base_sha256: str


class State(TypedDict):
    """The keys of state.json. An empty object stands for a scaler or guard that was not in use."""

    step: Count
    samples: Count
    time_s: NonNegative
    val_loss: NonNegative | None
    best_val_loss: NonNegative | None
    since_best: Count
    clipped: Count
    scaler: dict[str, Never] | ScalerState
    guard: dict[str, Never] | GuardState
    processes: Count
    wandb_id: str | None
    dial: Plan | None  # the name that version 0.1 gave it
    data: Fingerprints | None  # None: not known
    lora: Lora | None
    model: dict[str, Any]
    config: dict[str, Any]


TRANSIENT = (errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE, errno.EACCES)  # errors of an intact file
# Keys that the checkpoints of earlier versions lack.
ADDED_LATER: dict[str, Any] = {"guard": {}, "processes": 1, "wandb_id": None, "since_best": 0, "clipped": 0}
ADDED_LATER |= {"dial": None, "data": None, "lora": None}


@dataclass
class Checkpoint:
    """A loaded checkpoint: tensors by name on the CPU, and the content of `state.json`.

    With LoRA, `model` holds the adapters. `build_model` moves them to `adapters` and reads their base into `model`. To
    resume, with the optimizer's state, the two stay apart; otherwise it merges them.
    """

    path: Path
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    adapters: dict[str, Tensor] = field(default_factory=dict)

    def build_config(self, config_class: type[Config], part: str) -> Config:
        """The settings in `state[part]`. Raises InputError where `config_class` does not have or take them."""
        entries = [(f"state.json: {part}.{name}", name, value) for name, value in self.state[part].items()]
        checked, problems = check_keys(config_class, entries, hint="another version wrote it")
        try:
            if not problems:
                return config_class(**checked)
        except ValueError as error:
            problems = [f"state.json: {part}.{error}"]
        raise _damaged(self.path, "; ".join(problems[:3]))

    def build_model(self, model_class: Any, config_class: type[Config], **changes: Any) -> Any:
        """A model with these tensors, which take no new memory. Raises InputError where its sizes are not theirs.

        changes: as for `GPT.from_tensors`.
        """
        sizes: Any = self.build_config(config_class, "model")
        has_adapters = self.state["lora"] is not None and not self.adapters
        if has_adapters:
            self._read_base(asdict(sizes))
        try:
            if sizes.n_layer > len(self.model):  # even without memory a billion blocks take hours
                raise RuntimeError(f"n_layer={sizes.n_layer}, but there are {len(self.model)} tensors")
            if has_adapters and not self.optimizer:
                lora.merge(self.model, self.adapters, self.state["lora"]["alpha"], asdict(sizes))
            return model_class.from_tensors(sizes, self.model, **changes)
        except (KeyError, RuntimeError, TypeError) as error:  # the last for sizes of more than 63 bits
            reason = " ".join(str(error).split())[:200]
            raise _damaged(self.path, f"state.json: the sizes are not those of the tensors ({reason})") from error

    def _read_base(self, sizes: dict[str, Any]) -> None:
        """Read the base of adapters from the path that the run saved, or from its init_from if that has moved."""
        from nanogpt.interop.huggingface import read_weights

        run = self.state["lora"]
        init_from = str(self.state["config"].get("init_from"))
        source = next((place for place in (run["base"], init_from) if os.path.exists(place)), run["base"])
        is_run = is_checkpoint(Path(source))
        places: list[Any] = [source]
        if is_run:  # if that run has gone on, another of its checkpoints is the best now
            places = [*dict.fromkeys([find(source), *list_checkpoints(Path(source))])]

        unreadable: InputError | None = None
        for place in places:
            try:
                tensors = load(place, with_optimizer=False).model if is_run else dict(read_weights(place).tensors)
            except InputError as error:
                unreadable = unreadable or error
                continue
            if lora.base_sha256(tensors, sizes) == run["base_sha256"]:
                self.adapters = self.model
                self.model = lora.crop(tensors, sizes)
                return
        if unreadable:
            raise InputError(f"{self.path} has adapters, and their base cannot be read: {unreadable}") from unreadable
        raise InputError(f"{self.path} has adapters of another base: {source} is not what the run started from")


# --- Find and load


def is_checkpoint(source: Path) -> bool:
    """True for the directory of a run or of one of its checkpoints."""
    return os.path.exists(source / MANIFEST) or bool(list_checkpoints(source))


def has_adapters(source: Path) -> bool:
    """True for a run or checkpoint whose tensors are LoRA's adapters."""
    return is_checkpoint(source) and verify(find(source), ["state.json"])["lora"] is not None


def list_checkpoints(out_dir: Path) -> list[Path]:
    """The checkpoints of a run, the newest first."""
    folder = out_dir / "ckpt"
    if not os.path.isdir(folder):  # glob would raise for a name that is too long
        return []
    paths = [path for path in folder.glob("step-*") if STEP_NAME.fullmatch(path.name)]
    return sorted(paths, key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def find(source: str | Path, which: str = "best") -> Path:
    """The directory of a run's "best" or "latest" checkpoint, or of the one that `which` or `source` names.

    Raises InputError where there is none.
    """
    source = Path(source)
    if os.path.exists(source / MANIFEST):
        return source
    paths = list_checkpoints(source)
    if which not in ("best", "latest"):
        for path in (Path(which), source / "ckpt" / which):
            if os.path.exists(path / MANIFEST):
                return path
        names = ", ".join(path.name for path in paths) or "none"
        raise InputError(f"checkpoint={which}: no such checkpoint in {source}; it has {names}")
    if not paths:
        raise InputError(f"{source} holds no checkpoint (no ckpt/step-*): train one with --out_dir={source} first")
    return (best(paths) if which == "best" else None) or paths[0]


def best(paths: list[Path]) -> Path | None:
    """The checkpoint with the lowest validation loss; None where none was evaluated.

    Damaged ones do not count, nor those that were evaluated on other data than the newest.
    """
    losses: dict[Path, float] = {}
    newest_data = None
    for path in paths:
        with contextlib.suppress(InputError):
            state = verify(path, ["state.json"])
            data = state["data"] and state["data"]["val"]
            newest_data = newest_data or data
            if state["val_loss"] is not None and data in (None, newest_data):
                losses[path] = state["val_loss"]
    return min(losses, key=lambda path: losses[path], default=None)


def claim_and_load(
    run_dir: RunDir, resume: bool | str, writes: bool, ranks: Ranks, stack: contextlib.ExitStack
) -> Checkpoint | None:
    """Claim a run's directory, if it writes, and load the checkpoint to resume; None for a new run.

    The main process does so, and all ranks load the same checkpoint. Raises InputError where another rank does not find
    it or the claimed directory, and RunStopped for a run that `resume="auto"` would repeat.
    """
    resumed: Checkpoint | None = None

    def claim() -> str:
        if not writes:
            return ""
        stack.enter_context(run_dir)
        recover_directories(run_dir.path / "ckpt")  # under the lock: a live run renames there too
        return run_dir.mark() if ranks.size > 1 else ""

    def find_latest() -> str:
        nonlocal resumed
        if writes and resume == "auto" and (reason := read_stop_reason(run_dir.path)):
            raise RunStopped(f"{reason}: --resume=auto does not repeat it; {AFTER_A_STOP}")
        resumed = load_latest(run_dir.path, resume)
        return resumed.path.name if resumed else ""

    def load_same(name: str) -> None:
        nonlocal resumed
        if name and not resumed:
            resumed = load(run_dir.path / "ckpt" / name, is_verified=True, is_mapped=True)

    if mark := ranks.run_on_main(claim):
        ranks.run_on_all(partial(run_dir.raise_unless_shared, mark, ranks.hosts[0]))
    name = ranks.run_on_main(find_latest)  # compares the hashes of a large checkpoint, which takes minutes
    ranks.run_on_all(partial(load_same, name))
    return resumed


def load_latest(out_dir: Path, resume: bool | str) -> Checkpoint | None:
    """Load the newest intact checkpoint of the run to resume; None for a new run.

    Damaged checkpoints that are passed over are named in printed lines. Raises InputError where there is nothing to
    resume, or no checkpoint is intact.
    """
    if resume is False:
        return None
    paths = list_checkpoints(out_dir)
    if resume == "auto" and not paths:
        return None
    if not paths:
        hint = ", or start a new run without --resume"
        if os.path.exists(out_dir / "ckpt.pt"):
            hint = f"; for nanoGPT's checkpoint there use --init_from={out_dir / 'ckpt.pt'}"
        raise InputError(f"out_dir={out_dir} holds no run to resume (no ckpt/step-*): check the path{hint}")
    for path in paths:
        try:
            return load(path, is_mapped=True)
        except InputError as error:
            print0(f"warning: {error}")
    raise InputError(f"no checkpoint of {out_dir} is intact: start a new run without --resume")


def load(path: Path, with_optimizer: bool = True, is_verified: bool = False, is_mapped: bool = False) -> Checkpoint:
    """Read a checkpoint directory and compare each file with the manifest. Raises InputError for a damaged one.

    is_verified: another rank has compared the hashes. is_mapped: memory-map the tensors, which are then read from disk
    when used.
    """
    files = [*FILES, *OPTIONAL_FILES]
    if not with_optimizer:
        files.remove("optimizer.safetensors")
    state = verify(path, [] if is_verified else files)
    model = _load_tensors(path, "model.safetensors", is_mapped)
    optimizer = _load_tensors(path, "optimizer.safetensors", is_mapped) if with_optimizer else {}
    return Checkpoint(path, model, optimizer, state)


def _load_tensors(path: Path, file: str, is_mapped: bool) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        with utf8_path(path / file) as name:
            tensors = load_file(name)
        # Clones, because mapped memory is not aligned as torch aligns its own.
        return {_rename(key, NAMES_IN_MODEL): t if is_mapped else t.clone() for key, t in tensors.items()}
    except SafetensorError as error:  # its hash is right, so it was written this way
        raise _damaged(path, f"its tensors cannot be read ({error})") from error


def _rename(key: str, names: dict[str, str]) -> str:
    """Rename the parameter in a key of the model (`<parameter>`) or of the optimizer (`<parameter>/<state>`)."""
    parameter, slash, state = key.partition("/")
    return names.get(parameter, parameter) + slash + state


def verify(path: Path, files: list[str]) -> dict[str, Any]:
    """Compare files of a checkpoint with the manifest, where it names them, and return the content of state.json.

    Raises InputError for a damaged checkpoint.
    """
    try:
        hashes: Any = read_json(path / MANIFEST).get("sha256")
        is_complete = matches(hashes, dict[str, str]) and {*FILES} <= {*hashes} <= {*FILES, *OPTIONAL_FILES}
        if not is_complete or (path / MANIFEST).read_text(encoding="utf-8") != _format_manifest(hashes):
            raise ValueError
    except (OSError, ValueError) as error:
        raise_if_transient(error, path)
        raise _damaged(path, f"its {MANIFEST} is missing or unreadable") from error

    for name in files:
        try:
            if name in hashes and file_sha256(path / name) != hashes[name]:
                raise _damaged(path, f"the SHA-256 of {name} is not the manifest's")
        except OSError as error:
            raise_if_transient(error, path)
            raise _damaged(path, f"{name}: {error.strerror}") from error

    try:
        content = {**ADDED_LATER, **read_json(path / "state.json")}
    except (OSError, ValueError) as error:
        raise_if_transient(error, path)
        raise _damaged(path, f"state.json is unreadable ({error})") from error
    state, problems = check(content, State)
    if problems:
        raise _damaged(path, f"state.json: {'; '.join(problems[:5])}")
    if STEP_NAME.fullmatch(path.name) and state["step"] != _step(path):
        raise _damaged(path, f"it holds step {state['step']}")
    return state


def _format_manifest(hashes: dict[str, str]) -> str:
    return json.dumps({"sha256": hashes}, indent=1)


def raise_if_transient(error: Exception, path: Path) -> None:
    """Raise RunStopped for an error that another try may not meet, such as those of a network's file system."""
    if isinstance(error, OSError) and error.errno in TRANSIENT:
        raise RunStopped(f"{path} cannot be read ({error.strerror}): it may be intact; try again") from error


def _damaged(path: Path, reason: str) -> InputError:
    newest_first = [other.name for other in list_checkpoints(path.absolute().parent.parent)]
    earlier = newest_first[newest_first.index(path.name) + 1 :] if path.name in newest_first else []
    hint = f"; {earlier[0]} may be intact" if earlier else ""
    return InputError(f"{path} is damaged: {reason}{hint}")


# --- Save and prune


def save(
    out_dir: Path,
    model: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    state: dict[str, Any],
    tokenizer: "Tokenizer | None",
    run_dir: RunDir | None = None,
) -> Path:
    """Write `ckpt/step-NNNNNN` for `state["step"]`, atomically. Returns its path.

    run_dir: of out_dir, to make sure that this is still its name. Raises RunStopped where the disk does not take it;
    earlier checkpoints stay.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = out_dir / "ckpt" / f"step-{state['step']:06d}"
    try:
        path.parent.mkdir(exist_ok=True)
        sync(out_dir)
        with atomic_directory(path, replace=True) as partial:
            # What follows either happens in the directory just made or fails, whatever becomes of the name.
            if run_dir and run_dir.follow() != out_dir:
                raise OSError(errno.ESTALE, f"{out_dir} was renamed")
            needed = sum(tensor.nbytes for tensor in (*model.values(), *optimizer.values()))
            free = shutil.disk_usage(partial).free
            if free < needed:
                raise OSError(errno.ENOSPC, f"{format_bytes(needed)} are needed, {format_bytes(free)} are free")
            for file, tensors in (("model.safetensors", model), ("optimizer.safetensors", optimizer)):
                renamed = {_rename(key, NAMES_IN_FILES): t.detach().cpu().contiguous() for key, t in tensors.items()}
                save_file(renamed, partial / file)
            (partial / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
            if tokenizer is not None:
                tokenizer.save(partial)
            hashes = {file.name: file_sha256(file) for file in sorted(partial.iterdir())}
            (partial / MANIFEST).write_text(_format_manifest(hashes), encoding="utf-8")
    except (OSError, SafetensorError) as error:  # safetensors raises its own for every error of the disk
        reason = getattr(error, "strerror", None) or error
        raise RunStopped(
            f"the checkpoint {path} could not be written ({reason}); earlier ones are untouched: "
            f"free some disk space or make {out_dir} writable"
        ) from error
    return path


def prune(out_dir: Path, keep_every: int, run_dir: RunDir | None = None) -> None:
    """Delete all checkpoints but the newest two, the best, and those at multiples of `keep_every` (0: none of them)."""
    unwanted = [*(out_dir / "ckpt").glob(".step-*.partial")]  # left by a kill
    paths = list_checkpoints(out_dir)
    lowest = best(paths)
    for path in paths[2:]:
        is_multiple = keep_every and _step(path) % keep_every == 0
        if not is_multiple and path != lowest:
            unwanted.append(path)
    for path in unwanted:
        if run_dir is None or run_dir.follow() == out_dir:
            shutil.rmtree(path, ignore_errors=True)


def quarantine_damaged(resumed: Path) -> None:
    """Rename damaged checkpoints of a run: those newer than `resumed`, and each whose loss is the lowest.

    Under their own names they would count as the newest and the best, and intact ones would be pruned in their place.
    """
    paths = list_checkpoints(resumed.parent.parent)
    damaged, intact = paths[: paths.index(resumed)], paths[paths.index(resumed) :]
    while (lowest := best(intact)) and lowest != resumed:
        try:
            verify(lowest, [*FILES, *OPTIONAL_FILES])
            break
        except InputError:
            damaged.append(lowest)
            intact.remove(lowest)
    for path in damaged:
        renamed = path.with_name(f"damaged-{path.name}")
        shutil.rmtree(renamed, ignore_errors=True)
        path.rename(renamed)
        print0(f"warning: {path} is damaged: renamed to {renamed.name}, for you to look at or delete")


class Writer:
    """Saves a run's checkpoints in a background thread, one at a time, and prunes them.

    minutes: a save is overdue when the last began longer ago; 0: never. group: with shards, of the ranks of one copy of
    the model (`gather_rows`). Each of them has a Writer; the main process's writes, and the others send it their rows.
    """

    def __init__(
        self, run_dir: RunDir, keep_every: int, minutes: float, tokenizer: "Tokenizer | None", group: Any = None
    ):
        self.run_dir = run_dir
        self.group = group
        self.is_main = group is None or dist.get_rank() == 0
        self.keep_every = keep_every
        self.tokenizer = tokenizer
        self._interval_s = 60 * minutes or float("inf")
        self._due_at = time.monotonic() + self._interval_s
        self._failure: str | None = None
        self._lost_rank: RunStopped | None = None  # names a rank that was lost: no later save can reach it either
        self._thread = threading.Thread()
        self._copies: dict[str, Tensor] = {}  # reused: writing to new memory takes longer than to touched memory
        self._sharded: set[str] = set()  # names of tensors of which each rank has a part

    def save(self, model: dict[str, Tensor], optimizer: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Start a save; returns once the save before it has ended and the tensors are copied to host memory."""
        self.wait()
        if self._lost_rank:
            raise self._lost_rank
        self._report_failure()
        self._due_at = time.monotonic() + self._interval_s
        copies = self._copy(model), self._copy(optimizer)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        # A daemon, so that a second Ctrl-C need not wait for it: what it leaves half written is never read.
        self._thread = threading.Thread(target=self._write, args=(*copies, state), daemon=True)
        self._thread.start()

    def overdue(self) -> bool:
        """True if a save is due by the clock. Reports a failed save, and makes it due again soon."""
        if not self._thread.is_alive():
            self._report_failure()
        return self._lost_rank is not None or time.monotonic() > self._due_at

    def wait(self) -> None:
        """Wait for the save in progress."""
        if self._thread.ident is not None:
            self._thread.join()

    def finish(self) -> None:
        """Wait for the last save. Raises RunStopped where it failed."""
        self.wait()
        if self._lost_rank:
            raise self._lost_rank
        if self._failure:
            raise RunStopped(f"{self._failure}; then resume with --resume=True")

    def __enter__(self) -> "Writer":
        if self.is_main:
            prune(self.run_dir.path, self.keep_every)  # a kill may have interrupted the last one
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is not KeyboardInterrupt or not list_checkpoints(self.run_dir.path):  # the first one is worth a wait
            self.wait()

    def _copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copy what this rank has of each tensor to host memory."""
        for name, tensor in tensors.items():
            own = local(tensor.detach())
            if name not in self._copies:
                shape = tensor.shape if self.is_main else own.shape  # the rest is for the other ranks' rows
                self._copies[name] = torch.empty(shape, dtype=own.dtype, pin_memory=own.is_cuda)
            copy = self._copies[name]
            if is_sharded(tensor):
                self._sharded.add(name)
                copy = copy[: len(own)]
            copy.copy_(own, non_blocking=own.is_cuda)
        return {name: self._copies[name] for name in tensors}

    def _report_failure(self) -> None:
        if self._failure:
            print0(f"warning: {self._failure}; trying again in {RETRY_S:.0f} s")
            self._failure = None
            self._due_at = time.monotonic() + RETRY_S

    def _write(self, model: dict[str, Tensor], optimizer: dict[str, Tensor], state: dict[str, Any]) -> None:
        try:
            for name, copy in (model | optimizer).items():
                if name in self._sharded:
                    gather_rows(copy, self.group)
        except RunStopped as error:
            self._lost_rank = error
        except Exception as error:  # a save that ends here must not look like one that was done
            self._lost_rank = RunStopped(f"a checkpoint could not be gathered: {error!r}; resume with --resume=auto")
        if self._lost_rank or not self.is_main:
            return
        try:
            path = self.run_dir.follow()
            try:
                save(path, model, optimizer, state, self.tokenizer, self.run_dir)
            except RunStopped:
                if self.run_dir.follow() == path:
                    raise
                save(self.run_dir.path, model, optimizer, state, self.tokenizer, self.run_dir)
            prune(self.run_dir.follow(), self.keep_every, self.run_dir)
        except Exception as error:  # whatever it is, training continues, and reports it
            self._failure = str(error) or repr(error)
