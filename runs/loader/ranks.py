"""The loader of 1,024 ranks: what each opens and reads, and how soon, with 10,000 shards on disk.

    python runs/loader/ranks.py --to=runs/loader/ranks.json

A step of 4 rows of 1,024 tokens for each rank. `ranks`: the rows of all of them, against those of one process that
reads the whole step; and the shards that a rank maps. `start_up_s`: of processes that start as ranks of this world, the
time from opening the dataset to their first rows, files in the page cache, without the imports of torch and the package
before. They start one after the other, and in pairs, one for each core of this machine; medians.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BEGIN = time.perf_counter()

import numpy as np  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "runs/shakespeare_char_cpu"), str(ROOT / "tests")]

from nanogpt.data.dataset import Dataset, open_dataset  # noqa: E402
from nanogpt.data.rows import Rows, StepBatch  # noqa: E402
from nanogpt.distributed import World  # noqa: E402

RANKS = 1024
ROWS = 4  # of a rank in a step
T = 1024
STEP = 7
VOCAB = 257
CPU = torch.device("cpu")


def write(folder: Path, shards: int) -> None:
    """Shards of random bytes, two rows long."""
    from small_data import shard

    from nanogpt.data.write import write_dataset
    from nanogpt.text.tokenizer import Tokenizer

    ids = np.random.default_rng(0).integers(0, VOCAB, shards * 2 * T, dtype=np.uint32)
    write_dataset(folder, {"train": [ids], "val": [ids[: 2 * T]]}, Tokenizer.bytes())
    shard(folder, 2 * T)


def open_rows(folder: Path) -> tuple[Dataset, Rows]:
    dataset = open_dataset(folder, block_size=T)
    return dataset, Rows(dataset.train, T, VOCAB, seed=1337)


def read(rows: Rows, rank: int) -> torch.Tensor:
    """A rank's inputs of the step."""
    world = World(rank, RANKS, CPU, torch.float32)
    batch = StepBatch(rows, STEP * RANKS * ROWS, RANKS * ROWS, ROWS, world, 1337, STEP, 0.0)
    return torch.cat([x for x, _, _, _ in batch.micro_batches()])


def one_rank(folder: Path, rank: int) -> None:
    """As a process of its own, print its times."""
    imports = time.perf_counter() - BEGIN
    begin = time.perf_counter()
    _, rows = open_rows(folder)
    open_s = time.perf_counter() - begin
    read(rows, rank)
    print(json.dumps({"imports": imports, "open": open_s, "start_up": time.perf_counter() - begin}))


def all_ranks(folder: Path) -> dict[str, Any]:
    """The rows of all ranks against the whole step's, and the shards that each maps."""
    dataset, rows = open_rows(folder)
    first = STEP * RANKS * ROWS
    whole = rows[first : first + RANKS * ROWS][0]
    mapped = []
    for rank in range(RANKS):
        dataset.train._map.cache_clear()
        assert torch.equal(read(rows, rank), whole[rank * ROWS : (rank + 1) * ROWS]), rank
        mapped.append(dataset.train._map.cache_info().misses)
    return {"rows_equal": True, "shards_mapped_mean": statistics.mean(mapped), "shards_mapped_max": max(mapped)}


def start_up(folder: Path, ranks: list[int], at_once: int) -> dict[str, float]:
    times = []
    for k in range(0, len(ranks), at_once):
        commands = [
            [sys.executable, __file__, "--rank", str(rank), "--folder", folder] for rank in ranks[k : k + at_once]
        ]
        processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
        times += [json.loads(process.communicate()[0]) for process in processes]
    return {f"{key}_s": round(statistics.median(t[key] for t in times), 3) for key in times[0]} | {
        "start_up_max_s": round(max(t["start_up"] for t in times), 3)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--to", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.rank is not None:
        one_rank(args.folder, args.rank)
        return
    from compare_with_nanogpt import machine

    report: dict[str, Any] = {"command": " ".join(["python runs/loader/ranks.py", *sys.argv[1:]]), "machine": machine()}
    report |= {"world": RANKS, "shards": args.shards}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "data"
        write(folder, args.shards)
        report["ranks"] = all_ranks(folder)
        report["one_at_a_time"] = start_up(folder, [0, 1, 100, 511, 512, 1000, 1023], 1)
        report["two_at_once"] = start_up(folder, [0, 1, 100, 511, 512, 1000, 1022, 1023], 2)
    text = json.dumps(report, indent=1) + "\n"
    print(text)
    if args.to:
        args.to.write_text(text)


if __name__ == "__main__":
    main()
