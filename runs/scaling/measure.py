"""The ladder of runs that `nanogpt/scaling.py` is fitted to: sizes × token counts, learning rates, and repeated text.

    python runs/scaling/measure.py --data=FOLDER --stage=rates    # the best learning rate for a width and a length
    python runs/scaling/measure.py --data=FOLDER --stage=ladder   # sizes × token counts, each token seen once
    python runs/scaling/measure.py --data=FOLDER --stage=repeats  # small texts over many epochs
    python runs/scaling/measure.py --data=FOLDER --stage=texts    # other texts than the books, by the same recipe
    python runs/scaling/measure.py --data=FOLDER --stage=contexts # shorter and longer rows
    python runs/scaling/measure.py --data=FOLDER --stage=falls    # a shorter final decay of the learning rate
    python runs/scaling/measure.py --data=FOLDER --stage=seeds    # run-to-run variance at some points of the ladder
    python runs/scaling/measure.py --data=FOLDER --stage=looks    # look_back, which the other stages did not have yet
    python runs/scaling/measure.py --data=FOLDER --stage=heldout  # larger runs than any, predicted before they began

FOLDER: the books as characters, `python data/prepare.py --input books.tar.xz --tokenizer=char --out=FOLDER`. Each run
is one of train.py on one thread, two at a time; its settings and its loss become a line of runs.jsonl beside this file.
Runs that are in runs.jsonl are not repeated, so a script that was killed continues. The losses do not depend on other
load on the machine. Validation: a fifth of the split, 64 pieces of 4,096 tokens.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
RUNS = Path(__file__).with_name("runs.jsonl")
PREDICTION = Path(__file__).with_name("prediction.json")
sys.path.insert(0, str(ROOT))

from nanogpt import scaling  # noqa: E402

FIXED = {"eval_interval": 0, "eval_iters": 0, "eval_train": False, "sample_chars": 0}
FIXED |= {"device": "cpu", "dtype": "float32", "compile": False, "log_interval": 20, "resume": "auto"}
T = 128  # default tokens per row
POINT = {
    "n_embd": 0,
    "tokens": 0,
    "rate": None,  # Muon's learning rate; None: the recipe's
    "unique": None,  # tokens of the text to use; None: all
    "text": "books_char",
    "block_size": T,
    "fall": None,  # share of the updates in the final decay; None: half
    "seed": None,  # None: train.py's default
    "look_back": False,
}
M = 10**6


def rates() -> list[dict[str, Any]]:
    """Muon's learning rate, by octaves, at several widths and lengths."""
    points = {(64, 1 * M): 0.011, (32, 1 * M): 0.0156, (128, M // 2): 0.009, (32, 4 * M): 0.0118}
    points |= {(64, 4 * M): 0.0103, (96, 2 * M): 0.0074}
    return [point("rates", *pair, rate=octave * rate) for octave in (1, 0.5, 2) for pair, rate in points.items()]


def ladder() -> list[dict[str, Any]]:
    widths, tokens = (32, 64, 96, 128, 160), (M // 4, M // 2, 1 * M, 2 * M)
    longer = [(width, 4 * M) for width in (32, 64, 96, 128)] + [(width, 8 * M) for width in (32, 64)]
    pairs = sorted([*itertools.product(widths, tokens), *longer], key=lambda pair: work(*pair))
    return [point("ladder", *pair) for pair in pairs]


def repeats() -> list[dict[str, Any]]:
    """A part of the text over several epochs."""
    often = [(width, tokens, M // 4) for width, tokens in ((64, M), (64, 2 * M), (64, 4 * M), (128, M), (128, 2 * M))]
    often += [(64, 4 * M, M), (128, 2 * M, M)]
    little, less = 1 << 16, 1 << 14
    often += [(width, epochs * little, little) for width in (32, 64, 128) for epochs in (4, 16)]
    often += [(width, epochs * less, less) for width in (32, 64) for epochs in (8, 32)]
    often += [(32, 64 * little, little), (32, 4 * M, M // 4), (96, 4 * M, M), (64, 12 * M, M)]
    points = [point("repeats", width, tokens, unique=unique) for width, tokens, unique in often]
    return sorted(points, key=lambda point: work(point["n_embd"], point["tokens"]))


def texts() -> list[dict[str, Any]]:
    return [point("texts", 96, M), *(point("texts", 64, M // part) for part in (1, 2, 4, 8, 16, 32, 64))]


def contexts() -> list[dict[str, Any]]:
    return [point("contexts", 64, tokens, block_size=T) for tokens in (M // 4, M) for T in (32, 64, 256)]


def falls() -> list[dict[str, Any]]:
    """A final decay over less than half of the run."""
    return [point("falls", 64, M, fall=share) for share in (0.4, 0.3, 0.2)]


def seeds() -> list[dict[str, Any]]:
    pairs = [(32, M // 4), (64, M // 4), (64, M // 2), (96, M // 4), (64, M)]
    return [point("seeds", *pair, seed=seed) for seed in (1, 2, 3) for pair in pairs]


def looks() -> list[dict[str, Any]]:
    pairs = [(32, M // 4), (64, M // 4), (64, M // 2), (96, M // 2), (64, M), (96, M), (64, 2 * M), (96, 2 * M)]
    return [point("looks", *pair, look_back=True) for pair in pairs]


def heldout() -> list[dict[str, Any]]:
    return [point("heldout", 192, 2 * M), point("heldout", 192, 4 * M)]


def point(stage: str, width: int, tokens: int, **more: Any) -> dict[str, Any]:
    """A run of the ladder, with its deviations from POINT."""
    return {"stage": stage} | POINT | {"n_embd": width, "tokens": tokens} | more


def work(width: int, tokens: int) -> float:
    return scaling.count_weights(width) * tokens


def train_keys(point: dict[str, Any]) -> dict[str, Any]:
    """The keys of train.py for a point of the ladder."""
    keys = scaling.make_recipe(point["n_embd"], point["tokens"], point["block_size"]) | {
        "block_size": point["block_size"]
    }
    if point["rate"]:
        keys |= {"muon_lr": point["rate"], "learning_rate": scaling.ADAMW_LR_RATIO * point["rate"]}
    if point["fall"]:
        keys["decay_iters"] = round(point["fall"] * keys["max_iters"])
    if point["seed"]:
        keys["seed"] = point["seed"]
    keys["look_back"] = point["look_back"]
    return keys | FIXED


def run(point: dict[str, Any], data: Path, work: Path, lock: threading.Lock) -> None:
    keys = train_keys(point)
    data = open_part(data, point["unique"], work, lock)
    name = "-".join(str(value) for value in point.values() if value)
    flags = [f"--{key}={value}" for key, value in keys.items()]
    command = [sys.executable, ROOT / "train.py", *flags, f"--dataset={data}", f"--out_dir={work / name}"]
    log = work / f"{name}.txt"
    with log.open("a") as out:
        done = subprocess.run(command, cwd=ROOT, stdout=out, stderr=out, env=ONE_THREAD)
    if done.returncode:
        raise SystemExit(f"{log}: status {done.returncode}")
    lines = [json.loads(line) for line in (work / name / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(lines) if "val_loss" in line)
    result = point | {"weights": scaling.count_weights(point["n_embd"]), "tokens_run": last["tokens"]}
    result |= {"rows": keys["batch_size"], "muon_lr": keys["muon_lr"], "val_loss": last["val_loss"]}
    result |= {"time_s": last["time_s"]}
    with lock, RUNS.open("a") as file:
        file.write(json.dumps(result) + "\n")
        print(json.dumps(result), flush=True)


def predict(points: list[dict[str, Any]], results: list[dict[str, Any]]) -> None:
    """Add the predictions of the ladder's law for the coming runs; earlier predictions stay."""
    ladder = [result for result in results if result["stage"] == "ladder"]
    law = fit_law([(result["weights"], result["tokens_run"], result["val_loss"]) for result in ladder])
    predictions = json.loads(PREDICTION.read_text()) if PREDICTION.exists() else []
    for point in points[len(predictions) :]:
        keys = train_keys(point)
        size = scaling.count_weights(point["n_embd"])
        tokens = keys["max_iters"] * keys["batch_size"] * T
        prediction = {"weights": size, "tokens": tokens, "val_loss": law.predict_loss(size, tokens), "law": asdict(law)}
        predictions.append(prediction | {"on": f"{datetime.now():%Y-%m-%d %H:%M}"})
    PREDICTION.write_text(json.dumps(predictions, indent=1) + "\n")
    print(PREDICTION.read_text())


def fit_law(points: Sequence[tuple[float, float, float]]) -> scaling.Law:
    """The law nearest to points (N, D, loss), by least squares of the relative errors.

    With the exponents given the rest is linear, so a grid of exponents is searched, finer and finer.
    """
    N, D, loss = np.array(points, float).T
    center = np.array([0.5, 0.5])
    width = 0.45
    while width > 1e-4:
        axes = [np.linspace(x - width, x + width, 11).clip(0.02) for x in center]
        alpha, beta = (grid.ravel() for grid in np.meshgrid(*axes))
        terms = [np.ones((len(alpha), len(N))), (N / N[0]) ** -alpha[:, None], (D / D[0]) ** -beta[:, None]]
        columns = np.stack(terms, -1) / loss[:, None]  # (exponents, points, 3)
        gram = columns.mT @ columns + 1e-12 * np.eye(3)
        solution = np.linalg.solve(gram, columns.sum(1)[..., None])  # (exponents, 3, 1)
        best = ((columns @ solution - 1) ** 2).sum((1, 2)).argmin()
        center = np.array([alpha[best], beta[best]])
        width /= 2
    E, A, B = solution[best, :, 0].tolist()
    alpha, beta = center.tolist()
    return scaling.Law(E, A * N[0].item() ** alpha, B * D[0].item() ** beta, alpha, beta)


def open_part(data: Path, unique: int | None, work: Path, lock: threading.Lock) -> Path:
    """Make a dataset with about `unique` tokens of another (None: all) and a part of its validation split.

    Both are made of pieces of 4,096 tokens, evenly spaced over the whole.
    """
    folder = work / f"{data.name}-{unique}"
    with lock:
        if not folder.exists():
            from nanogpt.data.dataset import open_dataset

            whole = open_dataset(data, block_size=T)
            partial = folder.with_suffix(".part")
            partial.mkdir(exist_ok=True)
            if unique:
                write_pieces(whole.train, unique // 4096, partial / "train.bin")
            else:
                whole.train[0 : len(whole.train)].tofile(partial / "train.bin")
            write_pieces(whole.val, 64, partial / "val.bin")
            (partial / "tokenizer.json").write_bytes((data / "tokenizer.json").read_bytes())
            partial.rename(folder)
    return folder


def write_pieces(tokens: Any, count: int, path: Path) -> None:
    every = len(tokens) // count
    with path.open("wb") as file:
        for k in range(count):
            tokens[k * every : k * every + min(every, 4096)].tofile(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    stages = ("rates", "ladder", "repeats", "texts", "contexts", "falls", "seeds", "looks", "heldout")
    parser.add_argument("--stage", choices=stages, required=True)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "nanogpt-ladder")
    parser.add_argument("--at_a_time", type=int, default=2)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    results = [json.loads(line) for line in RUNS.read_text().splitlines()] if RUNS.exists() else []
    done = [{key: result.get(key, default) for key, default in POINT.items()} for result in results]
    points = [point | {"text": options.data.name} for point in globals()[options.stage]()]
    if options.stage == "heldout":
        predict(points, results)
    missing = [point for point in points if {key: point[key] for key in POINT} not in done]
    print(f"{options.stage}: {len(missing)} runs to do", flush=True)
    lock = threading.Lock()
    with ThreadPoolExecutor(options.at_a_time) as pool:
        for _ in pool.map(lambda point: run(point, options.data.resolve(), options.work, lock), missing):
            pass


if __name__ == "__main__":
    import os

    ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    main()
