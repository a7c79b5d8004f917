"""bfloat16 against float32 on a CPU: whole steps beside the trial by which `--dtype=auto` chooses, alternating.

    python runs/cpu_step/bfloat16.py xeon_amx.json

A step is train.py's: batch, forward, backward, clipping and update. The trial of nanogpt/trials.py is made anew, not
recalled. ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 takes AMX from a CPU that has it, AVX512_CORE the dot products too.

Prediction of bfloat16.json, which an earlier version of this script wrote: by AVX-512's dot products (avx512_bf16,
without AMX) a bfloat16 product is up to twice as fast, a small step as fast as in float32. Outcome: both are slower at
any size, so `--dtype=auto` required AMX. On an AMD EPYC with the same instructions they are faster: no flag decides.

Prediction for the trial: from 1.15 on, whole steps are faster in bfloat16 too. Outcome (bfloat16_xeon_*.json): steps of
narrow models break even at 1.4, which became the threshold; by it, `auto` names the faster step wherever the steps
differ by more than the noise. All files are of one Intel Xeon, which other programs used too; the field `auto` of the
first rows was set anew when the threshold became 1.4.
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "runs/shakespeare_char_cpu"))

from compare_with_nanogpt import machine  # noqa: E402

from bench import BenchConfig, open_tokens  # noqa: E402
from budget import training_steps  # noqa: E402
from configurator import parse  # noqa: E402
from load import micro_batch_sizes, new_model_config  # noqa: E402
from model import GPT  # noqa: E402
from nanogpt import trials  # noqa: E402
from nanogpt.device import disable_malloc_trim  # noqa: E402
from nanogpt.distributed import World  # noqa: E402
from nanogpt.timing import time_steps  # noqa: E402
from train import train_step  # noqa: E402

SECONDS = 8.0  # of each recipe
MIN_ROUNDS = 3
TRIALS = 3
CHARACTERS = "--block_size=64 --vocab_size=65"
RECIPES = {
    "train_shakespeare_fast_cpu.py": f"config/train_shakespeare_fast_cpu.py {CHARACTERS}",
    "train_shakespeare_char_cpu.py": f"config/train_shakespeare_char_cpu.py {CHARACTERS}",
    "64 channels, 16 × 64": f"{CHARACTERS} --n_layer=4 --n_head=2 --n_embd=64 --batch_size=16",
    "modern, Muon, 64 channels, 16 × 64": f"{CHARACTERS} --n_layer=4 --n_head=2 --n_embd=64 --batch_size=16 "
    "--arch=modern --optimizer=muon",
    "modern, Muon, 160 channels, 32 × 64": f"{CHARACTERS} --n_layer=4 --n_head=5 --n_embd=160 --batch_size=32 "
    "--arch=modern --optimizer=muon",
    "256 channels, 16 × 128": "--block_size=128 --vocab_size=65 --n_layer=4 --n_head=8 --n_embd=256 --batch_size=16",
    "GPT-2 124M, 4 × 256": "--block_size=256 --batch_size=4",
}


def measure(flags: str) -> dict[str, Any]:
    """The trial's outcomes, and the seconds of whole steps in both dtypes, in turn."""
    config = parse(BenchConfig, [*flags.split(), "--dataset="])[0]
    model_config = new_model_config(config, config.vocab_size)
    rows = micro_batch_sizes(config, 1)[0] * model_config.block_size
    sizes = trials.trial_shape(rows, model_config.n_embd, model_config.n_inner)
    outcomes = [round(trials.measure_bfloat16_speedup(sizes), 2) for _ in range(TRIALS)]
    sides = []
    for dtype in (torch.float32, torch.bfloat16):
        world = World(0, 1, torch.device("cpu"), dtype)
        torch.manual_seed(config.seed)
        steps = training_steps(config, GPT(model_config), open_tokens(config, model_config), world, train_step)
        time_steps(steps, 2, world)
        sides.append((steps, world))
    seconds: list[list[float]] = [[], []]
    start = time.perf_counter()
    while len(seconds[0]) < MIN_ROUNDS or time.perf_counter() - start < SECONDS:
        for side, (steps, world) in zip(seconds, sides, strict=True):
            side += time_steps(steps, 1, world)[0]
    ratios = [float32 / bfloat16 for float32, bfloat16 in zip(*seconds, strict=True)]
    auto = "bfloat16" if statistics.median(outcomes) >= trials.MIN_BFLOAT16_SPEEDUP else "float32"
    return {
        "trial": outcomes,
        "trial shape": sizes,
        "auto": auto,
        "step, bfloat16's speed over float32's": [round(q, 2) for q in statistics.quantiles(ratios, n=4)],
        "ms float32, bfloat16, medians": [round(1000 * statistics.median(side), 1) for side in seconds],
        "steps of each": len(ratios),
    }


def main() -> None:
    disable_malloc_trim()
    path = Path(__file__).with_name(f"bfloat16_{sys.argv[1]}")
    report = json.loads(path.read_text()) if path.exists() else {}
    flags = trials.cpu_info().get("flags", "").split()
    known = [flag for flag in flags if flag.startswith(("avx", "amx"))]
    report |= {**machine(), "flags": known, "limited to": os.environ.get("ONEDNN_MAX_CPU_ISA")}
    names = sys.argv[2:] or list(RECIPES)
    for name in names:
        report.setdefault("recipes", {})[name] = measure(RECIPES[name])
        print(name, report["recipes"][name], flush=True)
        path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
