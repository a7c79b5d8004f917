"""Take the folder of a living run away at random instants, or start a second run on it, and compare their ends.

    python tests/chaos/folders.py --deeds=200 --seed=1

A run that ends well has left its last checkpoint in one folder, equal to an undisturbed run's to the bit, with all its
lines in metrics.jsonl. A run that is refused says so. Prints a line for each deed; ends at the first difference with
status 1 and leaves its folder for inspection. Needs Linux.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from chaos import Mismatch, compare, fork, require
from conftest import flags, metrics
from small_data import Source, write_letters

import train
from nanogpt import checkpoint
from nanogpt.errors import run_script
from nanogpt.schedule import StepSchedule

STEPS = 40
STEP_S = 0.01  # a step is made this long, so that the instants fall into all phases


def train_slowly(home: Path, seed: int, keys: dict[str, Any]) -> None:
    os.chdir(home)
    lr_scale = StepSchedule.lr_scale

    def slow(schedule: StepSchedule, step: int) -> float:
        time.sleep(STEP_S)
        return lr_scale(schedule, step)

    StepSchedule.lr_scale = slow  # type: ignore[method-assign]
    keys = {"out_dir": "out", "eval_interval": 4, "max_iters": STEPS, "lr_decay_iters": STEPS} | keys
    sys.argv = ["train.py", *flags(dataset=home.parent / "letters", seed=seed, **keys)]
    run_script(train.main, is_output_expendable=True)


def start(home: Path, seed: int, log: Path, **keys: Any) -> int:
    """Run train.py in a fork, which has torch already; returns its process id."""
    return fork(partial(train_slowly, home, seed, keys), log)


# --- The deeds


def second_run(home: Path) -> int:
    return start(home, 2, home / "second.log")


def rename(home: Path) -> None:
    (home / "out").rename(home / "moved")


def rename_and_second_run(home: Path) -> int:
    rename(home)
    return second_run(home)


def edit_metrics(home: Path) -> None:
    path = home / "out/metrics.jsonl"
    content = path.read_bytes()
    time.sleep(2 * STEP_S)
    path.with_suffix(".swp").write_bytes(content)
    path.with_suffix(".swp").replace(path)


def delete_metrics(home: Path) -> None:
    (home / "out/metrics.jsonl").unlink()


def delete_lock(home: Path) -> int:
    (home / "out/.lock").unlink()
    return second_run(home)


def delete_lock_and_resume(home: Path) -> int:
    (home / "out/.lock").unlink()
    return start(home, 1, home / "second.log", resume="auto")


def delete(home: Path) -> None:
    shutil.rmtree(home / "out", ignore_errors=True)


def replace(home: Path) -> None:
    """The folder moves elsewhere, and a finished run takes its name."""
    (home / "away").mkdir(exist_ok=True)
    (home / "out").rename(home / "away/out")
    shutil.copytree(home.parent / "reference-2/out", home / "out")


DEEDS: list[Callable[[Path], int | None]] = [
    *(second_run, rename, rename_and_second_run, edit_metrics, delete_metrics),
    *(delete_lock, delete_lock_and_resume, delete, replace),
]


# --- What came of them


def check_ends(home: Path, runs: list[tuple[int, int, str]]) -> str:
    """Compare each run (seed, status, output) with the undisturbed one of its seed. Raises Mismatch."""
    by_seed: dict[int, list[Path]] = {1: [], 2: []}
    for out_dir in (path.parents[2] for path in home.rglob(f"ckpt/step-{STEPS:06d}/MANIFEST.json")):
        config = json.loads((out_dir / f"ckpt/step-{STEPS:06d}/state.json").read_text())["config"]
        by_seed[config["seed"]].append(out_dir)
        seeds = {json.loads(p.read_text())["config"]["seed"] for p in out_dir.glob("ckpt/step-*/state.json")}
        require(seeds == {config["seed"]}, f"{out_dir} holds checkpoints of {seeds}")
    endings = Counter[str]()
    for seed, status, output in runs:
        require("Traceback" not in output, output)
        if status == 0:
            endings[f"run {seed} whole"] += 1
        elif status == 2 and "a run is writing there now" in output:
            endings[f"run {seed} refused"] += 1
        elif status == 2 and "cannot be written" in output and "first step" not in output:
            endings[f"run {seed} ended before its first step"] += 1
        else:
            raise Mismatch(f"run {seed} ended with {status}:\n{output[-1000:]}")
    for seed in by_seed:
        done = [output for number, status, output in runs if number == seed and status == 0]
        ended = sum("nothing left to do" not in output for output in done)  # a resumed one whose work was done
        copies = sum(path == home / "out" and seed == 2 and (home / "away").exists() for path in by_seed[seed])
        require(len(by_seed[seed]) - copies == ended, f"{ended} runs of seed {seed} ended, in {by_seed[seed]}")
        reference = home.parent / f"reference-{seed}/out"
        for out_dir in by_seed[seed]:
            name = f"ckpt/step-{STEPS:06d}"
            compare(checkpoint.load(out_dir / name), checkpoint.load(reference / name), "step", "samples", "val_loss")
            require(metrics(out_dir) == metrics(reference), f"{out_dir}/metrics.jsonl is not whole")
    return ", ".join(f"{ending}" for ending in sorted(endings))


def do(deed: Callable[[Path], int | None], delay: float, home: Path) -> str:
    """A deed, `delay` seconds after the start of a run. Raises Mismatch."""
    home.mkdir()
    first = start(home, 1, home / "first.log")
    time.sleep(delay)
    while True:
        try:
            second = deed(home)
            break
        except OSError:  # too early: what it needs is not there yet
            if os.waitid(os.P_PID, first, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                raise
            time.sleep(0.005)
    is_late = "done: " in (home / "first.log").read_text()
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in (first, second) if child]
    outputs = [(home / name).read_text() for name in ("first.log", "second.log") if (home / name).exists()]
    if is_late and deed in (delete, delete_metrics, edit_metrics):
        return "after the end"
    seeds = (1, 1 if deed is delete_lock_and_resume else 2)
    return check_ends(home, list(zip(seeds, statuses, outputs, strict=False)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("deeds", 50), ("seed", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="folders-"))
    random = Random(args.seed)
    write_letters(home / "letters", Source(args.seed), train=2_000, val=500)
    torch.set_num_threads(1)
    for seed in (1, 2):
        (home / f"reference-{seed}").mkdir()
        began = time.monotonic()
        os.waitpid(start(home / f"reference-{seed}", seed, home / "log"), 0)
    seconds = time.monotonic() - began
    counts = Counter[str]()
    try:
        for number in range(1, args.deeds + 1):
            deed = DEEDS[number % len(DEEDS)]
            delay = random.uniform(0, 0.9 * seconds)
            came = do(deed, delay, home / f"{number}")
            counts[f"{deed.__name__}: {came}"] += 1
            print(f"{number}: {deed.__name__} after {delay:.2f} s: {came}", flush=True)
            shutil.rmtree(home / f"{number}")
    except Mismatch as problem:
        sys.exit(f"MISMATCH: {problem}\n{home} is left for inspection")
    print(
        f"{args.deeds} deeds, no step lost", *sorted(f"  {count} × {text}" for text, count in counts.items()), sep="\n"
    )
    shutil.rmtree(home)


if __name__ == "__main__":
    main()
