"""The time budget against a grid of runs by hand: loss, time and predicted loss of `train.py --minutes=M`.

    python runs/dial/measure.py --texts FOLDER [FOLDER ...] --minutes 1 3 10 --to=runs/dial/results.json

For each text and time it first runs the time budget, a process of its own from start to finish; then runs of the same
minutes at given widths, and at the best of these with other learning rates. These measure only the speed of their own
width, so they train a little longer than the time budget. The best of a grid is partly run-to-run variance, and the
speed of a machine varies: with --rounds the time budget and the best by hand alternate again, and the median of their
ratios counts. The losses are those of the whole validation split, by evaluate.py. Needs an otherwise idle machine. A
script that was killed continues with the missing runs.

results.json is from the machine that it names; earlier.json from another one, and from before the scaling law covered
small texts: it holds more learning rates, Python's documentation, and the effect of each change. In both "dial" means
the time budget.
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "runs/shakespeare_char_cpu"))

from compare_with_nanogpt import machine  # noqa: E402

RECIPE = ROOT / "config/train_shakespeare_char_cpu.py"
WIDTHS = {1.0: (64, 96, 128), 3.0: (96, 128, 160), 10.0: (128, 192, 256)}
# train.py with a time budget that has one width and one learning rate to choose from, and takes every text to be as
# hard as the books.
BY_HAND = """
import sys
import budget, train
from nanogpt import scaling
from nanogpt.errors import run_script
width = int(sys.argv.pop(1))
lr_ratio = float(sys.argv.pop(1))
original_recipe = scaling.make_recipe
def recipe(*args):
    keys = original_recipe(*args)
    return keys | {name: lr_ratio * keys[name] for name in ("learning_rate", "muon_lr")}
scaling.make_recipe = recipe
budget.WIDTHS = [width]
budget.PILOT_WIDTH = width
budget.SpeedTrial.measure_difficulty = lambda *_: 1.0
run_script(train.main)
"""


def run(text: Path, minutes: float, out: Path, by_hand: tuple[int, float] | None = None) -> dict[str, Any]:
    """Run train.py; return its seconds, its predicted loss, and the loss of its last checkpoint."""
    script = ["-c", BY_HAND, *map(str, by_hand)] if by_hand else [ROOT / "train.py"]
    flags = [f"--minutes={minutes}", f"--dataset={text}", f"--out_dir={out}", "--device=cpu", "--log_interval=50"]
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *script, RECIPE, *flags], cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    assert done.returncode == 0, done.stdout + done.stderr
    results = out.with_suffix(".json")
    command = [sys.executable, ROOT / "evaluate.py", f"--out_dir={out}", "--checkpoint=latest", f"--json={results}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    state = json.loads(max((out / "ckpt").glob("step-*/state.json")).read_text())
    config = state["config"]
    result = {"took_s": round(seconds, 2), "loss": json.loads(results.read_text())["loss"]}
    result |= {name: config[name] for name in ("n_embd", "muon_lr")}
    result |= {"steps": config["max_iters"], "rows": state["samples"], "told": state["val_loss"]}
    if not by_hand:
        result["expected"] = state["dial"]["expected_loss"]
    print(text.name, minutes, by_hand or "time budget", result, flush=True)
    return result


def fill(cell: dict[str, Any], text: Path, minutes: float, options: Any, folder: Path) -> Iterator[None]:
    """Make the runs that a cell of the results lacks, one at a time."""
    if not cell["dial"]:
        cell["dial"] = run(text, minutes, folder / f"{text.name}-{minutes:g}")
        yield
    grid = cell["grid"]
    again = cell["again"]
    widths = WIDTHS.get(minutes, WIDTHS[10.0]) if options.widths is None else options.widths
    for rate in (1.0, *options.rates):
        for width in widths if rate == 1.0 else [best(grid)["n_embd"]]:
            if not any((run["n_embd"], run["rate"]) == (width, rate) for run in grid):
                out = folder / f"{text.name}-{minutes:g}-{width}-{rate}"
                grid.append(run(text, minutes, out, (width, rate)) | {"rate": rate})
                yield
    while len(again) < 2 * options.rounds:
        by_hand = (best(grid)["n_embd"], best(grid)["rate"]) if len(again) % 2 else None
        again.append(run(text, minutes, folder / f"{text.name}-{minutes:g}-again{len(again)}", by_hand))
        yield


def best(grid: list[dict[str, Any]]) -> dict[str, Any]:
    return min(grid, key=lambda result: result["loss"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, nargs="+", required=True)
    parser.add_argument("--minutes", type=float, nargs="+", default=[1.0, 3.0, 10.0])
    parser.add_argument("--widths", type=int, nargs="*", help="of the runs by hand; none: only the time budget")
    parser.add_argument(
        "--rates",
        type=float,
        nargs="*",
        default=[0.6, 1.7],
        help="learning rates relative to the recipe's, at the best width",
    )
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--to", type=Path, default=ROOT / "runs/dial/results.json")
    options = parser.parse_args()
    results: dict[str, Any] = json.loads(options.to.read_text()) if options.to.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for minutes, text in itertools.product(options.minutes, options.texts):
            empty = {"machine": machine(), "dial": None, "grid": [], "again": []}
            cell = results.setdefault(f"{text.name}, {minutes:g} min", empty)
            for _ in fill(cell, text.resolve(), minutes, options, Path(folder)):
                summarize(cell, minutes)
                options.to.write_text(json.dumps(results, indent=1) + "\n")


def summarize(cell: dict[str, Any], minutes: float) -> None:
    """Add the ratios of time and loss to a cell of the results."""
    budgets = [cell["dial"], *cell["again"][::2]]
    by_hand = cell["again"][1::2]
    cell["time"] = [result["took_s"] / 60 / minutes for result in budgets]
    cell["expected_over_came"] = [result["expected"] and result["expected"] / result["loss"] for result in budgets]
    if cell["grid"]:
        cell["loss_over_best_of_grid"] = budgets[0]["loss"] / best(cell["grid"])["loss"]
    if by_hand:
        pairs = zip(budgets[1:], by_hand, strict=False)  # the last pair may be incomplete
        ratios = [budget["loss"] / hand["loss"] for budget, hand in pairs]
        cell["loss_over_best_again"] = ratios
        cell["median_loss_over_best_again"] = statistics.median(ratios)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONPATH", str(ROOT))
    main()
