"""The rate, steps and warmup of fine-tuning, by a grid of short runs:

    python runs/finetune/grid.py --init_from=model.gguf --dataset=data/shakespeare_smollm2

Every run starts from the same weights, passes over the same number of tokens and is evaluated on the same 16 windows.
One key at a time differs from the recipe. Results go to FILE, by --out, a run at a time; runs that it holds are not
repeated.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE.parent / "shakespeare_char_cpu")]

from compare_with_nanogpt import machine  # noqa: E402

EVAL_ROWS = 16


def runs(tokens: int, rate: float, rows: int, block_size: int) -> dict[str, dict[str, Any]]:
    """The keys of each run by its name. rate, rows: of the recipe in the middle of the grid."""
    steps = tokens // (rows * block_size)
    middle = {"learning_rate": rate, "batch_size": rows, "max_iters": steps, "warmup_iters": steps // 10}
    grid = {f"rate {rate * factor:.1e}": middle | {"learning_rate": rate * factor} for factor in (0.25, 0.5, 1, 2, 4)}
    for factor in (0.5, 2):
        # Adam's rate for another batch grows with its root (Malladi et al. 2022).
        changed = {"batch_size": int(rows * factor), "max_iters": int(steps / factor)}
        changed["warmup_iters"] = changed["max_iters"] // 10
        grid[f"{int(rows * factor)} rows a step"] = middle | changed | {"learning_rate": rate * factor**0.5}
    grid["no warmup"] = middle | {"warmup_iters": 0}
    grid["constant rate"] = middle | {"decay_lr": False, "learning_rate": rate / 2}
    grid["weight decay 0"] = middle | {"weight_decay": 0.0}
    grid["beta2 0.99"] = middle | {"beta2": 0.99}
    grid["muon"] = middle | {"optimizer": "muon", "muon_lr": 20 * rate}
    return grid


def train(config: str, keys: dict[str, Any]) -> dict[str, Any]:
    """Run train.py; return its seconds and its losses before and after."""
    with tempfile.TemporaryDirectory() as folder:
        keys = keys | {"out_dir": folder + "/out", "eval_interval": 10**6, "eval_train": False, "sample_chars": 0}
        flags = [f"--{name}={value}" for name, value in keys.items()]
        done = subprocess.run([sys.executable, "train.py", config, *flags], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        lines = [json.loads(line) for line in Path(folder, "out", "metrics.jsonl").read_text().splitlines()]
    first, last = (next(line for line in order if "val_loss" in line) for order in (lines, lines[::-1]))
    return {"time_s": last["time_s"], "before": first["val_loss"], "val_loss": last["val_loss"], "bpb": last["val_bpb"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="config/finetune_smollm2.py")
    parser.add_argument("--init_from", required=True, help="a model in its own tokens")
    parser.add_argument("--dataset", required=True, type=Path, help="prepared with the model's tokenizer")
    parser.add_argument("--tokens", type=int, default=20_480, help="of each run")
    parser.add_argument("--rate", type=float, default=2e-4, help="in the middle of the grid")
    parser.add_argument("--rows", type=int, default=4, help="a step, in the middle of the grid")
    parser.add_argument("--block_size", type=int, default=256)
    parser.add_argument("--only", nargs="+", help="names of runs")
    parser.add_argument("--out", type=Path, default=HERE / "grid.json")
    arguments = parser.parse_args()

    settings = {name: Path(str(value)).name for name, value in vars(arguments).items() if name not in ("out", "only")}
    report: dict[str, Any] = {"machine": machine(), "settings": settings, "runs": {}}
    if arguments.out.exists():
        report = json.loads(arguments.out.read_text())
        assert report["settings"] == settings, f"{arguments.out} has runs with other settings"
    for name, keys in runs(arguments.tokens, arguments.rate, arguments.rows, arguments.block_size).items():
        if name in report["runs"] or (arguments.only and name not in arguments.only):
            continue
        keys |= {
            "init_from": arguments.init_from,
            "dataset": arguments.dataset.resolve(),
            "gradient_accumulation_steps": 1,
        }
        keys |= {"block_size": arguments.block_size, "eval_iters": EVAL_ROWS // keys["batch_size"]}
        report["runs"][name] = train(arguments.config, keys)
        print(f"{name:20} {report['runs'][name]}", flush=True)
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
