"""LoRA against full fine-tuning of one model, at equal steps and at equal time.

    python runs/finetune/lora.py --init_from=model.gguf --dataset=data/shakespeare_smollm2 --steps=200 \
        --full_rates 3e-5 1e-4 3e-4 --lora_rates 3e-4 1e-3 3e-3 -- --dtype=float32

Every run is a process of train.py with the same rows and the default cosine schedule; flags after -- go to all of them.
Each kind trains `steps` updates at each of its rates. Then short runs of both, in turn, say how long a step of LoRA
takes beside one of all weights, and the best rate of LoRA, by validation loss, trains for as many updates as fit into
the time of the best full run. Writes lora.json and lora.md into --out. Memory is the peak of the process in the host's
memory; a checkpoint has weights and optimizer state.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE.parent / "shakespeare_char_cpu")]

from compare_with_nanogpt import machine  # noqa: E402

HEADINGS = ("steps", "rate", "val loss: before", "best", "last", "peak MB", "checkpoint MB")


def train(arguments: argparse.Namespace, steps: int, rate: float, lora: bool) -> dict[str, Any]:
    """Train in a process of its own; return its losses, seconds and bytes."""
    with tempfile.TemporaryDirectory() as folder:
        keys: dict[str, Any] = {
            "init_from": arguments.init_from,
            "dataset": arguments.dataset,
            "out_dir": folder + "/out",
            "block_size": arguments.block_size,
            "batch_size": arguments.batch_size,
            "gradient_accumulation_steps": arguments.gradient_accumulation_steps,
            "learning_rate": rate,
            "max_iters": steps,
            "lr_decay_iters": steps,
            "warmup_iters": steps // 20,
            "weight_decay": 0.0,
            "eval_interval": max(steps // arguments.evaluations, 1),
            "eval_iters": arguments.eval_iters,
            "eval_train": False,
            "sample_chars": 0,
            "log_interval": 1,
            "checkpoint_minutes": 0,
            "always_save_checkpoint": False,
        }
        if lora:
            keys |= {f"lora_{name}": getattr(arguments, name) for name in ("rank", "alpha", "targets")}
        flags = [f"--{name}={value}" for name, value in keys.items()] + arguments.more
        with Path(folder, "output").open("w+") as output:
            process = subprocess.Popen([sys.executable, "train.py", *flags], cwd=ROOT, stdout=output, stderr=output)
            _, status, usage = os.wait4(process.pid, 0)
            output.seek(0)
            text = output.read()
        assert status == 0, text
        lines = [json.loads(line) for line in Path(folder, "out/metrics.jsonl").read_text().splitlines()]
        losses = [line["val_loss"] for line in lines if "val_loss" in line]
        seconds = [line["time_s"] for line in lines if "loss" in line]
        last = max(Path(folder, "out/ckpt").glob("step-*"))
        trained = re.search(r"of which ([\d,]+)", text) or re.search(r"model +([\d,]+) parameters", text)
        assert trained
        return {
            "kind": "lora" if lora else "full",
            "steps": steps,
            "rate": rate,
            "losses": losses,
            "before": losses[0],
            "best": min(losses),
            "last": losses[-1],
            "s_per_step": (seconds[-1] - seconds[0]) / max(len(seconds) - 1, 1),  # without the first, which warms up
            "seconds": seconds[-1],
            "peak_mb": usage.ru_maxrss * 1024 / 1e6,
            "checkpoint_mb": sum(file.stat().st_size for file in last.iterdir()) / 1e6,
            "trained": int(trained[1].replace(",", "")),
        }


def time_step(arguments: argparse.Namespace, rate: float, lora: bool) -> float:
    """Seconds of a step in a short run."""
    return train(arguments, 4, rate, lora)["s_per_step"]


def to_row(title: str, run: dict[str, Any]) -> str:
    cells = [title, f"{run['steps']:,}", f"{run['rate']:g}"]
    cells += [f"{run[name]:.4f}" for name in ("before", "best", "last")]
    cells += [f"{run['peak_mb']:.0f}", f"{run['checkpoint_mb']:.1f}"]
    return f"| {' | '.join(cells)} |"


def to_markdown(report: dict[str, Any]) -> str:
    """The report's table, and what it was made of."""
    full, lora = report["full"], report["lora"]
    rows = [to_row("full", full), to_row("LoRA, equal steps", lora), to_row("LoRA, equal time", report["equal_time"])]
    settings = report["settings"]
    grid = [f"{run['kind']} {run['rate']:g}: {run['best']:.4f}" for run in report["runs"]]
    return "\n".join(
        [
            f"# LoRA and full fine-tuning: {settings['init_from']} on {settings['dataset']}",
            "",
            f"Rank {settings['rank']}, alpha {settings['alpha']:g}, on {settings['targets']}: {lora['trained']:,} of "
            f"{full['trained']:,} parameters train. {report['machine']['cpu']}, {report['machine']['cores']} cores.",
            "",
            f"| | {' | '.join(HEADINGS)} |",
            "|---" * (len(HEADINGS) + 1) + "|",
            *rows,
            "",
            f"Best validation loss at each rate, {full['steps']:,} steps: {'; '.join(grid)}.",
            f"A step of LoRA takes {statistics.median(report['step_ratios']):.2f} of the time of one of all weights.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init_from", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--full_rates", nargs="+", type=float, default=[3e-5, 1e-4, 3e-4])
    parser.add_argument("--lora_rates", nargs="+", type=float, default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=float, default=32.0)
    parser.add_argument("--targets", default="attention,mlp")
    parser.add_argument("--block_size", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--evaluations", type=int, default=5, help="of each run, beside the one before it")
    parser.add_argument("--eval_iters", type=int, default=25)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("more", nargs="*", help="flags of train.py, after --")
    arguments = parser.parse_args()
    for name in ("init_from", "dataset"):
        if os.path.exists(path := getattr(arguments, name)):
            setattr(arguments, name, os.path.abspath(path))

    runs = []
    for kind, rates in (("full", arguments.full_rates), ("lora", arguments.lora_rates)):
        for rate in rates:
            runs.append(train(arguments, arguments.steps, rate, lora=kind == "lora"))
            print(to_row(kind, runs[-1]), flush=True)
    full, lora = (
        min((run for run in runs if run["kind"] == kind), key=lambda run: run["best"]) for kind in ("full", "lora")
    )
    ratios = [time_step(arguments, lora["rate"], True) / time_step(arguments, full["rate"], False) for _ in range(3)]
    equal_time = train(arguments, round(full["steps"] / statistics.median(ratios)), lora["rate"], lora=True)
    settings = {name: value for name, value in vars(arguments).items() if name != "out"}
    for name in ("init_from", "dataset"):
        settings[name] = Path(settings[name]).name
    report = {"machine": machine(), "settings": settings, "full": full, "lora": lora, "equal_time": equal_time}
    report |= {"step_ratios": ratios, "runs": runs}
    (arguments.out / "lora.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (arguments.out / "lora.md").write_text(to_markdown(report), encoding="utf-8")
    print(to_markdown(report))


if __name__ == "__main__":
    main()
