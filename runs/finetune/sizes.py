"""How the best rate of fine-tuning depends on a model's width: python runs/finetune/sizes.py --books=FOLDER --text=FILE

Pretrains models of three widths on books, then fine-tunes each on a text that they have not seen, in a grid of rates,
with the keys of config/finetune_smollm2.py but for the sizes. The best rate of a width is the lowest point of the
parabola through the best three losses over the logarithm of the rate.
Prediction, before the first run: the best rate falls as the root of the width; at 576 channels the line through the
three gives between 1e-4 and 4e-4, as SmolLM2's grid did (2e-4). Outcome, after 250 steps of pretraining: 5.5e-3, 3.2e-3
and 2.5e-3 at 64, 128 and 256 channels, which fall as the width to the power of 0.58; but the line gives 1.5e-3 at 576.
So the exponent may carry over, and the level does not: these models had hardly been trained.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE), str(HERE.parent / "shakespeare_char_cpu")]

from compare_with_nanogpt import machine  # noqa: E402
from grid import train  # noqa: E402

WIDTHS = (64, 128, 256)
RATES = [2e-4 * 2**k for k in range(7)]
BLOCK_SIZE = 128
PRETRAINING = {
    "arch": "modern",
    "bias": False,
    "n_layer": 4,
    "head_dim": 32,
    "block_size": BLOCK_SIZE,
    "batch_size": 16,
    "gradient_accumulation_steps": 1,
    "optimizer": "muon",
    "learning_rate": 4e-3,
    "muon_lr": 2e-2,
    "warmup_iters": 20,
    "min_lr": 0.0,
    "eval_iters": 16,
}
FINE_TUNING = {
    "block_size": BLOCK_SIZE,
    "batch_size": 8,  # as many tokens a step as SmolLM2's
    "gradient_accumulation_steps": 1,
    "loss_chunk": 0,
    "max_iters": 40,
    "warmup_iters": 4,
    "eval_iters": 32,
}


def best_rate(losses: dict[float, float]) -> float:
    """The rate at the lowest point of the parabola through the lowest loss and its neighbors."""
    rates = sorted(losses)
    lowest = min(range(1, len(rates) - 1), key=lambda i: losses[rates[i]])
    near = rates[lowest - 1 : lowest + 2]
    a, b, _ = np.polyfit(np.log2(near), [losses[rate] for rate in near], 2)
    return float(2 ** (-b / (2 * a)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", required=True, type=Path, help="folder of texts to pretrain on")
    parser.add_argument("--text", required=True, type=Path, help="to fine-tune on")
    parser.add_argument("--steps", type=int, default=250, help="of pretraining")
    parser.add_argument("--out", type=Path, default=HERE / "sizes.json")
    arguments = parser.parse_args()

    report: dict[str, Any] = {"machine": machine(), "steps": arguments.steps, "widths": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name, text in (("books", arguments.books), ("text", arguments.text)):
            tokenizer = "bpe:1024" if name == "books" else f"{folder}/books/tokenizer.json"
            command = ["data/prepare.py", f"--input={text.resolve()}", f"--out={folder}/{name}"]
            subprocess.run([sys.executable, *command, f"--tokenizer={tokenizer}"], cwd=ROOT, check=True)
        for width in WIDTHS:
            run = f"{folder}/{width}"
            sizes = {"n_embd": width, "n_head": width // 32, "n_kv_head": width // 32}
            keys = PRETRAINING | sizes | {"max_iters": arguments.steps, "out_dir": run, "dataset": f"{folder}/books"}
            flags = [f"--{name}={value}" for name, value in keys.items()]
            flags += ["--eval_interval=0", "--eval_train=False", "--sample_chars=0"]
            subprocess.run([sys.executable, "train.py", *flags], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            subprocess.run([sys.executable, "export.py", f"--out_dir={run}", f"--to={run}/hf"], cwd=ROOT, check=True)
            losses = {}
            for rate in RATES:
                keys = FINE_TUNING | {"init_from": f"{run}/hf", "dataset": f"{folder}/text", "learning_rate": rate}
                result = train("config/finetune_smollm2.py", keys)
                losses[rate] = result["val_loss"]
                print(f"{width} channels, {rate:.1e}: {result['before']:.3f} -> {result['val_loss']:.3f}", flush=True)
            rows = {f"{rate:.1e}": loss for rate, loss in losses.items()}
            report["widths"][width] = {"before": result["before"], "losses": rows, "best": best_rate(losses)}
            arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    best = [report["widths"][width]["best"] for width in WIDTHS]
    slope, start = np.polyfit(np.log(WIDTHS), np.log(best), 1)
    report["exponent"] = float(slope)
    report["at 576 channels"] = math.exp(start + slope * math.log(576))
    print(f"best rate: width to the power of {slope:.2f}; at 576 channels {report['at 576 channels']:.1e}")
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
