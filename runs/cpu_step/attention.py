"""Plain attention against torch's fused kernel on this CPU, forward and backward, in turn: the ratio of their times.

    python runs/cpu_step/attention.py

Prediction before the first run: plain wins below a few hundred positions, where the fused kernel's set-up dominates, and
loses beyond, where it writes and reads the square of positions.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from model import plain_attention  # noqa: E402


def seconds(attend, q, k, v, upstream) -> float:
    start = time.perf_counter()
    torch.autograd.grad(attend(q, k, v), (q, k, v), upstream)
    return time.perf_counter() - start


def fused(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def plain(q, k, v):
    return plain_attention(q, k, v, dropout=0.0)


def main() -> None:
    rows = []
    for head_dim, heads in ((32, 4), (64, 12)):
        for T in (32, 64, 128, 256, 512, 1024):
            B = max(1, 1024 // T)
            # Laid out as the model has them: (B, T, 3, heads, head_dim) in memory.
            q, k, v = torch.randn(B, T, 3, heads, head_dim).permute(2, 0, 3, 1, 4).detach().requires_grad_().unbind()
            upstream = torch.randn(B, T, heads, head_dim).transpose(1, 2)
            times = [(seconds(fused, q, k, v, upstream), seconds(plain, q, k, v, upstream)) for _ in range(60)][10:]
            ratio = statistics.median(f / p for f, p in times)
            plain_ms = 1e3 * statistics.median(p for _, p in times)
            rows.append({"head_dim": head_dim, "heads": heads, "T": T, "rows": B, "fused_over_plain": round(ratio, 2)})
            print(
                f"head_dim {head_dim}, {heads} heads, {B} × {T}: fused / plain = {ratio:.2f} (plain {plain_ms:.2f} ms)"
            )
    facts = {"torch": torch.__version__, "threads": torch.get_num_threads(), "dtype": "float32", "rows": rows}
    (Path(__file__).parent / "attention.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
