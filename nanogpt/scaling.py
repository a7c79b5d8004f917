"""How large a model, on how many tokens: one family of shapes, one recipe for it, and the law of its losses.

The constants come from the runs in runs/scaling; scaling_laws.ipynb shows the fit.
"""

from typing import Any

OTHERS = 3.3  # times Muon's rate: that of embeddings and gains
RECIPE = {"arch": "modern", "optimizer": "muon", "muon_momentum": 0.9, "beta2": 0.98, "grad_clip": 1.0}
RECIPE |= {"schedule": "trapezoid", "warmup_iters": 10, "min_lr": 0.0}


def shape(n_embd: int) -> dict[str, int]:
    """Sizes of a modern GPT of this width, a multiple of 16: deeper as it is wider, 12 layers at 768 as GPT-2 has."""
    n_layer = max(2, round(2 * (n_embd / 48) ** 0.65))
    head_dim = next(d for d in (64, 32, 16) if n_embd % d == 0 and (n_embd >= 8 * d or d <= 32))
    n_inner = -(-8 * n_embd // (3 * 64)) * 64
    return {"n_layer": n_layer, "n_embd": n_embd, "n_head": n_embd // head_dim, "n_inner": n_inner}


def weights(sizes: dict[str, int]) -> int:
    """Numbers in the blocks' matrices: what the law counts as a model's size."""
    return sizes["n_layer"] * sizes["n_embd"] * (4 * sizes["n_embd"] + 3 * sizes["n_inner"])


def recipe(n_embd: int, tokens: float, block_size: int) -> dict[str, Any]:
    """train.py's keys for a run of a given width and length: sizes, rows per step, steps, rates."""
    rows = max(4, round(2048 * (tokens / 1e6) ** 0.5 / block_size / 4) * 4)
    muon_lr = 0.0103 * (64 / n_embd) ** 0.8
    return (
        shape(n_embd)
        | {
            "batch_size": rows,
            "gradient_accumulation_steps": 1,
            "max_iters": round(tokens / rows / block_size),
            "learning_rate": OTHERS * muon_lr,
            "muon_lr": muon_lr,
        }
        | RECIPE
    )
