"""bfloat16 against float32 on a CPU with bfloat16 instructions: products and whole steps, alternating.

    python runs/cpu_step/bfloat16.py

Prediction: by AVX-512's dot products (avx512_bf16, without AMX) a bfloat16 product is up to twice as fast, a small step
as fast as in float32. Outcome (bfloat16.json): both are slower at any size, so `--dtype=auto` requires AMX.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "runs/shakespeare_char_cpu"))

from compare_with_nanogpt import machine  # noqa: E402

from model import GPT, GPTConfig  # noqa: E402

ROUNDS = 7
DTYPES = (torch.float32, torch.bfloat16)


def product(dtype: torch.dtype, rows: int, inner: int, columns: int) -> Callable[[], object]:
    x, weight = torch.randn(rows, inner, dtype=dtype), torch.randn(columns, inner, dtype=dtype)
    return lambda: torch.nn.functional.linear(x, weight)


def step(dtype: torch.dtype, n_embd: int) -> Callable[[], object]:
    """Forward and backward on 16 rows of 128 tokens."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=4, n_head=n_embd // 32, n_embd=n_embd, vocab_size=65, block_size=128, bias=False))
    idx = torch.randint(65, (16, 128))

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(idx, idx)[1]
        loss.backward()
        model.zero_grad(set_to_none=True)

    return run


def speed(make: Callable[..., Callable[[], object]], *sizes: int) -> float:
    """The speed of bfloat16 over that of float32, the median of a few rounds."""
    functions = [make(dtype, *sizes) for dtype in DTYPES]
    ratios = []
    for _ in range(1 + ROUNDS):
        seconds = []
        for function in functions:
            start = time.perf_counter()
            count = 0
            while time.perf_counter() - start < 0.3:
                function()
                count += 1
            seconds.append((time.perf_counter() - start) / count)
        ratios.append(seconds[0] / seconds[1])
    return round(statistics.median(ratios[1:]), 2)


def main() -> None:
    report = {
        **machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "amx": torch.cpu._is_amx_tile_supported(),
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "threads": torch.get_num_threads(),
    }
    products = ((2048, 64, 64), (2048, 128, 512), (2048, 768, 768), (1024, 768, 3072))
    report["products, bfloat16's speed over float32's"] = {str(sizes): speed(product, *sizes) for sizes in products}
    report["steps, bfloat16's speed over float32's"] = {n_embd: speed(step, n_embd) for n_embd in (64, 128, 256, 768)}
    text = json.dumps(report, indent=1)
    Path(__file__).with_suffix(".json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
