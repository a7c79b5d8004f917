"""Soft targets against hard ones: loss over seconds of training, beside the loss of the n-gram counts themselves.

    python runs/soft_targets/measure.py --texts FOLDER [FOLDER ...]

A network that learns from the counts of the training split copies a count model at first. This shows how good that
model is by itself, when the network passes it, and when hard targets catch up. Each length is a run of its own of
config/train_shakespeare_fast_cpu.py with and without ngram_targets, in turn. Writes results.json beside itself.
Prediction, before the first run: soft targets win below 300 steps, and lose once the loss is below the counts' own.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE.parent / "shakespeare_char_cpu")]

from compare_with_nanogpt import machine  # noqa: E402

RECIPE = "config/train_shakespeare_fast_cpu.py"
LENGTHS = (30, 60, 120, 240, 480, 960, 1920)
KINDS: dict[str, dict[str, Any]] = {"soft": {}, "hard": {"ngram_targets": 0}}


def train(text: Path, steps: int, kind: str, folder: str) -> dict[str, Any]:
    """Train for some steps; return the seconds of training and the losses."""
    keys: dict[str, Any] = {
        "dataset": text.resolve(),
        "out_dir": f"{folder}/{text.name}-{steps}-{kind}",
        "max_iters": steps,
        "muon_momentum": 0.7 if steps < 100 else 0.85 if steps < 500 else 0.9,
    }
    flags = [f"--{name}={value}" for name, value in (keys | KINDS[kind]).items()]
    done = subprocess.run([sys.executable, "train.py", RECIPE, *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    last = json.loads((Path(keys["out_dir"]) / "metrics.jsonl").read_text().splitlines()[-1])
    counts = re.search(r"validation loss of about (\S+)", done.stdout)
    return {"time_s": last["time_s"], "val_loss": last["val_loss"], "counts_loss": counts and float(counts[1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", nargs="+", type=Path, required=True, help="prepared character datasets")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="steps of the runs")
    arguments = parser.parse_args()
    report: dict[str, Any] = {"machine": machine(), "texts": {}}
    with tempfile.TemporaryDirectory() as folder:
        for text in arguments.texts:
            rows = report["texts"][text.name] = []
            for steps in arguments.lengths:
                row: dict[str, Any] = {"steps": steps}
                for kind in KINDS:
                    row[kind] = train(text, steps, kind, folder)
                rows.append(row)
                print(text.name, row, flush=True)
                (HERE / "results.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
