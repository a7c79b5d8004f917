"""The data loader: its speed, its share of a step, and its memory.

    python runs/loader/measure.py --to=runs/loader/cpu.json

Random rows of 1,024 tokens in batches of 12, from files in the page cache: one file, a thousand shards, and a mixture
of both with a loss mask. `per_core` is tokens per second of one process, `two_processes` of two at once, as many as
this machine has cores. A step is that of GPT-2's 124M with 12 rows on this CPU, including the loading of its rows; a
GPU that trains on a million tokens per second needs as many from the loader. The memory is the process's own
(anonymous) after a tenth and after all of 10,000 batches; the files' pages belong to the page cache.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "runs/shakespeare_char_cpu"), str(ROOT / "tests")]

from compare_with_nanogpt import machine  # noqa: E402
from small_data import shard  # noqa: E402

from model import GPT, GPTConfig  # noqa: E402
from nanogpt.data.dataset import open_dataset  # noqa: E402
from nanogpt.data.rows import Rows  # noqa: E402
from nanogpt.data.write import write_dataset  # noqa: E402
from nanogpt.text.tokenizer import Tokenizer  # noqa: E402

T = 1024
BATCH = 12
KINDS = {"one file": "one", "1,000 shards": "many", "mixture with loss mask": "one:0.7,masked:0.3"}


def write_datasets(folder: Path, tokens: int) -> None:
    ids = np.random.default_rng(0).integers(0, 257, tokens, dtype=np.uint32)
    for name in ("one", "many", "masked"):
        write_dataset(folder / name, {"train": [ids], "val": [ids[:10_000]]}, Tokenizer.bytes())
    shard(folder / "many", -(-tokens // 1000))
    shard(folder / "masked", tokens, {"train": np.ones(tokens), "val": np.ones(10_000)})


def open_rows(folder: Path, kind: str) -> Rows:
    name = ",".join(f"{folder}/{part}" for part in KINDS[kind].split(","))
    return Rows(open_dataset(name, block_size=T, splits=["train"]).train, T, 257, 1337)


def speed(folder: Path, kind: str, batches: int, offset: int = 0) -> float:
    """Tokens per second."""
    rows = open_rows(folder, kind)
    rows[0:BATCH]
    start = time.perf_counter()
    for k in range(offset, offset + batches):
        rows[k * BATCH : (k + 1) * BATCH]
    return batches * BATCH * T / (time.perf_counter() - start)


def speed_of_two(folder: Path, kind: str, batches: int) -> float:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.starmap(speed, [(folder, kind, 50, 0)] * 2)  # waits until both have started
        return sum(pool.starmap(speed, [(folder, kind, batches, k * batches) for k in range(2)], chunksize=1))


def anonymous_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1e3


def memory(folder: Path, kind: str, batches: int) -> dict[str, float]:
    rows = open_rows(folder, kind)
    result = {}
    for k in range(batches):
        rows[k * BATCH : (k + 1) * BATCH]
        if k + 1 in (batches // 10, batches):
            result[f"after_{k + 1}_mb"] = anonymous_mb()
    return result


def share_of_a_step(folder: Path, rounds: int) -> dict[str, float]:
    model = GPT(GPTConfig(vocab_size=50_257, dropout=0.0))
    rows = open_rows(folder, "1,000 shards")
    loading = []
    whole = []
    for k in range(rounds + 1):
        start = time.perf_counter()
        x, y = rows[k * BATCH : (k + 1) * BATCH]
        loading.append(time.perf_counter() - start)
        for part in range(0, BATCH, 2):  # micro-batches, for memory
            model(x[part : part + 2], y[part : part + 2])[1].backward()
        whole.append(time.perf_counter() - start)
    shares = [a / b for a, b in zip(loading[1:], whole[1:], strict=True)]
    return {"median": statistics.median(shares), "rows_ms": 1e3 * statistics.median(loading[1:])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200_000_000)
    parser.add_argument("--batches", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--to", type=Path)
    args = parser.parse_args()
    report: dict[str, Any] = {"command": " ".join(["python runs/loader/measure.py", *sys.argv[1:]])}
    report["machine"] = machine()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_datasets(folder, args.tokens)
        for kind in KINDS:
            torch.set_num_threads(1)
            alone = [speed(folder, kind, 1000) for _ in range(args.rounds)]
            both = [speed_of_two(folder, kind, 1000) for _ in range(args.rounds)]
            report[kind] = {
                "million_tokens_per_s_per_core": statistics.median(alone) / 1e6,
                "million_tokens_per_s_two_processes": statistics.median(both) / 1e6,
                "memory": memory(folder, kind, args.batches),
            }
            print(kind, report[kind], flush=True)
        torch.set_num_threads(2)
        report["share_of_a_step_of_124M"] = share_of_a_step(folder, args.rounds)
    text = json.dumps(report, indent=1) + "\n"
    print(text)
    if args.to:
        args.to.write_text(text)


if __name__ == "__main__":
    main()
