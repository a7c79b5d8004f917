"""Cases of runs: what happens to a folder, its files and the console while train.py works."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cases.command import Case, Result, run
from nanogpt.data.write import write_text
from nanogpt.text.tokenizer import Tokenizer

TINY = (
    *("--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=4", "--warmup_iters=2"),
    *("--gradient_accumulation_steps=1", "--eval_iters=2", "--log_interval=1", "--sample_chars=0"),
    *("--device=cpu", "--dtype=float32", "--compile=False"),
)
LONG = ("--max_iters=1000", "--eval_interval=200")  # about two seconds of steps


def dataset(folder: Path, letters: str = "abcd") -> str:
    """A dataset of 4,000 letters."""
    text = (letters * 1000)[:4000]
    write_text(folder / "data", text, Tokenizer.characters(text))
    return f"--dataset={folder / 'data'}"


def train(checkout: Path, *flags: str, **environment: str) -> Result:
    return run(checkout, "train.py", *TINY, *flags, OMP_NUM_THREADS="1", **environment)


class Living:
    """A run in the background."""

    def __init__(self, checkout: Path, log: Path, *flags: str):
        self.log = log
        with log.open("w") as file:
            env = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
            command = [sys.executable, str(checkout / "train.py"), *TINY, *flags]
            self.process = subprocess.Popen(command, cwd=checkout, env=env, stdout=file, stderr=file)

    def wait_for(self, is_there: Callable[[], Any]) -> None:
        while not is_there() and self.process.poll() is None:
            time.sleep(0.01)

    def end(self) -> Result:
        return Result(self.process.wait(120), self.log.read_text())


def steps(out_dir: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in out_dir.glob("ckpt/step-*"))


def logged_steps(out_dir: Path) -> list[int]:
    lines = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "loss" in line]


def change_state(path: Path, **changes: Any) -> None:
    """Change state.json as a program or a hand may, with the right hash in the manifest."""
    state = json.loads((path / "state.json").read_text())
    for name, value in changes.items():
        part = state[name] if isinstance(value, dict) else state
        part.update(value if isinstance(value, dict) else {name: value})
    (path / "state.json").write_text(json.dumps(state))
    manifest = json.loads((path / "MANIFEST.json").read_text())
    manifest["sha256"]["state.json"] = hashlib.sha256((path / "state.json").read_bytes()).hexdigest()
    (path / "MANIFEST.json").write_text(json.dumps(manifest, indent=1))


def two_runs(checkout: Path, folder: Path) -> tuple[bool, str]:
    """A time budget measures the machine for some seconds before the run begins to write."""
    flags = (dataset(folder), f"--out_dir={folder / 'out'}", "--minutes=0.6", "--block_size=16", "--device=cpu")
    first = Living(checkout, folder / "first.log", *flags)
    time.sleep(1.5)
    second = run(checkout, "train.py", *flags)
    statuses = (first.end().status, second.status)
    folders = sorted(path.name for path in folder.glob("out*"))
    is_refused = "out_dir=" in second.last_line  # and not because too little time is left
    return is_refused and (statuses, folders) == (
        (0, 2),
        ["out"],
    ), f"status {statuses}; {', '.join(folders)}; {second.last_line}"


def renamed(checkout: Path, folder: Path) -> tuple[bool, str]:
    out, moved = folder / "out", folder / "moved"
    flags = (dataset(folder), f"--out_dir={out}", *LONG)
    first = Living(checkout, folder / "first.log", *flags)
    first.wait_for(lambda: steps(out))
    out.rename(moved)
    second = Living(checkout, folder / "second.log", *flags, "--seed=2")
    results = [first.end(), second.end()]
    states = [json.loads(path.read_text()) for path in out.glob("ckpt/step-*/state.json")]
    seeds = {state["config"]["seed"] for state in states}
    is_right = seeds == {2} and (1000 in steps(moved) or results[0].status == 3)
    return is_right, f"moved holds {steps(moved)}; its old name {steps(out)} of seeds {sorted(seeds)}"


def edited(checkout: Path, folder: Path) -> tuple[bool, str]:
    out = folder / "out"
    living = Living(checkout, folder / "log", dataset(folder), f"--out_dir={out}", *LONG)
    living.wait_for(lambda: steps(out))
    content = (out / "metrics.jsonl").read_bytes()
    time.sleep(0.05)
    (out / "edited").write_bytes(content)
    (out / "edited").replace(out / "metrics.jsonl")
    result = living.end()
    logged = logged_steps(out)
    return logged == [*range(1, 1001)], f"status {result.status}; {len(logged)} of 1000 steps are in metrics.jsonl"


def new_text(checkout: Path, folder: Path) -> tuple[bool, str]:
    flags = (dataset(folder), f"--out_dir={folder / 'out'}", "--resume=auto")
    train(checkout, *flags, "--max_iters=4")
    dataset(folder, "dcba")
    result = train(checkout, *flags, "--max_iters=8")
    return result.is_clear_error, f"status {result.status}: {result.last_line}"


def step_above_2_to_24(checkout: Path, folder: Path) -> tuple[bool, str]:
    out, step = folder / "out", 2**24 + 1
    flags = (dataset(folder), f"--out_dir={out}")
    train(checkout, *flags, "--max_iters=2")
    change_state(out / "ckpt/step-000002", step=step)
    (out / "ckpt/step-000002").rename(out / f"ckpt/step-{step}")
    result = train(checkout, *flags, f"--max_iters={step + 1}", "--resume=True")
    return result.status == 0 and steps(out)[-1] == step + 1, f"status {result.status}: {result.last_line}"


def console(checkout: Path, folder: Path) -> tuple[bool, str]:
    """A cp1252 console and a text that it lacks, a closed stdout, a full disk under it."""
    flags = (dataset(folder, "привет"), "--max_iters=2", "--sample_chars=20")
    statuses = [train(checkout, *flags, f"--out_dir={folder / 'cp1252'}", PYTHONIOENCODING="cp1252").status]
    for name, redirection in (("closed", ">&-"), ("full", ">/dev/full"), ("both", ">&- 2>&-")):
        command = ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, str(checkout / "train.py"), *TINY]
        env = {**os.environ, "PYTHONPATH": str(checkout)}
        process = subprocess.run([*command, *flags, f"--out_dir={folder / name}"], env=env, capture_output=True)
        statuses.append(process.returncode)
    saved = [steps(folder / name) for name in ("cp1252", "closed", "full", "both")]
    return (statuses, saved) == ([0] * 4, [[2]] * 4), f"status {statuses}; saved {saved}"


def lying_state(checkout: Path, folder: Path) -> tuple[bool, str]:
    path = folder / "out/ckpt/step-000002"
    train(checkout, dataset(folder), f"--out_dir={folder / 'out'}", "--max_iters=2")
    seen = []
    for changes in ({"n_layers": 1}, {"n_head": "2"}, {"n_embd": 32}, {"n_layer": 10**9}):
        intact = path.joinpath("state.json").read_text()
        change_state(path, model=changes)
        try:
            result = run(checkout, "sample.py", f"--out_dir={folder / 'out'}", "--device=cpu", timeout=20)
            seen.append(result.is_clear_error)
        except subprocess.TimeoutExpired:
            seen.append(False)
        path.joinpath("state.json").write_text(intact)
    return all(seen), f"a clear error in {sum(seen)} of {len(seen)}"


PATCHES = {
    "fsync of a folder": """
