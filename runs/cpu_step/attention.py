"""Ways to compute attention and GELU on a CPU, in turn: python runs/cpu_step/attention.py --to=result.json

Forward and backward of causal attention, with torch's fused kernel both ways, with its forward and a plain backward
pass, and with plain products both ways; forward and backward of GELU's exact and tanh form. Medians in microseconds.
Prediction, before the first run: in bfloat16 the plain backward is faster up to 256 positions, and GELU's approximation
takes no longer than what it approximates.
Outcome on a Xeon with AMX (attention.json): in bfloat16 the plain backward is faster up to 512 positions, 1.5 to 1.6
times at 256 and 512; in float32 nowhere. GELU's tanh form takes 2.5 to 3.3 times as long as the exact one, since torch
leaves only the exact one to oneDNN.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "runs/shakespeare_char_cpu")]

from compare_with_nanogpt import machine  # noqa: E402

from nanogpt.cpu_kernels import FusedForwardAttention, plain_attention  # noqa: E402
from nanogpt.device import disable_malloc_trim  # noqa: E402

ATTENTION = {  # rows, heads, key heads, positions, channels of a head
    "nanoGPT's small": (12, 4, 4, 64, 32),
    "the fast recipe": (24, 4, 1, 64, 32),
    "SmolLM2, 128": (8, 9, 3, 128, 64),
    "SmolLM2, 256": (4, 9, 3, 256, 64),
    "GPT-2, 256": (4, 12, 12, 256, 64),
    "GPT-2, 512": (2, 12, 12, 512, 64),
    "GPT-2, 1024": (1, 12, 12, 1024, 64),
}
GELU = {"nanoGPT's small": (768, 512), "GPT-2": (1024, 3072)}


def fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] < q.shape[1])


def compare(functions: dict[str, Callable[..., Tensor]], inputs: list[Tensor], rounds: int) -> dict[str, float]:
    """The median microseconds of forward and backward of each function, in turn."""
    grad = torch.randn_like(next(iter(functions.values()))(*inputs))
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            torch.autograd.grad(function(*inputs), inputs, grad)
            seconds[name].append(time.perf_counter() - start)
    return {name: round(1e6 * statistics.median(times[2:])) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--to", type=Path)
    arguments = parser.parse_args()
    disable_malloc_trim()  # as train.py does
    torch.manual_seed(0)
    report: dict[str, Any] = {"machine": machine(), "attention": {}, "gelu": {}}
    attention = {"fused": fused_attention, "plain backward": FusedForwardAttention.apply, "plain": plain_attention}
    gelu = {"exact": F.gelu, "tanh": lambda x: F.gelu(x, approximate="tanh")}
    for dtype in (torch.float32, torch.bfloat16):
        for name, (B, n_head, n_kv_head, T, D) in ATTENTION.items():
            shapes = [(B, heads, T, D) for heads in (n_head, n_kv_head, n_kv_head)]
            inputs = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
            report["attention"][f"{name}, {dtype}"] = compare(attention, inputs, arguments.rounds)
        for name, shape in GELU.items():
            x = torch.randn(shape, dtype=dtype, requires_grad=True)
            report["gelu"][f"{name}, {dtype}"] = compare(gelu, [x], arguments.rounds)
    for part in ("attention", "gelu"):
        for name, times in report[part].items():
            print(f"{part}, {name}: {times}")
    if arguments.to:
        arguments.to.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
