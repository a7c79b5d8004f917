"""Evaluation: the loss on fixed windows, and log-probabilities of given tokens."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt.data.rows import EvalWindows
from nanogpt.distributed import World
from nanogpt.errors import InputError
from nanogpt.generate.sampling import eval_mode, window_start


@torch.inference_mode()
def evaluate(model: nn.Module, windows: EvalWindows, batch_size: int, world: World) -> float:
    """Mean loss in nats over the tokens of `windows` that count; the ranks take its batches in turn and share the sum.
    Raises InputError where none counts."""
    model.eval()
    loss_sum, counted = torch.zeros(1, device=world.device), 0
    for first in range(world.rank * batch_size, len(windows), world.size * batch_size):
        x, y = windows[first : first + batch_size]
        count, missing = int((y >= 0).sum()), batch_size - len(x)
        # The last batch is filled up with rows that do not count: a compiled model wants one shape.
        x, y = world.to_device(F.pad(x, (0, 0, 0, missing)), F.pad(y, (0, 0, 0, missing), value=-1))
        with world.autocast():
            loss = model(x, y)[1]
        loss_sum += loss.float() * count
        counted += count
    model.train()
    total, number = world.all_reduce_sum(
        torch.cat([loss_sum, *world.to_device(torch.tensor([float(counted)]))])
    ).tolist()
    if not number:
        raise InputError("the loss mask leaves no token to evaluate on: give a larger --eval_iters or more data")
    return total / number


@torch.inference_mode()
def score(model: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """How sure the model is of the ids y (B, T) that follow each of x (B, T), −1 where nobody asks: for those asked
    for, row by row, the log-probabilities in nats, (asked,), and whether each is the likeliest id there, (asked,).
    Raises InputError for logits that are no numbers, as `sample_tokens` does."""
    with eval_mode(model):
        asked = y >= 0  # only for these are there logits, of which each is as large as the vocabulary
        logits, ids = model.logits(model.norm(model.hidden_states(x)[asked])).float(), y[asked]
        logprobs = logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
        if not logprobs.isfinite().all():  # a NaN anywhere in a row of logits is in its sum, too
            raise InputError(
                "what the model gives is no number: its weights are broken, or too large for the number format; "
                "try --dtype=float32"
            )
        return logprobs, logits.argmax(-1) == ids


def logprobs(model: Any, ids: Sequence[int]) -> Tensor:
    """The log-probability in nats of each id after the first, given those before it in its window; (len(ids) - 1,)."""
    block, device, found, at = model.config.block_size, next(model.parameters()).device, [], 1
    while at < len(ids):  # one window at a time: all ids that are predicted in it
        start = window_start(at, block)
        row = torch.tensor([ids[start : start + block + 1]], device=device)
        x, y = row[:, :-1], row[:, 1:].clone()
        y[:, : at - 1 - start] = -1
        found.append(score(model, x, y)[0])
        at += len(found[-1])
    return torch.cat(found) if found else torch.zeros(0, device=device)
