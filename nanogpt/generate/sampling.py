"""Sample the next token: temperature, top-k, top-p, min-p."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanogpt.errors import InputError
from nanogpt.hashing import hashed_uniform


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters. The filters apply in this order, each to the tokens that the one before it kept.

    temperature: divides the logits; below 1e-6 sampling is greedy.
    top_k: keep this many of the most probable tokens; None keeps all.
    top_p: keep the most probable tokens that together have this probability (Holtzman et al. 2019).
    min_p: drop tokens less probable than min_p times the most probable one (Nguyen et al. 2024).
    vocab_size: never sample ids from here on; a tokenizer may have fewer ids than the model.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 1337
    vocab_size: int | None = None


def filtered_probs(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """Return the probabilities (B, K) that the filters leave of logits (B, V), and their ids (B, K).

    A row need not sum to 1. The ids ascend in each row; None stands for all of them, K = V.
    The temperature must be above 0.
    """
    logits = logits.float() / sampling.temperature
    V = logits.shape[-1]
    k = min(sampling.top_k or V, V)
    ids = None
    if k < V or sampling.top_p < 1:
        logits, ids = logits.topk(k)  # most probable first
    probs = logits.softmax(-1)

    if sampling.top_p < 1:
        before = probs.cumsum(-1) - probs
        probs = probs * (before < max(sampling.top_p, 1e-30))  # less is 0 in float32, and would keep none
    if sampling.min_p > 0:
        probs = probs * (probs >= sampling.min_p * probs.amax(-1, keepdim=True))

    if ids is not None:
        # Sort by id again: rounding may swap two equally probable tokens, which must not change the sample.
        num_left = int((probs > 0).sum(-1).max())
        ids, order = ids[:, :num_left].sort(-1)
        probs = probs[:, :num_left].gather(-1, order)
    return probs, ids


def sample_tokens(
    logits: Tensor, sampling: Sampling, sample_indices: Sequence[int], positions: Sequence[int]
) -> Tensor:
    """Sample one id for each row of logits (B, V). Returns (B,).

    The noise is a function of the seed, the index of the row's sample and the position of the new token in it, so a
    sample is the same in any batch. Raises InputError for logits that are not finite.
    """
    logits = logits[:, : sampling.vocab_size]
    check_finite(logits)
    if sampling.temperature < 1e-6:  # dividing by it would overflow
        return logits.argmax(-1)

    probs, ids = filtered_probs(logits, sampling)
    # MPS has no float64, and CUDA no deterministic cumulative sum.
    if probs.device.type == "mps" or torch.are_deterministic_algorithms_enabled():
        probs = probs.cpu()
    cumulative = probs.double().cumsum(-1)
    noise = hashed_uniform(
        sampling.seed, np.array(sample_indices, dtype=np.uint64), np.array(positions, dtype=np.uint64)
    )
    noise = noise.clip(max=1 - 1e-12)  # the threshold stays below the total, also after rounding
    threshold = torch.from_numpy(noise).to(cumulative.device)[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, threshold, right=True).to(logits.device)
    return (index if ids is None else ids.gather(-1, index))[:, 0]


def check_finite(values: Tensor) -> None:
    """Raise InputError for logits or log-probabilities that are NaN or infinite."""
    # One sum is cheap, and not finite if any value is not.
    if not values.sum(dtype=torch.float32).isfinite() and not values.isfinite().all():
        raise InputError(
            "the model produced NaN or inf logits: its weights are corrupt or overflow this dtype; try --dtype=float32"
        )


class Token(NamedTuple):
    """A sampled token.

    logprob: its log-probability in nats under the model alone, without temperature and filters; None if not wanted.
    top_logprobs: the most probable ids with theirs, best first.
    """

    id: int
    logprob: float | None = None
    top_logprobs: Sequence[tuple[int, float]] = ()


def to_tokens(ids: Tensor, logits: Tensor, top_logprobs: int | None) -> list[Token]:
    """Describe the sampled ids (B,), with log-probabilities unless top_logprobs is None."""
    if top_logprobs is None:
        return [Token(id) for id in ids.tolist()]
    logprobs = logits.float().log_softmax(-1)
    sampled = logprobs.gather(-1, ids[:, None])[:, 0]
    best = logprobs.topk(min(top_logprobs, logprobs.shape[-1]))
    tokens = []
    for id, logprob, best_ids, best_logprobs in zip(
        ids.tolist(), sampled.tolist(), best.indices.tolist(), best.values.tolist(), strict=True
    ):
        tokens.append(Token(id, logprob, list(zip(best_ids, best_logprobs, strict=True))))
    return tokens


def window_start(length: int, block_size: int) -> int:
    """Return where the context window begins that predicts the token after `length` others.

    When the context is full, its last half is kept. (nanoGPT slides by one token; that moves every position, so a
    KV cache would have to be filled again for each token.)
    """
    stride = block_size + 1 - max(1, block_size // 2)
    num_strides = -(-(length - block_size) // stride)
    return stride * max(0, num_strides)
