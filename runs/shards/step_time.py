"""Time of a step in a checkout of before shards and in this one: of DDP, and of Muon sharded.

    python runs/shards/step_time.py --old=CHECKOUT --dataset=data/shakespeare_char --rounds=15

Whole runs of train.py in turn, on a CPU, each process with one thread; the median step of each run, and the median
ratio of the pairs. DDP: a small model on two processes, in both checkouts. Sharded Muon: the size of GPT-2 (124M) on
four processes, by DDP in the old checkout (every rank has all weights; updates are gathered) and with --shards=0 here
(rows of the maps go to their owners and back). Predictions, before the first run: DDP 1.00 ± 0.02; Muon 1.5 times as
fast sharded, since the Newton-Schulz products are shared by both, and everything else is not. Writes step_time.json
beside itself: DDP 1.03 (AdamW) and 1.09 (Muon) times as fast as before, with kernels that are faster since; Muon 1.34.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE.parent / "shakespeare_char_cpu")]

KEYS = {
    "n_layer": 6,
    "n_head": 6,
    "n_embd": 384,
    "block_size": 128,
    "batch_size": 4,
    "gradient_accumulation_steps": 4,
    "max_iters": 12,
    "warmup_iters": 0,
    "eval_interval": 0,
    "eval_iters": 1,
    "eval_train": False,
    "sample_chars": 0,
    "log_interval": 1,
    "device": "cpu",
    "dtype": "float32",
}
LARGE = {
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "block_size": 64,
    "batch_size": 1,
    "max_iters": 5,
    "always_save_checkpoint": False,
    "optimizer": "muon",
}


def torchrun(processes: int, *command: str, cwd: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(cwd)}
    subprocess.run([*launcher, *command], cwd=cwd, env=environment, check=True, capture_output=True)


def step_seconds(checkout: Path, dataset: Path, processes: int, **changes: Any) -> float:
    """The median step of a run of this checkout's train.py, without the first two."""
    with tempfile.TemporaryDirectory() as folder:
        keys = KEYS | {"dataset": dataset, "out_dir": f"{folder}/out"} | changes
        torchrun(processes, "train.py", *(f"--{name}={value}" for name, value in keys.items()), cwd=checkout)
        lines = [json.loads(line) for line in Path(folder, "out/metrics.jsonl").read_text().splitlines()]
    times = [line["time_s"] for line in lines if "loss" in line][1:]
    return statistics.median(b - a for a, b in itertools.pairwise(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", required=True, type=Path)
    parser.add_argument("--dataset", required=True, type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--large_rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE / "step_time.json")
    arguments = parser.parse_args()
    from compare_with_nanogpt import machine

    old, dataset = arguments.old.resolve(), arguments.dataset.resolve()
    cases = {
        "ddp, adamw": (arguments.rounds, 2, {"optimizer": "adamw"}, {}),
        "ddp, muon": (arguments.rounds, 2, {"optimizer": "muon"}, {}),
        "sharded muon, 124M": (arguments.large_rounds, 4, LARGE, {"shards": 0}),
    }
    report: dict[str, Any] = {"machine": machine(), "old": arguments.old.name}
    for name, (rounds, processes, keys, new_keys) in cases.items():
        pairs = []
        for _ in range(rounds):
            before = step_seconds(old, dataset, processes, **keys)
            pairs.append([before, step_seconds(ROOT, dataset, processes, **keys, **new_keys)])
            print(name, pairs[-1], flush=True)
        report[name] = {"pairs": pairs, "ratio": statistics.median(a / b for a, b in pairs)}
        print(name, report[name]["ratio"], flush=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
