"""How large a model, on how many tokens: one family of shapes, one recipe for it, and the law of its losses.

The constants come from the runs in runs/scaling; scaling_laws.ipynb shows the fit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

ADAMW_LR_RATIO = 3.3  # times Muon's rate: that of embeddings and gains
RECIPE = {"arch": "modern", "optimizer": "muon", "muon_momentum": 0.9, "beta2": 0.98, "grad_clip": 1.0}
RECIPE |= {"schedule": "trapezoid", "min_lr": 0.0, "weight_decay": 0.1, "beta1": 0.9}


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
    sizes = shape(n_embd) | {"batch_size": rows, "gradient_accumulation_steps": 1}
    steps = max(round(tokens / rows / block_size), 1)
    rates = {"learning_rate": ADAMW_LR_RATIO * muon_lr, "muon_lr": muon_lr, "warmup_iters": min(10, steps // 5)}
    return RECIPE | sizes | rates | {"max_iters": steps}


@dataclass(frozen=True)
class Law:
    """loss(N, D) = E + A / N^alpha + B / D^beta in nats per token (Hoffmann et al. 2022, arXiv:2203.15556): N weights
    in the blocks, D tokens.

    A text of U tokens that is read again is learned by heart, and the loss lies K (D/U - 1)^(p (N/U)^q) above that of
    as many new ones: the more weights for a token, the faster it grows. An expression of ours that fits our runs.
    """

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    K: float = 0.0
    p: float = 1.0
    q: float = 0.0

    def loss(self, N: float, D: float, unique: float = math.inf) -> float:
        """unique: U, the text's own tokens."""
        return self.E + self.A / N**self.alpha + self.B / D**self.beta + self.repetition_penalty(N, D, unique)

    def repetition_penalty(self, N: float, D: float, unique: float) -> float:
        """What reading a text again adds to the loss."""
        return self.K * (D / unique - 1) ** (self.p * (N / unique) ** self.q) if unique < D else 0.0

    def length(self, N: float, D: float, unique: float) -> float:
        """How many of at most D tokens are best read: as many as do no harm of over 0.2% of the loss."""
        if unique >= D:
            return D
        lengths = np.geomspace(unique, D, 200)
        losses = [self.loss(N, length, unique) for length in lengths.tolist()]
        return float(max(lengths[np.array(losses) <= 1.002 * min(losses)]))

    def best(self, flops: float) -> tuple[float, float]:
        """N and D of the lowest loss that 6 N D = `flops` can buy."""
        G = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        N = G * (flops / 6) ** (self.beta / (self.alpha + self.beta))
        return N, flops / 6 / N


def fit(points: Sequence[tuple[float, float, float]]) -> Law:
    """The law nearest to points (N, D, loss), by the least squares of its relative errors. With the exponents given,
    the rest is linear; so a grid of exponents is searched, ever more finely."""
    N, D, loss = np.array(points, float).T
    middle, width = np.array([0.5, 0.5]), 0.45
    while width > 1e-4:
        alpha, beta = (
            grid.ravel() for grid in np.meshgrid(*(np.linspace(x - width, x + width, 11).clip(0.02) for x in middle))
        )
        terms = [np.ones((len(alpha), len(N))), (N / N[0]) ** -alpha[:, None], (D / D[0]) ** -beta[:, None]]
        columns = np.stack(terms, -1) / loss[:, None]  # (exponents, points, 3)
        gram = columns.mT @ columns + 1e-12 * np.eye(3)
        found = np.linalg.solve(gram, columns.sum(1)[..., None])  # (exponents, 3, 1)
        best = ((columns @ found - 1) ** 2).sum((1, 2)).argmin()
        middle, width = np.array([alpha[best], beta[best]]), width / 2
    E, A, B = found[best, :, 0].tolist()
    alpha, beta = middle.tolist()
    return Law(E, A * N[0].item() ** alpha, B * D[0].item() ** beta, alpha, beta)


LAW = Law(E=0.95368, A=12.1774, B=33.3436, alpha=0.32501, beta=0.32288, K=0.0218, p=0.779, q=0.269)
# What a model of this width reaches on the books after so many tokens; on another text it shows how hard that one is.
PILOT_WIDTH = 64
PILOT_LOSSES = {15_625: 2.7016, 31_250: 2.3322, 62_500: 2.1549, 125_000: 1.9347, 250_000: 1.8274, 500_000: 1.7233}
PILOT_LOSSES |= {1_000_000: 1.6244, 2_000_000: 1.5447, 4_000_000: 1.4826}
# What rows of so many tokens add to the loss, by the time that 64 channels have read a million.
CONTEXTS = {32: 1.031, 64: 1.010, 128: 1.0, 256: 1.003}


def difficulty(loss: float, tokens: float, unique: float, block_size: int) -> float:
    """How many times the law's losses a text's are, from the loss of a model of `PILOT_WIDTH` after so many tokens, of
    which the text has `unique`. NaN: too few to tell.

    The shorter the pilot, the more alike all texts look: what tells a text from the books is counted 1.55 times after
    125,000 tokens, 1.2 times after 250,000, but by no more than a twentieth. Fitted, by eye, to three texts in
    characters and one in byte pairs (scaling_laws.ipynb).
    """
    if tokens < 0.9 * min(PILOT_LOSSES):
        return math.nan
    size, longest = weights(shape(PILOT_WIDTH)), max(PILOT_LOSSES)
    books = float(np.interp(math.log(tokens), np.log([*PILOT_LOSSES]), [*PILOT_LOSSES.values()]))
    if tokens > longest:
        books *= LAW.loss(size, tokens) / LAW.loss(size, longest)
    ratio = loss / (books + LAW.repetition_penalty(size, tokens, unique))
    to_come = (ratio - 1) * 0.55 * (125_000 / max(tokens, 62_500)) ** 1.4
    context = float(np.interp(math.log(block_size), np.log([*CONTEXTS]), [*CONTEXTS.values()]))
    return (ratio + min(max(to_come, -0.05 * ratio), 0.05 * ratio)) * context
