"""look_back: where the first layer's attention begins."""

import math

import pytest
import torch

from load import build_model
from model import GPTConfig
from nanogpt.distributed import World
from nanogpt.look_back import look_back


def test_look_back_begins_heads_on_the_tokens_before():
    torch.manual_seed(0)
    sizes = GPTConfig(n_layer=1, n_head=8, n_kv_head=2, n_embd=128, vocab_size=65, bias=False, arch="modern")
    model = build_model(sizes, None, World(0, 1, torch.device("cpu"), torch.float32), adjust=look_back)
    farthest = []  # (rows, heads, positions): the position with the highest score

    def record(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = q @ k.repeat_interleave(4, dim=1).mT  # four heads share a key head
        future = torch.ones(40, 40).triu(1).bool()
        farthest.append(scores.masked_fill(future, -torch.inf).argmax(-1))
        return q

    model.hidden_states(torch.randint(65, (2, 40)), attention=[record])
    expected = torch.stack([(torch.arange(40) - (head + 1) % 4).clamp(min=0) for head in range(8)])
    assert (farthest[0] == expected).float().mean() > 0.95
    common = model.token_embedding.weight[:65].mean(0).norm().item()
    assert common == pytest.approx(0.01 * math.sqrt(128), rel=0.2)
