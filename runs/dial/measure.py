"""The dial against a grid made by hand: the loss, the time and the expectation of `train.py --minutes=M`.

    python runs/dial/measure.py --texts FOLDER [FOLDER ...] --minutes 1 3 10 --to=runs/dial/results.json

For each text and time first the dial, a process of its own from start to finish; then runs of the same minutes at given
widths, and at the best of them at other rates than the rule's. These try nothing but the speed of their one width, so
they train a little longer than the dial. The best of a grid is partly luck, and a machine has its moods: with --rounds
the dial and the best by hand take turns again, and the median of their ratios counts. The losses are those of the whole
validation split, by evaluate.py. Wants a machine with nothing else to do. Killed, it goes on with the runs that lack.

results.json is of the machine that it names; earlier.json of another one, and of the dial before its law knew little
texts: it holds more rates, Python's documentation, and what each change of the dial did.
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
# train.py with a dial that has one width and one rate to choose from, and takes any text for the books.
BY_HAND = """
import sys
import dial, train
from nanogpt import run_script, scaling
width, rate = int(sys.argv.pop(1)), float(sys.argv.pop(1))
rule = scaling.recipe
def recipe(*of):
    keys = rule(*of)
    return keys | {name: rate * keys[name] for name in ("learning_rate", "muon_lr")}
scaling.recipe, dial.WIDTHS, dial.PILOT = recipe, [width], width
dial.SpeedTrial.difficulty = lambda *_: 1.0
run_script(train.main)
"""


def run(text: Path, minutes: float, out: Path, by_hand: tuple[int, float] | None = None) -> dict[str, Any]:
    """One process of train.py; its seconds, what it expected, and the loss of its last checkpoint."""
    script = ["-c", BY_HAND, *map(str, by_hand)] if by_hand else [ROOT / "train.py"]
    flags = [f"--minutes={minutes}", f"--dataset={text}", f"--out_dir={out}", "--device=cpu", "--log_interval=50"]
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *script, RECIPE, *flags], cwd=ROOT, capture_output=True, text=True)
    took_s = time.perf_counter() - began
    assert done.returncode == 0, done.stdout + done.stderr
    results = out.with_suffix(".json")
    command = [sys.executable, ROOT / "evaluate.py", f"--out_dir={out}", "--checkpoint=latest", f"--json={results}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    state = json.loads(max((out / "ckpt").glob("step-*/state.json")).read_text())
    config = state["config"]
    found = {"took_s": round(took_s, 2), "loss": json.loads(results.read_text())["loss"], "n_embd": config["n_embd"]}
    found |= {"muon_lr": config["muon_lr"], "steps": config["max_iters"], "rows": state["samples"]}
    found |= {"told": state["val_loss"]} | ({} if by_hand else {"expected": state["dial"]["expected_loss"]})
    print(text.name, minutes, by_hand or "dial", found, flush=True)
    return found


def fill(cell: dict[str, Any], text: Path, minutes: float, options: Any, folder: Path) -> Iterator[None]:
    """Do what a cell of the results lacks, a run at a time."""
    if not cell["dial"]:
        cell["dial"] = run(text, minutes, folder / f"{text.name}-{minutes:g}")
        yield
    grid, again = cell["grid"], cell["again"]
    usual = WIDTHS.get(minutes, WIDTHS[10.0]) if options.widths is None else options.widths
    for rate in (1.0, *options.rates):
        for width in usual if rate == 1.0 else [best(grid)["n_embd"]]:
            if not any((one["n_embd"], one["rate"]) == (width, rate) for one in grid):
                out = folder / f"{text.name}-{minutes:g}-{width}-{rate}"
                grid.append(run(text, minutes, out, (width, rate)) | {"rate": rate})
                yield
    while len(again) < 2 * options.rounds:
        by_hand = (best(grid)["n_embd"], best(grid)["rate"]) if len(again) % 2 else None
        again.append(run(text, minutes, folder / f"{text.name}-{minutes:g}-again{len(again)}", by_hand))
        yield


def best(grid: list[dict[str, Any]]) -> dict[str, Any]:
    return min(grid, key=lambda one: one["loss"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, nargs="+", required=True)
    parser.add_argument("--minutes", type=float, nargs="+", default=[1.0, 3.0, 10.0])
    parser.add_argument("--widths", type=int, nargs="*", help="by hand; none: the dial alone")
    parser.add_argument("--rates", type=float, nargs="*", default=[0.6, 1.7], help="of the rule's, at the best width")
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--to", type=Path, default=ROOT / "runs/dial/results.json")
    options = parser.parse_args()
    results: dict[str, Any] = json.loads(options.to.read_text()) if options.to.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for minutes, text in itertools.product(options.minutes, options.texts):
            empty = {"machine": machine(), "dial": None, "grid": [], "again": []}
            cell = results.setdefault(f"{text.name}, {minutes:g} min", empty)
            for _ in fill(cell, text.resolve(), minutes, options, Path(folder)):
                summarise(cell, minutes)
                options.to.write_text(json.dumps(results, indent=1) + "\n")


def summarise(cell: dict[str, Any], minutes: float) -> None:
    """Put the ratios that matter beside what was measured."""
    dials, by_hand = [cell["dial"], *cell["again"][::2]], cell["again"][1::2]
    cell["time"] = [one["took_s"] / 60 / minutes for one in dials]
    cell["expected_over_came"] = [one["expected"] and one["expected"] / one["loss"] for one in dials]
    if cell["grid"]:
        cell["loss_over_best_of_grid"] = dials[0]["loss"] / best(cell["grid"])["loss"]
    if by_hand:
        ratios = [
            dial["loss"] / one["loss"] for dial, one in zip(dials[1:], by_hand, strict=False)
        ]  # the last may lack
        cell["loss_over_best_again"] = ratios
        cell["median_loss_over_best_again"] = statistics.median(ratios)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONPATH", str(ROOT))
    main()
