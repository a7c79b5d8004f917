"""UpdateGuard skips bad updates and spikes; LayerStats counts clipped ones (test_v0_1.py has its norms)."""

import json
import math

import numpy as np
import pytest
import torch

from model import GPT, GPTConfig
from nanogpt.guard import UpdateGuard
from nanogpt.layer_stats import LayerStats

CPU = torch.device("cpu")
NAN = math.nan
INF = math.inf


@pytest.mark.parametrize(
    ("max_bad_steps", "losses", "skips"),
    [
        (1, [1.0, NAN, 1.0, 1.0], [0, 1, 1, 1]),
        (3, [1.0, NAN, NAN, 1.0, NAN, 1.0], [0, 1, 1, 0, 1, 0]),
        (3, [1.0, NAN, INF, -INF, 1.0, 1.0], [0, 1, 1, 1, 1, 1]),
    ],
)
@pytest.mark.parametrize("where", ["loss", "norm"])
def test_too_many_bad_steps_skip_all_later_ones(max_bad_steps: int, losses: list[float], skips: list[int], where: str):
    guard = UpdateGuard(CPU, max_bad_steps)
    bad_steps = 0
    for value, skip in zip(losses, skips, strict=True):
        loss, norm = (value, 1.0) if where == "loss" else (1.0, value)
        assert guard.check(torch.tensor(loss), torch.tensor(norm)).item() == skip
        bad_steps = bad_steps + 1 if skip else 0
        assert guard.bad_steps.item() == bad_steps


def test_spikes_follow_their_definition_across_a_resume():
    """The definition in numpy: medians of the last 100 norms, spikes included."""
    norms = np.random.default_rng(0).lognormal(size=300).astype(np.float32)
    norms[[10, 40, 41, 180]] *= 100
    norms[200:] *= 30  # permanently: after a while these are no spikes any more
    guard = UpdateGuard(CPU, 1, spike_threshold=5.0)
    skipped = 0
    for n, norm in enumerate(norms):
        if n in (15, 130):
            state = json.loads(json.dumps(guard.state_dict()))
            guard = UpdateGuard(CPU, 1, spike_threshold=5.0)
            guard.load_state_dict(state)
        past = norms[max(0, n - 100) : n]
        is_spike = False
        if len(past) >= 20:
            median = np.sort(past)[(len(past) - 1) // 2]
            deviation = 1.4826 * np.sort(abs(past - median))[(len(past) - 1) // 2]
            is_spike = norm > median + 5 * deviation
        skipped += is_spike
        assert guard.check(torch.ones(()), torch.tensor(norm)).item() == is_spike
        assert guard.skipped.item() == skipped
    assert 20 < skipped < 80
    assert guard.check(torch.ones(()), torch.tensor(INF)).item() == 1
    assert guard.skipped.item() == skipped  # a bad update is no spike


def test_layer_stats_count_no_clipping_without_a_limit_or_a_finite_norm():
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=9, block_size=4))
    parameters = dict(model.named_parameters())
    assert [*LayerStats(parameters, 0.5).layers] == ["tokens", "positions", "blocks.0", "blocks.1", "norm"]
    for grad_clip, norm, expected in ((0.0, 9.0, 0.0), (0.5, 0.4, 0.0), (0.5, 0.6, 1.0), (0.5, INF, 0.0)):
        stats = LayerStats(parameters, grad_clip)
        stats.before_update(torch.tensor(norm))
        assert [value.item() for value in stats.after_update()] == [expected]
