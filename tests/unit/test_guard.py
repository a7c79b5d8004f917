"""UpdateGuard skips bad updates to the bit and spikes by their definition; LayerStats measures layers."""

import json
import math

import numpy as np
import pytest
import torch

from model import GPT, GPTConfig
from nanogpt.distributed import World
from nanogpt.guard import LayerStats, UpdateGuard
from nanogpt.optim import Optimizer, clip_divisor, gradient_norm

CPU = torch.device("cpu")
NAN = math.nan
INF = math.inf


def make_training(kind: str) -> tuple[GPT, Optimizer]:
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=9, block_size=4))
    return model, Optimizer(model, World(0, 1, CPU, torch.float32), kind=kind, learning_rate=1e-2)


@pytest.mark.parametrize(
    ("max_bad_steps", "losses", "updates"),
    [
        (1, [1.0, NAN, 1.0, 1.0], [True, False, False, False]),
        (1, [1.0, INF, 1.0], [True, False, False]),
        (3, [1.0, NAN, NAN, 1.0, NAN, 1.0], [True, False, False, True, False, True]),
        (3, [1.0, NAN, INF, -INF, 1.0, 1.0], [True, False, False, False, False, False]),
    ],
)
@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_guard_makes_bad_updates_no_ops(
    max_bad_steps: int, losses: list[float], updates: list[bool], where: str, kind: str
):
    """In the order of train_step, with float16's loss scaler."""
    model, optimizer = make_training(kind)
    guard = UpdateGuard(CPU, max_bad_steps)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    bad_steps = 0
    for number, (loss, is_update) in enumerate(zip(losses, updates, strict=True)):
        generator = torch.Generator().manual_seed(number)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        if where == "gradient":
            model.token_embedding.weight.grad[0, 1] *= loss
        scaler.scale(torch.ones(()))
        before = [t.clone() for t in (*model.parameters(), *optimizer.state_tensors().values())]
        scaler.unscale_(optimizer)
        norm = gradient_norm(model.parameters())
        skip = guard.check(torch.tensor(loss if where == "loss" else 1.0), norm)
        optimizer.step(1.0, clip_divisor(1.0, norm), skip)
        scaler.update()
        after = [*model.parameters(), *optimizer.state_tensors().values()]
        is_equal = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert is_equal == [not is_update] * len(after)
        bad_steps = 0 if is_update else bad_steps + 1
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


def test_layer_stats_measure_gradients_and_updates():
    model, optimizer = make_training("adamw")
    stats = LayerStats(model, grad_clip=0.5)
    assert list(stats.layers) == ["tokens", "positions", "blocks.0", "blocks.1", "norm"]
    idx = torch.arange(4)[None]
    for is_due in (False, True):
        stats.is_due = is_due
        model(idx, idx)[1].backward()
        norm = gradient_norm(model.parameters())
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        stats.before_update(norm)
        optimizer.step(1.0, clip_divisor(0.5, norm), torch.zeros(()))
        optimizer.zero_grad()
        is_clipped, *norms = [value.item() for value in stats.after_update()]
        assert is_clipped == 1.0
    assert math.hypot(*norms[:5]) == pytest.approx(norm.item(), rel=1e-5)
    for layer, update_norm in zip(("token_embedding", "blocks.1"), (norms[5], norms[8]), strict=True):
        moved = [(p.detach() - before[name]).norm() for name, p in model.named_parameters() if name.startswith(layer)]
        assert update_norm == pytest.approx(math.hypot(*moved), rel=1e-4)


def test_layer_stats_count_no_clipping_without_a_limit_or_a_finite_norm():
    model, _ = make_training("adamw")
    for grad_clip, norm, expected in ((0.0, 9.0, 0.0), (0.5, 0.4, 0.0), (0.5, 0.6, 1.0), (0.5, INF, 0.0)):
        stats = LayerStats(model, grad_clip)
        stats.before_update(torch.tensor(norm))
        assert [value.item() for value in stats.after_update()] == [expected]
