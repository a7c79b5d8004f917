"""Time the stages of a short run of the fast recipe, of two checkouts in turn.

    python runs/start/measure.py --before=../before --dataset=data/shakespeare_char --out=runs/start/result.json

The stages end when their line is printed. "loaded": imports, data, model; "first step"; "evaluated": four more steps
and the loss of the whole validation split; "saved": the checkpoint; "exit": the end of the process.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "runs/shakespeare_char_cpu"))

from compare_with_nanogpt import machine  # noqa: E402

LINES = {"1 process": "loaded", "first step": "first step", "step      5 | val": "evaluated", "done:": "saved"}


def run(root: Path, dataset: str) -> dict[str, float]:
    """Seconds of each stage of one process, and its CPU seconds and peak memory."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    env["PYTHONPATH"] = str(root)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", "config/train_shakespeare_fast_cpu.py", "--max_iters=5", "--device=cpu"]
        command += [f"--dataset={dataset}", f"--out_dir={folder}/out"]
        start = last = time.perf_counter()
        process = subprocess.Popen(command, cwd=root, env=env, stdout=subprocess.PIPE, text=True)
        assert process.stdout
        stages = {}
        for line in process.stdout:
            for prefix, stage in LINES.items():
                if line.startswith(prefix):
                    now = time.perf_counter()
                    stages[stage] = now - last
                    last = now
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0, status
        end = time.perf_counter()
    cpu = usage.ru_utime + usage.ru_stime
    return {**stages, "exit": end - last, "whole": end - start, "cpu": cpu, "peak_mb": usage.ru_maxrss * 1024 / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True)
    parser.add_argument("--dataset", default="data/shakespeare_char")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    roots = {"before": args.before.resolve(), "after": ROOT}
    dataset = str(Path(args.dataset).resolve())
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in roots}
    for number in range(args.rounds + 1):
        for name, root in roots.items():
            stages = run(root, dataset)
            if number:  # the first round warms the caches
                rounds[name].append(stages)

    result = {}
    for key in rounds["before"][0]:
        before, after = ([stages[key] for stages in rounds[name]] for name in roots)
        ratios = [b / a for a, b in zip(before, after, strict=True)]
        medians = {"before": statistics.median(before), "after": statistics.median(after)}
        least = {"least_before": min(before), "least_after": min(after), "median_ratio": statistics.median(ratios)}
        result[key] = {name: round(value, 3) for name, value in (medians | least).items()}
        print(f"{key:10} {result[key]}")
    words = Path("/proc/cpuinfo").read_text().split()
    flags = sorted({word for word in words if word.startswith(("avx", "amx"))})
    report = {"machine": machine(), "cpu_flags": flags, "rounds": args.rounds, "seconds": result}
    args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
