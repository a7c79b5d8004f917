"""What a model is asked once it stands: its loss on fixed windows, and text."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt.data import EvalWindows
from nanogpt.distributed import World
from nanogpt.tokenizer import Tokenizer


@torch.no_grad()
def evaluate(model: nn.Module, windows: EvalWindows, batch_size: int, world: World) -> float:
    """Mean loss in nats over `windows`; the ranks take its batches in turn and share the sum."""
    model.eval()
    total = torch.zeros(2, device=world.device)  # loss summed over windows, windows
    for first in range(world.rank * batch_size, len(windows), world.size * batch_size):
        x, y = windows[first : first + batch_size]
        count, missing = len(x), batch_size - len(x)
        # The last batch is filled up with rows that do not count: a compiled model wants one shape.
        x, y = world.put(F.pad(x, (0, 0, 0, missing)), F.pad(y, (0, 0, 0, missing), value=-1))
        with world.autocast():
            loss = model(x, y)[1]
        total += torch.stack([loss.float() * count, torch.full_like(total[0], count)])
    model.train()
    loss_sum, count = world.sum(total).tolist()
    return loss_sum / count


def next_token(
    logits: Tensor, temperature: float, top_k: int | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Draw one id for each row from logits (B, V); returns (B, 1).

    temperature 0 takes the most likely id. top_k leaves only the k most likely ones to draw from.
    """
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < least, -torch.inf)
    probabilities = (logits.float() / temperature).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator)


@torch.no_grad()
def generate(
    model: Any,
    idx: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    vocab_size: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Continue the prompts idx (B, T), T ≥ 1, yielding the next ids (B, 1) of all rows at a time. model: a GPT, or that
    compiled.

    The plain way: every token reads the whole context anew, at most the last block_size tokens of it.
    vocab_size: ids from there on are never drawn (a tokenizer may know fewer than the model).
    Dropout is off while it runs; the model's mode is put back afterwards.
    """
    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            logits, _ = model(idx[:, -model.config.block_size :])
            new = next_token(logits[:, -1, :vocab_size], temperature, top_k, generator)
            idx = torch.cat([idx, new], dim=1)
            yield new
    finally:
        model.train(was_training)


def sample_text(model: nn.Module, tokenizer: Tokenizer, characters: int, seed: int) -> str:
    """About `characters` characters that `model` writes of its own accord, the same for the same weights and seed."""
    device = next(model.parameters()).device
    start = tokenizer.end_of_text
    if start is None:  # a character tokenizer: the first of its sorted characters is a newline in most texts
        start = 0
    prompt = torch.tensor([[start]], device=device)
    generator = torch.Generator(device).manual_seed(seed)
    ids: list[int] = []
    for new in generate(model, prompt, characters, vocab_size=tokenizer.vocab_size, generator=generator):
        ids.append(int(new))
        if len(ids) * 2 >= characters and len(tokenizer.decode(ids)) >= characters:
            break
    return tokenizer.decode(ids)[:characters]
