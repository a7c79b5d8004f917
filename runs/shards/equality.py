"""Sharded training against one process: the largest differences of losses and weights.

    python runs/shards/equality.py --dataset=data/shakespeare_char

Trains 20 steps of a small model as DDP, FSDP2 and HSDP (2 copies of 2 shards) on four CPU processes, and on one, with
each optimizer, architecture and dtype. Predictions, before the first run: float32 losses and weights within 1e-5 of one
process, FSDP2 within 1e-6 of DDP; bfloat16 losses within 0.01. Writes equality.json and equality.md beside itself.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE.parent / "shakespeare_char_cpu")]

PROCESSES = 4
STEPS = 20
SIZES = {"n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": 64, "batch_size": 4, "gradient_accumulation_steps": 8}
KEYS = SIZES | {
    "micro_batch_size": 2,
    "max_iters": STEPS,
    "warmup_iters": 5,
    "learning_rate": 3e-3,
    "eval_interval": 10,
    "eval_iters": 5,
    "eval_train": False,
    "sample_chars": 0,
    "log_interval": 1,
    "dropout": 0.0,
    "bias": False,
    "device": "cpu",
}
SHARDS = {"one process": 1, "DDP": 1, "FSDP2": 4, "HSDP": 2}
CASES = list(itertools.product(("adamw", "muon"), ("modern", "gpt2"), ("bfloat16", "float32")))


def train_all(folder: Path, dataset: str, ways: list[str]) -> None:
    """Train each case in each of the ways, as one of the processes of torchrun or alone."""
    import train

    for way, (optimizer, arch, dtype) in itertools.product(ways, CASES):
        keys = KEYS | {"optimizer": optimizer, "arch": arch, "dtype": dtype, "shards": SHARDS[way]}
        keys |= {"dataset": dataset, "out_dir": str(folder / f"{way} {optimizer} {arch} {dtype}")}
        sys.argv = ["train.py", *(f"--{name}={value}" for name, value in keys.items())]
        with contextlib.redirect_stdout(io.StringIO()):
            train.main()


def difference(one: Path, other: Path) -> tuple[float, float]:
    """The largest absolute differences of the losses and of the weights after the last step."""
    from nanogpt import checkpoint

    losses = []
    for folder in (one, other):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] if "loss" in line else line["val_loss"] for line in lines])
    a, b = (checkpoint.load(folder / f"ckpt/step-{STEPS:06d}").model for folder in (one, other))
    assert a.keys() == b.keys()
    loss = max(abs(x - y) for x, y in zip(*losses, strict=True))
    return loss, max((a[name] - b[name]).abs().max().item() for name in a)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--out", type=Path, default=HERE)
    arguments = parser.parse_args()
    from compare_with_nanogpt import machine

    dataset = os.path.abspath(arguments.dataset)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={PROCESSES}"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        for ways, command in ((["one process"], []), (["DDP", "FSDP2", "HSDP"], launcher)):
            worker = [__file__, "worker", name, dataset, *ways]
            subprocess.run([sys.executable, *command, *worker], check=True, env=environment)
        rows: list[dict[str, Any]] = []
        for case in CASES:
            paths = {way: folder / " ".join((way, *case)) for way in SHARDS}
            for way in ("DDP", "FSDP2", "HSDP"):
                row: dict[str, Any] = {"way": way, "optimizer": case[0], "arch": case[1], "dtype": case[2]}
                row["loss"], row["weights"] = difference(paths["one process"], paths[way])
                row["loss_ddp"], row["weights_ddp"] = difference(paths["DDP"], paths[way])
                rows.append(row)
    report = {"machine": machine(), "processes": PROCESSES, "steps": STEPS, "rows": rows}
    (arguments.out / "equality.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    lines = ["| | optimizer | arch | dtype | losses | weights | losses, to DDP | weights, to DDP |", "|---" * 8 + "|"]
    for row in rows:
        figures = (f"{row[name]:.1e}" for name in ("loss", "weights", "loss_ddp", "weights_ddp"))
        lines.append(f"| {row['way']} | {row['optimizer']} | {row['arch']} | {row['dtype']} | {' | '.join(figures)} |")
    (arguments.out / "equality.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        train_all(Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
    else:
        main()
