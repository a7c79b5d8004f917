"""Draw the next token: temperature, top-k, top-p, min-p."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from nanogpt.errors import InputError
from nanogpt.hashing import hashed_uniform


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. The filters work in the order in which they stand here, each on what the last one left.

    temperature: 1 is the unscaled probabilities, 0 (and below 1e-6) always the likeliest token. top_k: that many of the
    likeliest. top_p: the likeliest that together have this probability (Holtzman et al. 2019). min_p: those at least
    this share as likely as the likeliest (Nguyen et al. 2024). vocab_size: ids from there on are never drawn (a
    tokenizer may know fewer than the model).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 1337
    vocab_size: int | None = None


PLAIN = Sampling()  # from the model's own filtered_probs


def filtered_probs(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """What may be drawn from logits (B, V): in shares (B, K), which need not sum to 1, and the ids (B, K) that have
    them, each row's in order; None: all of them, K = V. temperature must be above 0."""
    logits, ids = logits.float() / sampling.temperature, None
    most = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    if most < logits.shape[-1] or sampling.top_p < 1:
        logits, ids = logits.topk(most)  # the likeliest first
    shares = logits.softmax(-1)
    if sampling.top_p < 1:
        shares = shares * (shares.cumsum(-1) - shares < sampling.top_p)  # unless those before it are enough
    if sampling.min_p > 0:
        shares = shares * (shares >= sampling.min_p * shares.amax(-1, keepdim=True))
    if ids is not None:  # back in order: which of two is a hair likelier must not decide what is drawn
        kept = int((shares > 0).sum(-1).max())
        ids, order = ids[:, :kept].sort(-1)
        shares = shares[:, :kept].gather(-1, order)
    return shares, ids


def sample_tokens(logits: Tensor, sampling: Sampling, places: Sequence[tuple[int, int]]) -> Tensor:
    """One id (B,) for each row of logits (B, V).

    places: for each row the number of its sample and the position of the id in its text. They and the seed alone
    decide the noise, so that a sample is the same in any batch. Raises InputError for logits that are no numbers.
    """
    logits = logits[:, : sampling.vocab_size]
    if not logits.isfinite().all():
        raise InputError(
            "what the model gives is no number: its weights are broken, or too large for the number format; "
            "try --dtype=float32"
        )
    if sampling.temperature < 1e-6:  # which would overflow
        return logits.argmax(-1)
    shares, ids = filtered_probs(logits, sampling)
    shares = (shares.cpu() if shares.device.type == "mps" else shares).double()  # which MPS lacks
    below = shares.cumsum(-1)
    # Less than 1, and by so much that no rounding makes the product the sum itself, above which there is no id.
    noise = hashed_uniform(sampling.seed, *np.array(places, dtype=np.uint64).T).clip(max=1 - 1e-12)
    target = torch.from_numpy(noise).to(below.device)[:, None] * below[:, -1:]
    found = torch.searchsorted(below, target, right=True).to(logits.device)
    return (found if ids is None else ids.gather(-1, found))[:, 0]


class Token(NamedTuple):
    """A token that was drawn. logprob: the log of the probability (in nats) that the model itself gave it, whatever the
    temperature and the filters; None where it was not asked for. rivals: the likeliest ids with theirs, best first."""

    id: int
    logprob: float | None = None
    rivals: Sequence[tuple[int, float]] = ()


def to_tokens(ids: Tensor, logits: Tensor, rivals: int) -> list[Token]:
    """What was drawn, with so many rivals; -1: without the log-probability too."""
    if rivals < 0:
        return [Token(each) for each in ids.tolist()]
    logprobs = logits.float().log_softmax(-1)
    best = logprobs.topk(min(rivals, logprobs.shape[-1]))
    drawn = logprobs.gather(-1, ids[:, None])[:, 0].tolist()
    pairs = [list(zip(*row, strict=True)) for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
    return [Token(*fields) for fields in zip(ids.tolist(), drawn, pairs, strict=True)]


def window_start(length: int, block_size: int) -> int:
    """Where the window begins in which the id after `length` others is predicted.

    When the context is full, its last half is kept. (nanoGPT slides by one token, with which all that a cache keeps
    would be void at each step: every position changes.)
    """
    stride = block_size + 1 - max(1, block_size // 2)
    return stride * max(0, -(-(length - block_size) // stride))


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    if not model.training:  # to walk through all modules would take its time at each token
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()


@torch.inference_mode()
def generate(model: Any, idx: Tensor, max_new_tokens: int, sampling: Sampling = PLAIN) -> Iterator[Tensor]:
    """Continue the texts idx (B, T), T ≥ 1, yielding the next ids (B, 1) of all rows at a time: the plain way.

    Row i is sample i. Dropout is off while it runs; the model's mode is put back afterwards.
    """
    with eval_mode(model):
        for _ in range(max_new_tokens):
            length = idx.shape[1]
            logits, _ = model(idx[:, window_start(length, model.config.block_size) :])
            new = sample_tokens(logits[:, -1], sampling, [(row, length) for row in range(len(idx))])[:, None]
            idx = torch.cat([idx, new], dim=1)
            yield new
