"""Time of a sharded save: ours, gathered to one writer, beside torch's distributed checkpoint (DCP).

    python runs/shards/save_time.py [--layers=12] [--rounds=5]

Four CPU processes share one copy of GPT-2 (124M, or with more layers) under FSDP2 with AdamW's state, and save it in
turn by our writer, by dcp.save and by dcp.async_save, to the same disk. Two times of each save: how long steps stop,
and how long until the files are complete. Ours copies each rank's part to host memory; then a thread on each sends it
to rank 0, which writes all. DCP lets each rank write its own part.
Prediction, before all ranks gathered in the background: as long a stop as dcp.async_save, and complete later, since one
process writes and hashes everything. Outcome: 0.17 s beside 0.37 (dcp.save 2.6); complete after 3.4 beside 4.1 s.
When steps waited for the gathering: 4.2 s while each rank received all rows, 2.0 s when rank 0 alone did.
Writes save_time.json beside itself.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE.parent / "shakespeare_char_cpu")]


def work(folder: Path, layers: int, rounds: int) -> None:
    """As one of four processes, save `rounds` times in each way."""
    import torch
    import torch.distributed.checkpoint as dcp

    from load import build_model
    from model import GPTConfig
    from nanogpt import checkpoint, distributed
    from nanogpt.optim import Optimizer
    from nanogpt.run_dir import RunDir
    from nanogpt.sharding import local

    torch.set_num_threads(1)
    world = distributed.start("cpu", "float32", shards=0)
    model = build_model(GPTConfig(bias=False, block_size=64, n_layer=layers), None, world)
    optimizer = Optimizer(model, world, kind="adamw", learning_rate=1e-3)
    for p in optimizer.parameters.values():
        p.grad = torch.zeros_like(p)
        local(p.grad).normal_()
    optimizer.step(1.0, torch.ones(()), torch.zeros(()))
    weights, states = optimizer.parameters, optimizer.state_tensors()
    writer = checkpoint.Writer(RunDir(folder / "ours"), 0, 0.0, None, world.save_group)
    step = 0

    def barrier() -> None:
        world.all_reduce_sum(torch.ones(1))

    def ours() -> Callable[[], Any]:
        writer.save(weights, states, {"step": step})
        return writer.finish

    def dcp_save() -> Callable[[], Any]:
        dcp.save({"model": weights, "optimizer": states}, checkpoint_id=folder / f"dcp-{step}")
        return lambda: None

    def dcp_async_save() -> Callable[[], Any]:
        saved = dcp.async_save({"model": weights, "optimizer": states}, checkpoint_id=folder / f"async-{step}")
        return saved.result  # type: ignore[union-attr]

    ways = {"ours": ours, "dcp.save": dcp_save, "dcp.async_save": dcp_async_save}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for step in range(rounds + 1):
        for name, save in ways.items():
            barrier()
            os.sync() if world.is_main else None
            barrier()
            start = time.perf_counter()
            wait = save()
            barrier()
            stopped = time.perf_counter() - start
            wait()
            barrier()
            if step:  # the first makes host memory and thread pools
                seconds[name].append((stopped, time.perf_counter() - start))
        for name in ("dcp", "async"):
            if world.is_main:
                shutil.rmtree(folder / f"{name}-{step}")
    if world.is_main:
        nbytes = sum(t.numel() * t.element_size() for t in (*weights.values(), *states.values()))
        (folder / "times.json").write_text(json.dumps({"bytes": nbytes, "seconds": seconds}))
    world.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE / "save_time.json")
    arguments = parser.parse_args()
    from compare_with_nanogpt import machine

    with tempfile.TemporaryDirectory(dir=arguments.out.resolve().parent) as folder:
        (Path(folder) / "ours").mkdir()
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4"]
        command = [*launcher, __file__, "work", folder, str(arguments.layers), str(arguments.rounds)]
        subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
        report: dict[str, Any] = {"machine": machine(), **json.loads(Path(folder, "times.json").read_text())}
    for name, pairs in report["seconds"].items():
        stopped, complete = (statistics.median(times) for times in zip(*pairs, strict=True))
        print(f"{name:15} stops the steps for {stopped:6.2f} s, complete after {complete:6.2f} s")
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["work"]:
        work(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
