"""Two levers of the step on a CPU, each against the step without it, in turn, in float32: medians of ratios.

    python runs/cpu_step/levers.py

1. Plain attention (three operations) instead of torch's fused kernel, inside whole models. Prediction: it wins at 64
   positions, where the fused kernel's set-up dominates, and loses at 256, where it writes and reads the square.
2. Freed memory kept by the C library (nanogpt/distributed.py, keep_freed_memory), in fresh processes. Prediction: a
   gain of the page faults' own time, about 4% (2.5 to 5 ms of 60).

Outcome (levers.json): both as predicted, the first by little: 1% either way in float32. It stays for bfloat16, where
the fused kernel was found 3 to 8 times slower at 64 positions on a CPU that has the format; this one does not.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import model as model_file  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from nanogpt.distributed import keep_freed_memory  # noqa: E402

SMALL = {"n_layer": 4, "n_head": 4, "n_embd": 128, "vocab_size": 65, "bias": False}
WIDE = {"n_layer": 2, "n_head": 12, "n_embd": 768, "vocab_size": 500, "bias": False}


def step(model: GPT, idx: torch.Tensor) -> float:
    start = time.perf_counter()
    model(idx, idx)[1].backward()
    model.zero_grad(set_to_none=True)
    return time.perf_counter() - start


def attention() -> list[dict]:
    keep_freed_memory()
    rows = []
    for sizes, B, T, count in (
        (SMALL, 12, 64, 80),
        (SMALL, 6, 128, 60),
        (SMALL, 6, 256, 40),
        (WIDE, 4, 64, 30),
        (WIDE, 4, 256, 15),
    ):
        model, idx = GPT(GPTConfig(block_size=T, **sizes)), torch.randint(sizes["vocab_size"], (B, T))
        ratios = []
        for _ in range(count):
            times = []
            for limit in (0, T):  # fused, plain
                model_file.PLAIN_ATTENTION_UP_TO = limit
                times.append(step(model, idx))
            ratios.append(times[0] / times[1])
        rows.append(
            {"n_embd": sizes["n_embd"], "rows": B, "T": T, "fused_over_plain": round(statistics.median(ratios[5:]), 3)}
        )
        print(rows[-1], flush=True)
    return rows


def memory(rounds: int = 7) -> dict:
    def one(keep: str) -> float:
        run = subprocess.run([sys.executable, __file__, keep], capture_output=True, text=True, check=True)
        return float(run.stdout)

    pairs = [(one("return"), one("keep")) for _ in range(rounds)]
    row = {"returned_ms": [round(1e3 * a, 1) for a, _ in pairs], "kept_ms": [round(1e3 * b, 1) for _, b in pairs]}
    row["returned_over_kept"] = round(statistics.median(a / b for a, b in pairs), 3)
    print(row)
    return row


def main() -> None:
    facts = {"torch": torch.__version__, "threads": torch.get_num_threads(), "dtype": "float32"}
    facts |= {"attention": attention(), "freed_memory": memory()}
    (Path(__file__).parent / "levers.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] in (["keep"], ["return"]):  # one side of the second lever: the median step of a fresh process
        if sys.argv[1] == "keep":
            keep_freed_memory()
        model, idx = GPT(GPTConfig(block_size=64, **SMALL)), torch.randint(65, (12, 64))
        print(statistics.median([step(model, idx) for _ in range(120)][20:]))
    else:
        main()
