"""Compare plan.py with real steps of train.py: bytes in the process group, and peak memory of the processes.

    python runs/cluster_plan/measure.py --to=runs/cluster_plan/measured.json

Each case is a run of train.py under torchrun, with gloo on this machine's CPU. Bytes are those of one update at the
collectives of the main process: of s bytes among n processes it sends s (n - 1) / n, and twice that in an all-reduce,
as a ring does. Memory is the growth of the anonymous resident memory (without the pages of libraries and data), from
the end of the imports to the peak of three updates; the mean of the processes. The allocator returns freed memory at
once here, so that it measures what is in use.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "runs/cluster_plan"), str(ROOT / "runs/shakespeare_char_cpu")]

import plan  # noqa: E402

import train  # noqa: E402
from model import GPTConfig  # noqa: E402
from nanogpt import cpu_kernels, distributed  # noqa: E402

T = 192  # torch fuses attention beyond 128 positions
ROWS = 1  # of a micro-batch
SIZES = {
    "4 layers": {"n_layer": 4, "n_head": 4, "n_embd": 512},
    "124M": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "350M": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
}
UPDATES = 3  # before the bytes of the next are counted; in the second, DDP frees its buckets and makes them anew


class Traffic(TorchDispatchMode):
    """Count the bytes that this process sends, and the calls, by kind of collective, while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            names = [argument.name for argument in func._schema.arguments]
            self.count(func._opname, dict(zip(names, args, strict=False)))
        return func(*args, **(kwargs or {}))

    def count(self, name: str, arguments: dict[str, Any]) -> None:
        group = dist.ProcessGroup.unbox(arguments["process_group"])
        others = (group.size() - 1) / group.size()
        if name == "allreduce_":
            kind = "all-reduce"
            sent = 2 * others * sum(tensor.nbytes for tensor in arguments["tensors"])
        elif name == "_allgather_base_":
            kind = "all-gather"
            sent = others * arguments["output_tensor"].nbytes
        elif name == "_reduce_scatter_base_":
            kind = "reduce-scatter"
            sent = others * arguments["input_tensor"].nbytes
        elif name == "alltoall_base_":
            kind = "all-to-all"
            tensor = arguments["input"]
            rows = arguments["input_split_sizes"] or [len(tensor) // group.size()] * group.size()
            sent = tensor.nbytes * (1 - rows[group.rank()] / max(len(tensor), 1))
        else:
            raise NotImplementedError(name)
        self.sent[kind] += round(sent)
        self.calls[kind] += 1


def resident(field: str) -> int:
    """Bytes of this process in memory: VmHWM at the peak; now RssAnon, and RssFile of libraries and data."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


def run_rank(out: Path) -> None:
    """As one process of torchrun, run train.py; write what it took."""
    import torch.distributed.fsdp  # noqa: F401  # takes memory itself

    train_step = train.train_step
    before = resident("RssAnon")
    peaks = []
    traffic = Traffic()

    def measured_step(*args: Any, **kwargs: Any) -> Any:
        if len(peaks) < UPDATES:
            stats = train_step(*args, **kwargs)
            peaks.append(resident("VmHWM") - resident("RssFile"))
            return stats
        with traffic:
            train_step(*args, **kwargs)
        result = {"memory": peaks[-1] - before, "sent": traffic.sent, "calls": traffic.calls}
        (out / f"{os.environ['RANK']}.json").write_text(json.dumps(result))
        dist.barrier()
        raise SystemExit(0)

    train.train_step = measured_step
    distributed.disable_malloc_trim = lambda: None
    cpu_kernels.MAX_PLAIN_BACKWARD = 0  # so that bfloat16 keeps what torch's fused attention keeps, as on a GPU
    train.main()


def measure(processes: int, keys: dict[str, Any], dataset: Path) -> dict[str, Any]:
    """Bytes by kind and memory of a run of train.py with these keys."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [f"--{key}={value}" for key, value in keys.items()]
        flags += ["--dry_run=True", f"--dataset={dataset}", f"--out_dir={folder}/out"]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MEASURE_TO": folder, "MALLOC_MMAP_THRESHOLD_": "100000"}
        subprocess.run([*launcher, __file__, *flags], env=environment, check=True, stdout=subprocess.DEVNULL)
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(processes)]
    return {
        "sent": ranks[0]["sent"],
        "calls": ranks[0]["calls"],
        "memory": statistics.mean(rank["memory"] for rank in ranks),
    }


def expect(config: GPTConfig, processes: int, shards: int, step: plan.Step) -> dict[str, Any]:
    """The same by plan.py."""
    sent: Counter[str] = Counter()
    for part in plan.collectives(config, processes, shards, step):
        sent[part.kind] += round(plan.sent_bytes(part))
    return {"sent": sent, "memory": plan.memory_bytes(config, shards, step)}


def compare(name: str, processes: int, shards: int, optimizer: str, dtype: str, dataset: Path) -> dict[str, Any]:
    itemsize = 2 if dtype == "bfloat16" else 4
    step = plan.Step(ROWS, itemsize=itemsize, optimizer=optimizer)
    config = GPTConfig(**SIZES[name], block_size=T, bias=False)
    keys = SIZES[name] | {"block_size": T, "bias": False, "batch_size": ROWS, "gradient_accumulation_steps": processes}
    keys |= {"optimizer": optimizer, "dtype": dtype, "device": "cpu", "compile": False, "dropout": 0.0}
    if shards > 1:
        keys["shards"] = shards
    formula = expect(config, processes, shards, step)
    measured = measure(processes, keys, dataset)
    case = {"model": name, "processes": processes, "shards": shards, "optimizer": optimizer, "dtype": dtype}
    case |= {"formula": formula, "measured": measured}
    case["bytes_ratio"] = sum(measured["sent"].values()) / sum(formula["sent"].values())
    case["memory_ratio"] = measured["memory"] / formula["memory"]
    return case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="124M", help=f"of {', '.join(SIZES)}; with commas")
    parser.add_argument("--processes", default="2,4")
    parser.add_argument("--shards", help="with commas; 1, half of the processes and all of them by default")
    parser.add_argument("--optimizers", default="adamw,muon")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--to", type=Path)
    args = parser.parse_args()
    from compare_with_nanogpt import machine

    cases = []
    with tempfile.TemporaryDirectory() as folder:
        for split in ("train", "val"):
            np.random.default_rng(0).integers(0, 50_257, 100_000, dtype=np.uint16).tofile(f"{folder}/{split}.bin")
        for name in args.models.split(","):
            for processes in map(int, args.processes.split(",")):
                chosen = map(int, args.shards.split(",")) if args.shards else {1, processes // 2, processes}
                for shards in sorted(chosen):
                    for optimizer in args.optimizers.split(","):
                        for dtype in args.dtypes.split(","):
                            case = compare(name, processes, shards, optimizer, dtype, Path(folder))
                            cases.append(case)
                            print(json.dumps(case), flush=True)
    report = {"command": " ".join(["python runs/cluster_plan/measure.py", *sys.argv[1:]]), "machine": machine()}
    if args.to:
        args.to.write_text(json.dumps(report | {"cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    if "MEASURE_TO" in os.environ:
        run_rank(Path(os.environ["MEASURE_TO"]))
    else:
        main()
