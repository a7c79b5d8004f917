"""Time of a DDP step in another checkout and in this one, and of Muon's update in DDP and sharded.

    python runs/shards/step_time.py --old=CHECKOUT --dataset=data/shakespeare_char

Steps: whole runs of train.py on two CPU processes in turn, one thread each; the median step of each run, and the median
ratio of the pairs. Muon: one optimizer with random gradients on four processes, the size of GPT-2 (124M), in turn as
DDP's (every rank has all weights; updates are gathered) and as FSDP2's (rows of the maps go to their owners and back).
Predictions, before the first run: steps 1.00 ± 0.02; Muon's update 1.5 times as fast sharded, since the Newton-Schulz
products are shared by both, and everything else is not. Writes step_time.json beside itself: 0.99 and 1.03 in
the median of noisy pairs; 1.7 times.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
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
UPDATES = 3


def torchrun(processes: int, *command: str, cwd: Path = ROOT) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(cwd)}
    subprocess.run([*launcher, *command], cwd=cwd, env=environment, check=True, capture_output=True)


def step_seconds(checkout: Path, dataset: Path, optimizer: str) -> float:
    """The median step of a run of this checkout's train.py, without the first two."""
    with tempfile.TemporaryDirectory() as folder:
        keys = KEYS | {"optimizer": optimizer, "dataset": dataset, "out_dir": f"{folder}/out"}
        torchrun(2, "train.py", *(f"--{name}={value}" for name, value in keys.items()), cwd=checkout)
        lines = [json.loads(line) for line in Path(folder, "out/metrics.jsonl").read_text().splitlines()]
    times = [line["time_s"] for line in lines if "loss" in line][1:]
    return statistics.median(b - a for a, b in itertools.pairwise(times))


def time_muon(out: Path) -> None:
    """As one of four processes, time the update in both ways, in turn."""
    import torch

    from load import build_model
    from model import GPTConfig
    from nanogpt import distributed
    from nanogpt.optim import Optimizer
    from nanogpt.sharding import local, make_mesh

    torch.set_num_threads(1)
    world = distributed.start("cpu", "float32")
    optimizers = []
    for mesh in (None, make_mesh("cpu", world.size, world.size)):
        here = distributed.World(world.rank, world.size, world.device, world.dtype, mesh=mesh)
        model = build_model(GPTConfig(bias=False, block_size=64), None, here)
        optimizers.append(Optimizer(model, here, kind="muon", learning_rate=1e-3))
    one, zero = torch.ones(()), torch.zeros(())
    seconds: list[list[float]] = [[], []]
    for _ in range(UPDATES + 1):
        for i, optimizer in enumerate(optimizers):
            for p in optimizer.parameters.values():
                p.grad = torch.empty_like(p)
                local(p.grad).normal_()
            world.all_reduce_sum(torch.ones(1))
            start = time.perf_counter()
            optimizer.step(1.0, one, zero)
            world.all_reduce_sum(torch.ones(1))
            seconds[i].append(time.perf_counter() - start)
            optimizer.zero_grad()
    if world.is_main:
        out.write_text(json.dumps({"ddp": seconds[0][1:], "sharded": seconds[1][1:]}))
    world.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", required=True, type=Path)
    parser.add_argument("--dataset", required=True, type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE / "step_time.json")
    arguments = parser.parse_args()
    from compare_with_nanogpt import machine

    report: dict[str, Any] = {"machine": machine()}
    with tempfile.TemporaryDirectory() as folder:
        torchrun(4, __file__, "muon", f"{folder}/muon.json")
        muon = json.loads(Path(folder, "muon.json").read_text())
    muon["ratio"] = statistics.median(a / b for a, b in zip(muon["ddp"], muon["sharded"], strict=True))
    report["muon"] = muon
    print(muon, flush=True)
    for optimizer in ("adamw", "muon"):
        pairs = []
        for _ in range(arguments.rounds):
            checkouts = (arguments.old, ROOT)
            pairs.append([step_seconds(path, arguments.dataset.resolve(), optimizer) for path in checkouts])
        report[f"step, {optimizer}"] = {"pairs": pairs, "ratio": statistics.median(a / b for a, b in pairs)}
        print(optimizer, report[f"step, {optimizer}"], flush=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["muon"]:
        time_muon(Path(sys.argv[2]))
    else:
        main()
