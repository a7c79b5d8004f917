"""Scaling: one family of model shapes, its recipe, and the law of its losses.

The constants come from the runs in runs/scaling; scaling_laws.ipynb shows the fit.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

ADAMW_LR_RATIO = 3.3  # learning rate of embeddings and gains over Muon's


def pick_sizes(n_embd: int) -> dict[str, int]:
    """Sizes of a modern GPT of this width, a multiple of 16: deeper as it is wider, 12 layers at 768 as GPT-2."""
    n_layer = max(2, round(2 * (n_embd / 48) ** 0.65))
    head_dim = next(d for d in (64, 32, 16) if n_embd % d == 0 and (n_embd >= 8 * d or d <= 32))
    n_inner = math.ceil(8 * n_embd / 3 / 64) * 64
    return {"n_layer": n_layer, "n_embd": n_embd, "n_head": n_embd // head_dim, "n_inner": n_inner}


def count_weights(n_embd: int) -> int:
    """Number of weights in the blocks' matrices at this width: the law's model size."""
    sizes = pick_sizes(n_embd)
    return sizes["n_layer"] * n_embd * (4 * n_embd + 3 * sizes["n_inner"])


def make_recipe(n_embd: int, tokens: float, block_size: int) -> dict[str, Any]:
    """The keys of TrainConfig for a run of this width and length: sizes, batch, steps, learning rates."""
    rows = max(4, round(2048 * (tokens / 1e6) ** 0.5 / block_size / 4) * 4)
    steps = max(round(tokens / rows / block_size), 1)
    muon_lr = 0.0103 * (64 / n_embd) ** 0.8
    return {
        "arch": "modern",
        "look_back": True,
        "optimizer": "muon",
        "muon_momentum": 0.9,
        "beta1": 0.9,
        "beta2": 0.98,
        "weight_decay": 0.1,
        "grad_clip": 1.0,
        "schedule": "trapezoid",
        "min_lr": 0.0,
        **pick_sizes(n_embd),
        "batch_size": rows,
        "gradient_accumulation_steps": 1,
        "learning_rate": ADAMW_LR_RATIO * muon_lr,
        "muon_lr": muon_lr,
        "warmup_iters": min(10, steps // 5),
        "max_iters": steps,
    }


@dataclass(frozen=True)
class Law:
    """loss(N, D) = E + A / N^alpha + B / D^beta in nats per token (Hoffmann et al. 2022, arXiv:2203.15556).

    N: weights in the blocks. D: tokens. Reading a text of U tokens more than once overfits: its loss lies
    K (D/U - 1)^(p (N/U)^q) above that of as many new tokens, and grows faster the more weights there are for a token.
    That term is our own; it fits our runs.
    """

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    K: float = 0.0
    p: float = 1.0
    q: float = 0.0

    def predict_loss(self, N: float, D: float, unique: float = math.inf) -> float:
        """unique: U, the text's own tokens."""
        return self.E + self.A / N**self.alpha + self.B / D**self.beta + self.predict_penalty(N, D, unique)

    def predict_penalty(self, N: float, D: float, unique: float) -> float:
        if unique >= D:
            return 0.0
        return self.K * (D / unique - 1) ** (self.p * (N / unique) ** self.q)

    def pick_tokens(self, N: float, D: float, unique: float) -> float:
        """Tokens that are best read, of at most D: the most that cost less than 0.2% of the loss."""
        if unique >= D:
            return D
        lengths = np.geomspace(unique, D, 200)
        losses = [self.predict_loss(N, length, unique) for length in lengths.tolist()]
        return float(max(lengths[np.array(losses) <= 1.002 * min(losses)]))

    def split_flops(self, flops: float) -> tuple[float, float]:
        """N and D of the lowest loss with 6 N D = flops."""
        G = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        N = G * (flops / 6) ** (self.beta / (self.alpha + self.beta))
        return N, flops / 6 / N


LAW = Law(E=0.95368, A=12.1774, B=33.3436, alpha=0.32501, beta=0.32288, K=0.0218, p=0.779, q=0.269)
LOOK_BACK_FACTOR = 0.985  # look_back's gain: the law's runs began without it
# The loss of a model of this width on the reference text (books) by tokens: another text's shows how hard that one is.
# Shorter pilots read far too low: tiny Shakespeare 0.88 after 18,000 tokens and 1.03 after 70,000.
PILOT_WIDTH = 64
PILOT_LOSSES = {
    62_500: 2.1549,
    125_000: 1.9347,
    250_000: 1.8274,
    500_000: 1.7233,
    1_000_000: 1.6244,
    2_000_000: 1.5447,
    4_000_000: 1.4826,
}
# Factor on the loss for rows of this many tokens, at a million tokens and 64 channels.
CONTEXTS = {32: 1.031, 64: 1.010, 128: 1.0, 256: 1.003}


def estimate_difficulty(loss: float, tokens: float, unique: float, block_size: int) -> float:
    """A text's loss over the law's, from the loss of a PILOT_WIDTH model after `tokens` tokens; NaN if too few.

    unique: the text's own tokens. A short pilot makes texts look alike, so the difference from the reference text is
    scaled up: 1.55 times after 125,000 tokens, 1.2 times after 250,000, by at most a twentieth of the loss. Fitted by
    eye to three texts in characters and one in byte pairs (scaling_laws.ipynb).
    """
    if tokens < 0.9 * min(PILOT_LOSSES):
        return math.nan
    size = count_weights(PILOT_WIDTH)
    longest = max(PILOT_LOSSES)
    reference = _interpolate_log(tokens, PILOT_LOSSES)
    if tokens > longest:
        reference *= LAW.predict_loss(size, tokens) / LAW.predict_loss(size, longest)
    ratio = loss / (reference + LAW.predict_penalty(size, tokens, unique))
    correction = (ratio - 1) * 0.55 * (125_000 / max(tokens, 62_500)) ** 1.4
    correction = min(max(correction, -0.05 * ratio), 0.05 * ratio)
    return (ratio + correction) * _interpolate_log(block_size, CONTEXTS)


def _interpolate_log(x: float, table: dict[int, float]) -> float:
    """The table's value at x, linear in log x; the end values beyond its ends."""
    return float(np.interp(math.log(x), np.log([*table]), [*table.values()]))
