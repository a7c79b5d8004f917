"""The CPU kernels compute model.py's own functions, forward and backward."""

import math
from typing import Any

import pytest
import torch

from model import GPT, GPTConfig
from nanogpt.cpu_kernels import MAX_PLAIN_ATTENTION, plain_attention, use_cpu_kernels

SIZES: dict[str, Any] = {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 70, "block_size": 160}
MODERN = SIZES | {"arch": "modern", "bias": False}


@pytest.mark.parametrize("T", [33, MAX_PLAIN_ATTENTION, MAX_PLAIN_ATTENTION + 1])
@pytest.mark.parametrize(
    "sizes", [SIZES, MODERN, MODERN | {"n_kv_head": 2, "head_dim": 6}, MODERN | {"n_kv_head": 1, "norm_eps": 0.1}]
)
def test_model_with_cpu_kernels_equals_the_plain_model(sizes: dict[str, Any], T: int):
    torch.manual_seed(0)
    plain = GPT(GPTConfig(**sizes))
    with torch.no_grad():
        for p in plain.parameters():  # away from gains of one, and large enough for each part to matter
            p.add_(torch.randn_like(p), alpha=0.2)
    fast = GPT.from_tensors(plain.config, {name: p.detach().clone() for name, p in plain.named_parameters()})
    fast.requires_grad_()
    use_cpu_kernels(fast)
    assert fast.state_dict().keys() == plain.state_dict().keys()
    idx = torch.randint(70, (3, T))
    results = []
    for model in (plain, fast):
        logits, loss = model(idx, idx.roll(-1, 1))
        loss.backward()
        results.append([logits, loss, *(p.grad for p in model.parameters())])
    for expected, actual in zip(*results, strict=True):
        assert (actual - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_attention_dropout_drops_probabilities_and_keeps_their_mean():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 4000, 8, 4)
    q, k, v = (t[:, :1].expand(-1, 4000, -1, -1) for t in (q, k, v))  # one row, 4,000 times
    dropped = plain_attention(q, k, v, 0.3)
    exact = plain_attention(q, k, v, 0.0)
    assert (dropped.mean(0) - exact[0]).abs().max() < 0.1
    # The first position sees itself alone: its value is dropped, or divided by 1 - 0.3.
    assert (dropped[:, 0] == 0).all(-1).float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert math.isclose(dropped[:, 0].abs().max(), exact[0, 0].abs().max() / 0.7, rel_tol=1e-5)
