"""A text source whose statistics are known, and datasets cut into shards."""

import bisect
import hashlib
import json
from pathlib import Path

import numpy as np

from nanogpt.data.write import write_dataset
from nanogpt.text.tokenizer import Tokenizer

LETTERS = "abcd"


class Source:
    """A second-order Markov source of LETTERS.

    `probs`: (4, 4, 4), P(next | last but one, last). `pairs`: (4, 4), the stationary distribution of two letters.
    """

    def __init__(self, seed: int):
        self.random = np.random.default_rng(seed)
        n = len(LETTERS)
        self.probs = 0.95 * self.random.dirichlet(np.full(n, 0.3), size=(n, n)) + 0.05 / n
        self.pairs = np.full((n, n), 1 / n**2)
        for _ in range(1000):
            self.pairs = np.einsum("ab,abc->bc", self.pairs, self.probs)

    def draw(self, count: int) -> np.ndarray:
        thresholds = self.probs.cumsum(-1)[..., :-1].tolist()
        ids = [0, 0]
        for x in self.random.random(count).tolist():
            ids.append(bisect.bisect_right(thresholds[ids[-2]][ids[-1]], x))
        return np.array(ids[2:])

    def first_order(self) -> np.ndarray:
        """P(next | last), (4, 4)."""
        return np.einsum("ab,abc->bc", self.pairs, self.probs) / self.pairs.sum(0)[:, None]

    def loss(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """The lowest possible loss of the targets y of windows x, in nats, both (B, T)."""
        best = np.empty(x.shape)
        best[:, 0] = self.first_order()[x[:, 0], y[:, 0]]  # the first letter of a window has one letter before it
        best[:, 1:] = self.probs[x[:, :-1], x[:, 1:], y[:, 1:]]
        return -np.log(best)


def write_letters(folder: Path, source: Source, train: int = 20_000, val: int = 2_000) -> None:
    """Write a dataset of letters that a source draws."""
    splits = {"train": [source.draw(train)], "val": [source.draw(val)]}
    write_dataset(folder, splits, Tokenizer.characters(LETTERS))


def shard(folder: Path, tokens: int, mask: dict[str, np.ndarray] | None = None) -> None:
    """Cut each split of a dataset into files of `tokens` tokens, with a loss mask beside them if given."""
    meta = json.loads((folder / "meta.json").read_text())
    for split, info in meta["splits"].items():
        ids = np.fromfile(folder / f"{split}.bin", meta["dtype"])
        (folder / f"{split}.bin").unlink()
        del info["sha256"]
        info["shards"] = []
        for k, first in enumerate(range(0, len(ids), tokens)):
            path = folder / f"{split}-{k:05d}.bin"
            ids[first : first + tokens].tofile(path)
            entry = {"file": path.name, "tokens": len(ids[first : first + tokens]), "sha256": sha256(path)}
            if mask:
                mask[split][first : first + tokens].astype(np.uint8).tofile(path.with_suffix(".mask"))
                entry["mask_sha256"] = sha256(path.with_suffix(".mask"))
            info["shards"].append(entry)
    if mask:
        meta["loss_mask"] = True
    (folder / "meta.json").write_text(json.dumps(meta))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
