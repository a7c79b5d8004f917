"""Compare the speed of two checkouts of this project, in turn: python runs/restructuring/measure.py --old=CHECKOUT

Made for the restructuring after version 0.1, which should change no speed: a training step of three models by each
checkout's own bench.py, `train.py --help`, a start to the first step, and a resume. Each round runs old then new, the
next new then old; the figure is the median of the rounds' ratios old / new (above 1: the new one is faster).
Prediction, written before: 1.00 for the steps, 1.0 for --help and the start, above 1 for the resume, which no longer
imports torch's compiler.
"""

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from configurator import key, parse  # noqa: E402
from nanogpt.errors import run_script  # noqa: E402

STEPS = {
    "small CPU run": "config/train_shakespeare_char_cpu.py --dataset= --vocab_size=65 --steps=100",
    "fast recipe of 0.1": "--vocab_size=65 --arch=modern --bias=False --n_layer=4 --n_head=3 --n_kv_head=1 --n_embd=96 "
    "--n_inner=192 --batch_size=24 --block_size=64 --gradient_accumulation_steps=1 --optimizer=muon "
    "--muon_momentum=0.85 --grad_clip=0 --compile=False --steps=60",
    "GPT-2 (124M)": "config/train_gpt2.py --dataset= --wandb_log=False --compile=False --block_size=256 --batch_size=4 "
    "--gradient_accumulation_steps=1 --steps=6",
}


@dataclass
class RestructuringConfig:
    """Which checkouts to compare, and how often."""

    old: str = key("", "checkout of the old build")
    data: str = key("", "a prepared dataset, for the starts; '' skips them")
    dtype: str = key("float32", "autocast dtype of the steps")
    rounds: int = key(5, "pairs of each", ge=1)
    to: str = key("runs/restructuring/results.json", "file of the results")


def run(checkout: Path, command: str) -> tuple[float, str]:
    """Seconds and output of a script in a checkout."""
    start = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    result = subprocess.run(
        [sys.executable, *command.split()], cwd=checkout, env=environment, capture_output=True, text=True, check=True
    )
    return time.perf_counter() - start, result.stdout + result.stderr


def step_ms(checkout: Path, flags: str, dtype: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        run(checkout, f"bench.py {flags} --dtype={dtype} --device=cpu --to={folder}/figures.json")
        figures = json.loads(Path(folder, "figures.json").read_text())
    text = json.dumps(figures)
    return float(re.search(r'"ms": ([\d.]+)', text)[1])  # type: ignore[index]


def help_s(checkout: Path) -> float:
    return run(checkout, "train.py --help")[0]


def start_s(checkout: Path, data: str) -> float:
    """Seconds from the start of the process to the end of its first step, by its own line."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--dataset={data} --out_dir={folder}/out --max_iters=1 --eval_iters=1 --sample_chars=0 --dtype=float32"
        return run(checkout, f"train.py config/train_shakespeare_char_cpu.py {flags}")[0]


def resumed_start_s(checkout: Path, data: str) -> float:
    """Whole process of a resume for one more step."""
    with tempfile.TemporaryDirectory() as folder:
        flags = (
            f"--dataset={data} --out_dir={folder}/out --eval_iters=1 --sample_chars=0 --dtype=float32 --eval_interval=0"
        )
        recipe = "train.py config/train_shakespeare_char_cpu.py"
        run(checkout, f"{recipe} {flags} --max_iters=1")
        return run(checkout, f"{recipe} {flags} --max_iters=2 --resume=True")[0]


def main() -> None:
    config, _ = parse(RestructuringConfig, description="Compare the speed of two checkouts.")
    old = Path(config.old).resolve()
    measures: dict[str, Any] = {name: lambda c, f=flags: step_ms(c, f, config.dtype) for name, flags in STEPS.items()}
    measures["train.py --help"] = help_s
    if config.data:
        data = str(Path(config.data).resolve())
        measures["start to first step, whole process"] = lambda c: start_s(c, data)
        measures["resume for one step, whole process"] = lambda c: resumed_start_s(c, data)
    results: dict[str, Any] = {"cpu": cpu_flags(), "threads": os.cpu_count(), "dtype": config.dtype, "ratios": {}}
    for name, measure in measures.items():
        pairs = []
        for number in range(config.rounds):
            order = [old, ROOT] if number % 2 == 0 else [ROOT, old]
            seconds = {checkout: measure(checkout) for checkout in order}
            pairs.append((seconds[old], seconds[ROOT]))
        ratios = [before / after for before, after in pairs]
        figures = {"median": statistics.median(ratios), "ratios": ratios, "old": [a for a, _ in pairs]}
        results["ratios"][name] = figures | {"new": [b for _, b in pairs]}
        print(f"{name:<38} {figures['median']:.3f}  ({min(ratios):.3f} to {max(ratios):.3f})", flush=True)
        Path(config.to).write_text(json.dumps(results, indent=1) + "\n")


def cpu_flags() -> str:
    """The processor and those of its flags that matter for matrix products."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else platform.processor()
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in info]
    name = re.search(r"model name\s*: (.*)", info)
    return f"{name[1] if name else platform.machine()}: {' '.join(flags)}"


if __name__ == "__main__":
    run_script(main)  # type: ignore[arg-type]
