"""nanoGPT's small CPU run against ours: whole processes, alternating, from start to exit.

    python runs/shakespeare_char_cpu/compare_with_nanogpt.py --reference=PATH_OF_A_NANOGPT_CHECKOUT

Both train the same model on the same bytes with the recipe that each documents. Writes results.json and
loss_over_seconds.png beside itself.
"""

import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))  # model.py and train.py run in place and are not installed

from configurator import key, parse  # noqa: E402
from model import GPT  # noqa: E402
from nanogpt import checkpoint  # noqa: E402
from nanogpt.data.dataset import open_dataset, resolve  # noqa: E402
from nanogpt.data.rows import EvalWindows  # noqa: E402
from nanogpt.distributed import World  # noqa: E402
from nanogpt.errors import InputError, run_script  # noqa: E402
from nanogpt.evaluation import evaluate  # noqa: E402

DATASET = "shakespeare_char"
BLOCK_SIZE = 64
# The command that nanoGPT's README gives for a computer without a GPU, but for the length of the run.
NANOGPT_FLAGS = (
    f"--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size={BLOCK_SIZE} --batch_size=12 "
    "--n_layer=4 --n_head=4 --n_embd=128 --dropout=0.0"
)
EVALUATION = re.compile(r"step +(\d+)\W+train loss (\S+)\W+val loss (\S+)")  # matches the lines of both programs
STEP_TIME = re.compile(r"iter \d+: .*time ([\d.]+)ms")
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")  # that decide the speed of products
LABELS = {"nanogpt": "nanoGPT", "ours": "this project"}
COLORS = {"nanogpt": "tab:gray", "ours": "tab:blue"}


@dataclass
class CompareConfig:
    """The runs to compare."""

    reference: str = key("", "nanoGPT checkout with data/shakespeare_char prepared; its code is executed")
    rounds: int = key(3, "runs of each program, alternating", ge=1)
    max_iters: int = key(2000, "updates of each run; 2000 in both recipes", ge=20)
    ours: str = key("", "more flags for our train.py: --ours='--dtype=float32'")
    to: str = key(str(HERE), "folder for results.json and loss_over_seconds.png")


