"""The value of a tokenizer trained on the data: bytes per token, speed, and the losses of models trained equally long.

    python runs/tokenizers/measure.py --books=books.tar.xz --work=FOLDER --minutes=5 --to=runs/tokenizers/results.json

The books are prepared as characters, as bytes, in GPT-2's tokens and in 8,192 byte pairs learned from them; the
validation documents, chosen by their hash, are the same. Speed is that of one thread over the validation text, the
two libraries alternating. Then one model trains on characters and another, with the same blocks and recipe, on the
8,192 byte pairs: at the same time, one thread each, so that both have the same machine for the same time. A short trial
run of both shows how many steps fit. The bits per byte are those of the whole validation split.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "runs/shakespeare_char_cpu")]

from compare_with_nanogpt import machine  # noqa: E402

from nanogpt.data.dataset import open_dataset  # noqa: E402
from nanogpt.text.tokenizer import Tokenizer  # noqa: E402

KINDS = ("char", "byte", "gpt2", "bpe:8192")
RECIPE = {"arch": "modern", "n_layer": 4, "n_head": 4, "n_kv_head": 2, "n_embd": 128, "n_inner": 256}
RECIPE |= {"optimizer": "muon", "learning_rate": 1e-2, "muon_lr": 6e-3, "grad_clip": 0.0, "beta2": 0.98}
RECIPE |= {"schedule": "trapezoid", "warmup_iters": 20, "min_lr": 0.0, "gradient_accumulation_steps": 1}
RECIPE |= {"device": "cpu", "compile": False, "dtype": "float32", "eval_interval": 0, "eval_iters": 0}
RECIPE |= {"eval_train": False, "sample_chars": 0, "always_save_checkpoint": False, "log_interval": 10}
MODELS = {
    "char": {"block_size": 256, "batch_size": 16},
    "bpe:8192": {"block_size": 128, "batch_size": 16},
}


def folder_of(work: Path, kind: str) -> Path:
    return work / kind.replace(":", "")


def prepare(books: Path, work: Path, kind: str) -> None:
    script = [sys.executable, ROOT / "data/prepare.py", f"--input={books}", f"--out={folder_of(work, kind)}"]
    subprocess.run([*script, f"--tokenizer={kind}", "--val_share=0.01"], check=True)


def read_meta(work: Path, kind: str) -> dict[str, Any]:
    meta = json.loads((folder_of(work, kind) / "meta.json").read_text())
    return {"ids": meta["vocab_size"]} | {
        f"{split}_bytes_per_token": part["bytes"] / part["tokens"] for split, part in meta["splits"].items()
    }


def measure_speeds(work: Path, kind: str, rounds: int) -> dict[str, float]:
    """Megabytes of text per second of each library on one thread."""
    tokenizer = Tokenizer.load(folder_of(work, kind))
    assert tokenizer is not None
    assert tokenizer._gigatoken is not None
    plain = open_dataset(folder_of(work, "byte"), block_size=8, splits=["val"]).val[:]
    text = bytes(plain[plain < 256].astype("u1")).decode()
    encoders = {
        "tokenizers": lambda: tokenizer._inner.encode(text, add_special_tokens=False),
        "gigatoken": lambda: tokenizer._gigatoken(text),
    }
    megabytes = len(text.encode()) / 1e6
    speeds: dict[str, list[float]] = {name: [] for name in encoders}
    for _ in range(rounds):
        for name, encode in encoders.items():
            start = time.perf_counter()
            encode()
            speeds[name].append(megabytes / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in speeds.items()}


def train(work: Path, steps: dict[str, int], label: str) -> dict[str, list[dict[str, Any]]]:
    """Train both models at the same time; return their metrics."""
    running = []
    for kind, sizes in MODELS.items():
        out = work / f"out-{label}-{kind.replace(':', '')}"
        keys = RECIPE | sizes | {"dataset": folder_of(work, kind), "out_dir": out, "max_iters": steps[kind]}
        command = [sys.executable, ROOT / "train.py", *(f"--{name}={value}" for name, value in keys.items())]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        running.append((kind, out, subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)))
    metrics = {}
    for kind, out, process in running:
        assert process.wait() == 0, kind
        metrics[kind] = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--to", type=Path)
    args = parser.parse_args()
    report: dict[str, Any] = {
        "command": f"python runs/tokenizers/measure.py --books=books.tar.xz --work=FOLDER --minutes={args.minutes:g}",
        "machine": machine(),
    }
    for kind in KINDS:
        if not (folder_of(args.work, kind) / "meta.json").exists():
            prepare(args.books, args.work, kind)
        report[kind] = read_meta(args.work, kind)
    os.environ["RAYON_NUM_THREADS"] = "1"
    for kind in ("gpt2", "bpe:8192"):
        report[kind]["mb_per_s"] = measure_speeds(args.work, kind, args.rounds)
    print(json.dumps(report, indent=1), flush=True)
    trial = train(args.work, dict.fromkeys(MODELS, 60), "trial")
    steps = {}
    for kind, lines in trial.items():
        times = [(line["step"], line["time_s"]) for line in lines if "loss" in line]
        (first, start_s), (last, end_s) = times[1], times[-1]
        steps[kind] = int(60 * args.minutes * (last - first) / (end_s - start_s))
    for kind, lines in train(args.work, steps, "whole").items():
        end = lines[-1]
        report[kind]["trained"] = {name: end[name] for name in ("step", "tokens", "time_s", "val_loss", "val_bpb")}
        report[kind]["trained"]["recipe"] = RECIPE | MODELS[kind]
    report["bits_per_byte_pairs_over_characters"] = (
        report["bpe:8192"]["trained"]["val_bpb"] / report["char"]["trained"]["val_bpb"]
    )
    text = json.dumps(report, indent=1) + "\n"
    print(text)
    if args.to:
        args.to.write_text(text)


if __name__ == "__main__":
    main()
