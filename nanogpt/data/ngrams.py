"""Soft targets: distributions of the next token, counted from the training split."""

from typing import TYPE_CHECKING

import numpy as np

from nanogpt.console import format_bytes, print0
from nanogpt.data.dataset import Dataset, Tokens
from nanogpt.data.rows import EvalWindows
from nanogpt.errors import InputError

if TYPE_CHECKING:
    import torch

MAX_TOKENS = 2**22  # counted, from the middle of the split: bounds time and memory
MIN_COUNT = 2  # a context seen less often has the distribution of the shorter one
NUM_CANDIDATES = 32  # tokens of a distribution, the most probable ones
VAL_TOKENS = 2**15  # tokens of the validation split on which the counts themselves are measured
UNIFORM_SHARE = 0.03  # uniform distribution's share there, for tokens that the counts lack


def count_ngrams(dataset: Dataset, order: int, block_size: int, vocab_size: int) -> "NgramTargets | None":
    """Soft targets counted from a training split, and a printed line about them; None for order 0."""
    if not order:
        return None
    ngrams = NgramTargets(dataset.train, order, vocab_size)
    windows = EvalWindows(dataset.val, block_size, 1, max(VAL_TOKENS // block_size, 1), vocab_size)
    nbytes = sum(array.nbytes for array in (ngrams.ids, ngrams.probs, *ngrams.contexts))
    print0(
        f"targets     of {order}-grams: {len(ngrams.ids):,} contexts, {format_bytes(nbytes)}; these counts "
        f"alone have a validation loss of about {ngrams.loss(*windows[0 : len(windows)]):.3f}"
    )
    return ngrams


class NgramTargets:
    """The distribution of the next token after up to `order` - 1 tokens: `ids, probs = ngrams(x, y)`.

    A small network learns sooner from all tokens that followed a context in the training split than from the one that
    follows here (Sathe and Sarawagi 2024, arXiv:2407.02819). Contexts of all lengths are mixed by the rule of Witten
    and Bell (1991): after a context that was seen c times and had t different successors, a token seen n times has the
    probability (n + t p) / (c + t), where p is its probability after the context without its first token.
    What the tokens that are not stored would have goes to the one that follows: with large vocabularies that is much.
    """

    def __init__(self, tokens: Tokens, order: int, vocab_size: int):
        """Raises InputError if `order` ids do not fit into an integer of 64 bits, or the tokens cannot be counted."""
        if vocab_size**order > 2**64:
            highest = int(64 / np.log2(vocab_size))
            raise InputError(f"ngram_targets={order}: with {vocab_size:,} ids use at most {highest}")
        self.vocab_size = vocab_size
        # By length from 0 to order - 1: the contexts, each the integer whose digits are its ids, ascending.
        self.contexts: list[np.ndarray] = []
        ids: list[np.ndarray] = []
        probs: list[np.ndarray] = []
        pieces = _read_pieces(tokens, vocab_size)
        for length in range(order):
            contexts, counted_ids, counted_probs, rest = self._count(pieces, length)
            if length > 0:
                shorter = np.searchsorted(self.contexts[-1], contexts % np.uint64(vocab_size ** (length - 1)))
                counted_ids, counted_probs = _most_probable(
                    np.concatenate((counted_ids, ids[-1][shorter]), axis=1),
                    np.concatenate((counted_probs, probs[-1][shorter] * rest[:, None]), axis=1),
                )
            self.contexts.append(contexts)
            ids.append(counted_ids)
            probs.append(counted_probs)
        self.ids = np.concatenate(ids)  # (all contexts, NUM_CANDIDATES); of two equal ones the probabilities add up
        self.probs = np.concatenate(probs)

    def __call__(self, x: "torch.Tensor", y: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
        """Ids and their probabilities, each (B, T, NUM_CANDIDATES + 1), of the token after each position of x (B, T).

        y: the tokens that follow, (B, T).
        """
        import torch

        ids, probs = self.look_up(x)
        rest = (1 - probs.sum(-1, keepdim=True)).clamp(min=0)
        return torch.cat((ids, y.clamp(min=0)[..., None]), -1), torch.cat((probs, rest), -1)

    def look_up(self, x: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
        """Those that are stored, each (B, T, NUM_CANDIDATES).

        A context lies within its row, and is the longest one that was counted.
        """
        import torch

        digits = x.numpy().astype(np.uint64)
        context = np.zeros_like(digits)  # of each position: its last ids, by now `length` of them
        row = np.zeros(x.shape, dtype=np.int64)
        first_row = len(self.contexts[0])
        T = x.shape[1]
        for length, known in enumerate(self.contexts[1 : T + 1], start=1):
            if not len(known):
                break
            place = np.uint64(self.vocab_size ** (length - 1))
            context[:, length - 1 :] += digits[:, : T - length + 1] * place
            row_of_length = np.searchsorted(known, context).clip(max=len(known) - 1)
            is_known = known[row_of_length] == context
            is_known[:, : length - 1] = False  # the row begins later
            row[is_known] = first_row + row_of_length[is_known]
            first_row += len(known)
        return torch.from_numpy(self.ids[row]).long(), torch.from_numpy(self.probs[row])

    def loss(self, x: "torch.Tensor", y: "torch.Tensor") -> float:
        """The mean loss in nats of these distributions themselves, a little smoothed, on targets y (B, T)."""
        ids, probs = self.look_up(x)
        probs = probs * (1 - UNIFORM_SHARE)
        prob = (probs * (ids == y[..., None])).sum(-1) + (1 - probs.sum(-1)) / self.vocab_size
        return -prob[y >= 0].log().mean().item()

    def _count(self, pieces: list[tuple[np.ndarray, np.ndarray]], length: int) -> tuple[np.ndarray, ...]:
        """Count the successors of all contexts of `length` tokens, those that are targets.

        Returns the contexts, the ids and the probabilities n / (c + t) of their most frequent successors, each
        (contexts, NUM_CANDIDATES), and the weight t / (c + t) of the shorter context.
        """
        base = np.uint64(self.vocab_size)
        sequences = [_to_integers(ids, length + 1, base)[is_target[length:]] for ids, is_target in pieces]
        sequence, count = np.unique(np.concatenate(sequences), return_counts=True)
        contexts, first, num_successors = np.unique(sequence // base, return_index=True, return_counts=True)
        total = np.add.reduceat(count, first)

        # The successors of each context by falling count.
        context = np.repeat(np.arange(len(contexts)), num_successors)
        by_count = np.lexsort((-count, context))
        rank = np.arange(len(sequence)) - first[context]
        is_frequent = total >= (MIN_COUNT if length else 1)
        keep = (rank < NUM_CANDIDATES) & is_frequent[context]
        at = (np.cumsum(is_frequent) - 1)[context[keep]], rank[keep]
        shape = (is_frequent.sum(), NUM_CANDIDATES)
        ids = np.zeros(shape, dtype=np.int32)
        probs = np.zeros(shape, dtype=np.float32)
        ids[at] = (sequence % base)[by_count][keep]
        rest = np.where(length, num_successors, 0)
        probs[at] = (count[by_count] / (total + rest)[context])[keep]
        return contexts[is_frequent], ids, probs, (rest / (total + rest)).astype(np.float32)[is_frequent]


def _read_pieces(tokens: Tokens, vocab_size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """At most MAX_TOKENS of the split as uint64, and whether each is a target: one run of text of each part.

    Of a mixture's parts each may give its share of the rows, so that a long part does not outweigh the others.
    """
    total_weight = sum(part.weight for part in tokens.parts)
    pieces = []
    for part in tokens.parts:
        length = min(part.tokens, MAX_TOKENS * part.weight // total_weight)
        first = part.first + (part.tokens - length) // 2
        tokens.check_ids(first, first + length, vocab_size)
        is_target = tokens.mask(first, first + length).astype(bool)
        pieces.append((tokens[first : first + length].astype(np.uint64), is_target))
    if not any(is_target.any() for _, is_target in pieces):
        raise InputError("ngram_targets: the loss mask leaves no token to count; leave it out")
    return pieces


def _to_integers(ids: np.ndarray, length: int, base: np.uint64) -> np.ndarray:
    """Each run of `length` ids (uint64) as the integer whose digits they are."""
    num_runs = max(len(ids) - length + 1, 0)
    integers = np.zeros(num_runs, dtype=np.uint64)
    for first in range(length):
        integers = integers * base + ids[first : first + num_runs]
    return integers


def _most_probable(ids: np.ndarray, probs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The NUM_CANDIDATES most probable of each row."""
    import torch

    top_probs, at = torch.from_numpy(probs).topk(NUM_CANDIDATES)
    return np.take_along_axis(ids, at.numpy(), 1), top_probs.numpy()