def main() -> None:
    config, _ = parse(CompareConfig, description="Compare whole runs with nanoGPT's.")
    reference = Path(config.reference).resolve()
    if not config.reference or not (reference / "train.py").is_file():
        raise InputError(f"--reference={config.reference}: contains no train.py; give a nanoGPT checkout")
    check_same_data(reference)
    length = f"--max_iters={config.max_iters} --lr_decay_iters={config.max_iters}"
    if config.max_iters < 250:  # a trial; the recipes of both evaluate every 250 updates
        length += f" --eval_interval={config.max_iters}"
    commands = {
        "nanogpt": f"train.py config/train_shakespeare_char.py {NANOGPT_FLAGS} {length}",
        "ours": f"train.py config/train_shakespeare_char_cpu.py {length} {config.ours}".strip(),
    }
    print(*(f"{LABELS[side]}: python {command}" for side, command in commands.items()), sep="\n", flush=True)
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(config.rounds):
            results: dict[str, Any] = {}
            for side in list(commands)[:: -1 if number % 2 else 1]:  # drift of the machine affects both alike
                out_dir = Path(folder) / f"{side}-{number}"
                cwd = ROOT if side == "ours" else reference
                wall_s, lines = run([*shlex.split(commands[side]), f"--out_dir={out_dir}"], cwd)
                read = read_ours if side == "ours" else read_nanogpt
                result = {"wall_s": round(wall_s, 2), **read(out_dir, lines)}
                print(f"round {number + 1}, {LABELS[side]}: {result}", flush=True)
                results[side] = {**result, "evaluations": read_evaluations(lines)}
            rounds.append(results)
    summary = {name: summarize(name, rounds) for name in ("wall_s", "ms_per_step", "val_loss")}
    report = {
        "settings": asdict(config) | {"reference": commit(reference), "to": None},
        "commands": {side: f"python {command}" for side, command in commands.items()},
        "notes": [
            "wall_s: the whole process, imports, evaluations and saving included.",
            "ms_per_step: nanoGPT's median printed time; ours the median over the intervals of metrics.jsonl.",
            f"val_loss: of the saved weights, in float32, over the whole split in windows of {BLOCK_SIZE}. Ours are "
            "the run's last; nanoGPT saves only where its own estimate improved and not at its end, so its weights may "
            "be from earlier (weights_of_step).",
            "evaluations: [seconds since the process started, step, train loss, val loss], each as its line arrived; "
            "the losses are the programs' own estimates over 20 batches, nanoGPT's random, ours fixed.",
        ],
        "machine": machine(),
        "summary": summary,
        "rounds": rounds,
    }
    out_folder = Path(config.to)
    out_folder.mkdir(parents=True, exist_ok=True)
    (out_folder / "results.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    draw_curves(rounds, out_folder / "loss_over_seconds.png")
    print_summary(summary, config.rounds)
    print(f"\nwritten: {out_folder}/results.json and loss_over_seconds.png")


def summarize(name: str, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of a number over the rounds, and its ratios within each round."""
    nanogpt, ours = (np.array([results[side][name] for results in rounds]) for side in LABELS)
    ratios = nanogpt / ours
    return {
        "nanogpt": float(np.median(nanogpt)),
        "ours": float(np.median(ours)),
        "nanogpt_over_ours": ratios.round(4).tolist(),
        "median_nanogpt_over_ours": round(float(np.median(ratios)), 4),
    }


def check_same_data(reference: Path) -> None:
    ours = resolve(ROOT / "data" / DATASET)
    for name in ("train.bin", "val.bin"):
        theirs = reference / "data" / DATASET / name
        if not theirs.is_file():
            raise InputError(f"{theirs} is missing: run `python data/{DATASET}/prepare.py` in the checkout")
        if theirs.read_bytes() != (ours / name).read_bytes():
            raise InputError(f"{theirs} is not {ours / name}: prepare both from the same text")


def run(arguments: list[str], cwd: Path) -> tuple[float, list[tuple[float, str]]]:
    """Run `python arguments` in `cwd`; return the seconds until it exits, and its lines with their arrival times."""
    start = time.perf_counter()
    lines = []
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    with process:
        assert process.stdout
        for line in process.stdout:
            lines.append((time.perf_counter() - start, line.rstrip()))
    wall_s = time.perf_counter() - start
    if process.returncode:
        last = "\n".join(line for _, line in lines[-3:])
        raise InputError(f"in {cwd}: python {shlex.join(arguments)} ended with status {process.returncode}:\n{last}")
    return wall_s, lines


def read_evaluations(lines: list[tuple[float, str]]) -> list[tuple[float, int, float, float]]:
    evaluations = []
    for seconds, line in lines:
        if match := EVALUATION.search(line):
            evaluations.append((round(seconds, 3), int(match[1]), float(match[2].rstrip(",")), float(match[3])))
    return evaluations


def read_ours(out_dir: Path, lines: list[tuple[float, str]]) -> dict[str, Any]:
    records = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    times = np.array([(record["step"], record["time_s"]) for record in records if "loss" in record])
    steps, seconds = np.diff(times, axis=0).T
    folder = checkpoint.find(out_dir, "latest")
    return {
        "ms_per_step": round(1000 * float(np.median(seconds / steps)), 3),
        "val_loss": whole_split_loss(GPT.from_checkpoint(folder)),
        "weights_of_step": int(folder.name.removeprefix("step-")),
    }


def read_nanogpt(out_dir: Path, lines: list[tuple[float, str]]) -> dict[str, Any]:
    times = []
    step = 0
    saved = None
    for _, line in lines:
        if match := EVALUATION.search(line):
            step = int(match[1])
        elif match := STEP_TIME.search(line):
            times.append(float(match[1]))
        elif line.startswith("saving checkpoint"):
            saved = step
    if saved is None:
        raise InputError("nanoGPT saved no checkpoint, so there are no weights to compare: raise --max_iters")
    return {
        "ms_per_step": round(float(np.median(times)), 3),
        "val_loss": whole_split_loss(GPT.from_pretrained(out_dir / "ckpt.pt")),
        "weights_of_step": saved,
    }


def whole_split_loss(model: GPT) -> float:
    """Mean loss in nats over every full window of the validation split, in float32."""
    tokens = open_dataset(ROOT / "data" / DATASET, block_size=BLOCK_SIZE).val
    windows = EvalWindows(tokens, BLOCK_SIZE, 0, 1, model.config.vocab_size)
    return round(evaluate(model, windows, 64, World(0, 1, torch.device("cpu"), torch.float32)), 5)


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    names = re.findall(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return {
        "cpu": names[0] if names else platform.processor(),
        "cpu_flags": [flag for flag in CPU_FLAGS if re.search(rf"\b{flag}\b", text)],
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "commit": commit(ROOT),
    }


def commit(folder: Path) -> str | None:
    """The commit of a checkout, with "-dirty" if tracked files differ from it; None without git."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def print_summary(summary: dict[str, Any], rounds: int) -> None:
    units = {"wall_s": "whole process, s", "ms_per_step": "step, ms", "val_loss": "validation loss, whole split"}
    print(f"\n{f'medians of {rounds} rounds':30}{'nanoGPT':>12}{'ours':>12}{'nanoGPT / ours':>26}")
    for name, numbers in summary.items():
        ratios = numbers["nanogpt_over_ours"]
        spread = f"{numbers['median_nanogpt_over_ours']:.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        digits = 4 if name == "val_loss" else 2
        print(f"{units[name]:30}{numbers['nanogpt']:>12.{digits}f}{numbers['ours']:>12.{digits}f}{spread:>26}")


def draw_curves(rounds: list[dict[str, Any]], path: Path) -> None:
    """Draw validation loss over wall seconds, a curve per run, with a tick at the end of each process."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError('matplotlib is not installed, so there is no picture; run pip install -e ".[plots]"') from None
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    lowest = min(row[3] for results in rounds for run in results.values() for row in run["evaluations"])
    for side, label in LABELS.items():
        for number, results in enumerate(rounds):
            seconds, _, _, losses = zip(*results[side]["evaluations"], strict=True)
            axes.plot(
                seconds,
                losses,
                color=COLORS[side],
                alpha=0.9 if len(rounds) == 1 else 0.6,
                marker="o",
                markersize=3.5,
                label=None if number else label,
            )
            axes.plot(results[side]["wall_s"], 0.02, "|", color=COLORS[side], transform=axes.get_xaxis_transform())
    # Both start at the loss of a random network; a logarithmic axis shows the rest better.
    axes.set_yscale("log")
    ticks = [loss for loss in (1.5, 1.6, 1.8, 2.0, 2.25, 2.5, 3.0, 3.5, 4.0) if loss > 0.95 * lowest]
    axes.set_yticks(ticks, [f"{loss:g}" for loss in ticks])
    axes.minorticks_off()
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds since the process started (| where it ended)")
    axes.set_ylabel("validation loss as each program estimates it, nats")
    runs = f"{len(rounds)} runs each" if len(rounds) > 1 else "one run each"
    axes.set_title(f"The same small GPT on a CPU, whole process, {runs}", loc="left", fontsize=11)
    axes.grid(color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    run_script(main)
