"""The ladder of runs that `nanogpt/scaling.py` is fitted to: sizes × token counts, learning rates, and repeated text.

    python runs/scaling/measure.py --data=FOLDER --stage=rates    # which rate is best at which width and length
    python runs/scaling/measure.py --data=FOLDER --stage=ladder   # sizes × token counts, each token seen once
    python runs/scaling/measure.py --data=FOLDER --stage=repeats  # little text, read many times
    python runs/scaling/measure.py --data=FOLDER --stage=heldout  # a larger run than any, predicted before it began

FOLDER: the books as characters, `python data/prepare.py --input books.tar.xz --tokenizer=char --out=FOLDER`. Each run
is one of train.py on one thread, two at a time; its settings and its loss become a line of runs.jsonl beside this
file. What stands there is not run again, so that the script, killed, goes on where it was. Losses do not depend on what
else the machine does. Validation: a fifth of the split, 64 pieces of 4,096 tokens.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RUNS = Path(__file__).with_name("runs.jsonl")
sys.path.insert(0, str(ROOT))

from nanogpt import scaling  # noqa: E402

T = 128  # tokens in a row
FIXED = {"block_size": T, "eval_interval": 0, "eval_iters": 0, "eval_train": False, "sample_chars": 0}
FIXED |= {"device": "cpu", "dtype": "float32", "compile": False, "log_interval": 20, "resume": "auto"}
POINT = ("stage", "n_embd", "tokens", "rate", "unique")
M = 10**6


def rates() -> list[dict[str, Any]]:
    """Muon's rate, by octaves, at several widths and lengths."""
    points = {(64, 1 * M): 0.011, (32, 1 * M): 0.0156, (128, M // 2): 0.009, (32, 4 * M): 0.0118}
    return [point("rates", *pair, rate=octave * rate) for octave in (1, 0.5, 2) for pair, rate in points.items()]


def ladder() -> list[dict[str, Any]]:
    widths, tokens = (32, 64, 96, 128, 160), (M // 4, M // 2, 1 * M, 2 * M)
    longer = [(width, 4 * M) for width in (32, 64, 96, 128)] + [(width, 8 * M) for width in (32, 64)]
    pairs = sorted([*itertools.product(widths, tokens), *longer], key=lambda pair: work(*pair))
    return [point("ladder", *pair) for pair in pairs]


def repeats() -> list[dict[str, Any]]:
    """The text's first so many characters again and again."""
    often = [(width, tokens, M // 4) for width, tokens in ((64, M), (64, 2 * M), (64, 4 * M), (128, M), (128, 2 * M))]
    points = [
        point("repeats", width, tokens, unique=unique)
        for width, tokens, unique in [*often, (64, 4 * M, M), (128, 2 * M, M)]
    ]
    return sorted(points, key=lambda found: work(found["n_embd"], found["tokens"]))


def heldout() -> list[dict[str, Any]]:
    return [point("heldout", 192, 2 * M)]


def point(stage: str, width: int, tokens: int, rate: float | None = None, unique: int | None = None) -> dict[str, Any]:
    """A run's place in the ladder; rate: None: the rule's. unique: tokens of the text that it knows (None: all)."""
    return {"stage": stage, "n_embd": width, "tokens": tokens, "rate": rate, "unique": unique}


def work(width: int, tokens: int) -> float:
    return scaling.weights(scaling.shape(width)) * tokens


def settings(point: dict[str, Any]) -> dict[str, Any]:
    """train.py's keys for a point of the ladder."""
    keys = scaling.recipe(point["n_embd"], point["tokens"], T)
    if point["rate"]:
        keys |= {"muon_lr": point["rate"], "learning_rate": scaling.OTHERS * point["rate"]}
    return keys | FIXED


def run(point: dict[str, Any], data: Path, work: Path, lock: threading.Lock) -> None:
    keys = settings(point)
    data = part_of(data, point["unique"], work, lock)
    name = "-".join(str(value) for value in point.values())
    flags = [f"--{key}={value}" for key, value in keys.items()]
    command = [sys.executable, ROOT / "train.py", *flags, f"--dataset={data}", f"--out_dir={work / name}"]
    log = work / f"{name}.txt"
    with log.open("a") as out:
        done = subprocess.run(command, cwd=ROOT, stdout=out, stderr=out, env=ONE_THREAD)
    if done.returncode:
        raise SystemExit(f"{log}: status {done.returncode}")
    lines = [json.loads(line) for line in (work / name / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(lines) if "val_loss" in line)
    found = point | {"weights": scaling.weights(scaling.shape(point["n_embd"])), "tokens_run": last["tokens"]}
    found |= {"rows": keys["batch_size"], "muon_lr": keys["muon_lr"], "val_loss": last["val_loss"]}
    found |= {"time_s": last["time_s"]}
    with lock, RUNS.open("a") as file:
        file.write(json.dumps(found) + "\n")
        print(json.dumps(found), flush=True)


def part_of(data: Path, unique: int | None, work: Path, lock: threading.Lock) -> Path:
    """A dataset with the first `unique` tokens of another (None: all), and 64 pieces of its validation split."""
    folder = work / f"first-{unique}"
    with lock:
        if not folder.exists():
            from nanogpt.data import open_dataset

            whole, partial = open_dataset(data, block_size=T), folder.with_suffix(".part")
            partial.mkdir(exist_ok=True)
            whole.train[0 : unique or len(whole.train)].tofile(partial / "train.bin")
            with (partial / "val.bin").open("wb") as file:
                for k in range(64):
                    first = k * (len(whole.val) // 64)
                    whole.val[first : first + 4096].tofile(file)
            (partial / "tokenizer.json").write_bytes((data / "tokenizer.json").read_bytes())
            partial.rename(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--stage", choices=("rates", "ladder", "repeats", "heldout"), required=True)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "nanogpt-ladder")
    parser.add_argument("--at_a_time", type=int, default=2)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    there = [json.loads(line) for line in RUNS.read_text().splitlines()] if RUNS.exists() else []
    done = [{key: found[key] for key in POINT} for found in there]
    left = [found for found in globals()[options.stage]() if found not in done]
    print(f"{options.stage}: {len(left)} runs to do", flush=True)
    lock = threading.Lock()
    with ThreadPoolExecutor(options.at_a_time) as pool:
        for _ in pool.map(lambda found: run(found, options.data.resolve(), options.work, lock), left):
            pass


if __name__ == "__main__":
    import os

    ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    main()