def fsync(handle, original=os.fsync):
    if stat.S_ISDIR(os.fstat(handle).st_mode):
        raise OSError(errno.EINVAL, "Invalid argument")
    original(handle)
os.fsync = fsync
""",
    "flock": """
def flock(*_):
    raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = flock
""",
    "shared memory": """
import _multiprocessing
class SemLock:
    SEM_VALUE_MAX = 1
    def __init__(self, *_, **__):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")
_multiprocessing.SemLock = SemLock
""",
}


def poor_machine(checkout: Path, folder: Path) -> tuple[bool, str]:
    """Without fsync of folders, locks, shared memory; a pipe in place of metrics.jsonl."""
    data = dataset(folder)
    (folder / "text.txt").write_text("abcd" * 1000)
    statuses = {}
    for name, patch in PATCHES.items():
        (folder / "sitecustomize.py").write_text("import errno, fcntl, os, stat\n" + patch)
        path = f"{folder}{os.pathsep}{checkout}"
        flags = (data, f"--out_dir={folder / 'out'}", "--max_iters=2")
        if name == "shared memory":
            flags = (f"--input={folder / 'text.txt'}", f"--out={folder / 'prepared'}", "--tokenizer=char")
            statuses[name] = run(checkout, "data/prepare.py", *flags, PYTHONPATH=path).status
        else:
            statuses[name] = train(checkout, *flags, PYTHONPATH=path).status
    train(checkout, data, f"--out_dir={folder / 'pipe'}", "--max_iters=2")
    (folder / "pipe/metrics.jsonl").unlink()
    os.mkfifo(folder / "pipe/metrics.jsonl")
    with contextlib.suppress(subprocess.TimeoutExpired):
        flags = (data, f"--out_dir={folder / 'pipe'}", "--max_iters=4", "--resume=True")
        statuses["pipe"] = run(checkout, "train.py", *TINY, *flags, timeout=30).status
    return statuses == dict.fromkeys(PATCHES, 0) | {"pipe": 2}, f"status {statuses}"


def blank_line(checkout: Path, folder: Path) -> tuple[bool, str]:
    flags = (dataset(folder), f"--out_dir={folder / 'out'}")
    train(checkout, *flags, "--max_iters=4", "--eval_interval=2")
    train(checkout, *flags, "--max_iters=9", "--resume=True", "--learning_rate=1e9", "--decay_lr=False")
    with (folder / "out/metrics.jsonl").open("a") as file:
        file.write("\n")
    result = train(checkout, *flags, "--max_iters=9", "--resume=auto")
    return result.status == 3, f"status {result.status}: {result.last_line}"


def odd_name(checkout: Path, folder: Path) -> tuple[bool, str]:
    out = folder / os.fsdecode(b"\xff")
    flags = (dataset(folder), f"--out_dir={out}")
    results = [train(checkout, *flags, "--max_iters=2"), train(checkout, *flags, "--max_iters=4", "--resume=True")]
    results.append(run(checkout, "sample.py", f"--out_dir={out}", "--device=cpu", "--start=a", "--max_new_tokens=3"))
    return [r.status for r in results] == [0, 0, 0], f"status {[r.status for r in results]}: {results[-1].last_line}"


def cut_data(checkout: Path, folder: Path) -> tuple[bool, str]:
    out = folder / "out"
    text = "abcd" * 50_000
    write_text(folder / "data", text, Tokenizer.characters(text))
    living = Living(checkout, folder / "log", f"--dataset={folder / 'data'}", f"--out_dir={out}", *LONG)
    living.wait_for(lambda: steps(out))
    os.truncate(folder / "data/train.bin", 100)
    result = living.end()
    is_right = result.status == 3 and "cut short" in result.output
    ending = signal.Signals(-result.status).name if result.status < 0 else f"status {result.status}"
    return is_right, f"{ending}: {result.last_line}"


CASES: dict[str, Case] = {
    "R1": Case("two runs on one new out_dir, the second a second later", two_runs),
    "R2": Case("a living run's folder is renamed, and a new run takes its name", renamed),
    "R3": Case("an editor replaces metrics.jsonl in mid-run", edited),
    "R4": Case("the data is prepared anew from other text, and the run resumed", new_text),
    "R5": Case("resume at step 2**24 + 1", step_above_2_to_24),
    "R6": Case("a console without the text's letters, a closed and a full one", console),
    "R7": Case("sizes in state.json that are not the tensors'", lying_state),
    "R8": Case("no fsync of folders, no locks, no shared memory, a pipe for a file", poor_machine),
    "R9": Case("a blank line after the reason of a stop", blank_line),
    "R10": Case("a folder's name that is not UTF-8", odd_name),
    "R11": Case("the data file is cut in mid-run", cut_data),
}
