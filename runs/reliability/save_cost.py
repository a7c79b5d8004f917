"""The time that training pauses for a checkpoint of GPT-2 (124M): weights and AdamW's moments, 1.5 GB.

    python runs/reliability/save_cost.py

Alternates the writer, which returns once the state is copied to host memory, and the same checkpoint written in the
loop. Prediction: copying takes a twentieth of writing, hashing and syncing. Writes save_cost.json beside itself.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "runs" / "shakespeare_char_cpu")]

from compare_with_nanogpt import machine  # noqa: E402

from model import GPT, GPTConfig  # noqa: E402
from nanogpt import checkpoint  # noqa: E402
from nanogpt.device import disable_malloc_trim  # noqa: E402
from nanogpt.distributed import World  # noqa: E402
from nanogpt.optim import Optimizer  # noqa: E402
from nanogpt.run_dir import RunDir  # noqa: E402

ROUNDS = 5


def main() -> None:
    disable_malloc_trim()  # as training does
    model = GPT(GPTConfig(bias=False))
    world = World(0, 1, torch.device("cpu"), torch.float32)
    weights = model.state_dict()
    moments = Optimizer(model, world, learning_rate=6e-4).state_tensors()
    rows = []
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        out_dir = Path(folder)
        with checkpoint.Writer(RunDir(out_dir), 0, 0.0, None) as writer:
            for number in range(ROUNDS):
                state = {"step": 2 * number, "val_loss": None}
                start = time.perf_counter()
                writer.save(weights, moments, state)
                beside_s = time.perf_counter() - start
                writer.finish()
                whole_s = time.perf_counter() - start
                start = time.perf_counter()
                checkpoint.save(out_dir, weights, moments, state | {"step": 2 * number + 1}, None)
                in_loop_s = time.perf_counter() - start
                rows.append({"beside_s": beside_s, "until_written_s": whole_s, "in_the_loop_s": in_loop_s})
                checkpoint.prune(out_dir, 0)
                print(rows[-1], flush=True)
    ratio = statistics.median(row["beside_s"] / row["in_the_loop_s"] for row in rows)
    summary = {"standing still, of writing in the loop": round(ratio, 4)}
    summary |= {name: round(statistics.median(row[name] for row in rows), 3) for name in rows[0]}
    report = {
        "command": "python runs/reliability/save_cost.py",
        "machine": machine(),
        "summary": summary,
        "rounds": rows,
    }
    Path(__file__).with_name("save_cost.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
