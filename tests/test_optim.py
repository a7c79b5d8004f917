"""The optimizer against AdamW written out in numpy, the schedule against values by hand, the guard to the bit."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from model import GPT, GPTConfig
from nanogpt import InputError
from nanogpt.optim import Guard, adamw, clip, cosine, load_state_tensors, state_tensors
from train import TrainConfig

BETAS, DECAY = (0.8, 0.97), 0.3


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.LayerNorm(3)).double()


def set_gradients(model: nn.Module, seed: int) -> dict[str, np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return {name: p.grad.numpy().copy() for name, p in model.named_parameters()}  # type: ignore[union-attr]


def test_adamw_is_the_one_of_the_paper():
    model = small_model()
    optimizer = adamw(model, 1e-2, BETAS, DECAY)
    weights = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    m, v = ({name: np.zeros_like(w) for name, w in weights.items()} for _ in range(2))
    for t in range(1, 8):
        rate = 1e-2 / t
        for group in optimizer.param_groups:
            group["lr"] = rate
        for name, g in set_gradients(model, seed=t).items():
            m[name] = BETAS[0] * m[name] + (1 - BETAS[0]) * g
            v[name] = BETAS[1] * v[name] + (1 - BETAS[1]) * g * g
            direction = (m[name] / (1 - BETAS[0] ** t)) / (np.sqrt(v[name] / (1 - BETAS[1] ** t)) + 1e-8)
            if g.ndim == 2:  # gains and biases do not decay
                weights[name] = weights[name] * (1 - rate * DECAY)
            weights[name] = weights[name] - rate * direction
        optimizer.step()
        for name, p in model.named_parameters():
            np.testing.assert_allclose(p.detach().numpy(), weights[name], rtol=1e-12, atol=1e-14, err_msg=name)


def test_what_decays_in_a_gpt():
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=9, block_size=4))
    names = {p: name for name, p in model.named_parameters()}
    decay, rest = ([names[p] for p in group["params"]] for group in adamw(model, 1e-2, BETAS, DECAY).param_groups)
    matrices = ("attention.qkv", "attention.out", "mlp.up", "mlp.down")
    assert decay == ["tokens.weight", "positions.weight", *(f"blocks.0.{name}.weight" for name in matrices)]
    assert len(rest) == len(names) - 6
    assert all(name.endswith("bias") or "norm" in name for name in rest)


def test_schedule_by_hand():
    def rate(step: int) -> float:
        return cosine(step, peak=1.0, floor=0.1, warmup=10, end=110)

    assert [rate(k) for k in (0, 4, 9)] == pytest.approx([1 / 11, 5 / 11, 10 / 11])
    assert rate(10) == 1
    assert rate(35) == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)  # a quarter of the way
    assert rate(60) == pytest.approx(0.55)
    assert rate(110) == rate(10**6) == 0.1
    assert all(rate(k) > rate(k + 1) for k in range(10, 110))
    assert cosine(3, peak=1.0, floor=0.1, warmup=0, end=0) == 0.1  # nothing to divide by


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, {0: 6e-4 / 2001, 2000: 6e-4, 600_000: 6e-5}),
        ({"max_iters": 20, "warmup_iters": 10}, {15: 6e-5 + 5.4e-4 / 2, 20: 6e-5}),
        ({"max_iters": 20, "warmup_iters": 0, "lr_decay_iters": 40, "min_lr": 0.0}, {20: 3e-4, 39: 924.8e-9, 40: 0.0}),
        ({"decay_lr": False}, {0: 6e-4, 1000: 6e-4, 10**7: 6e-4}),
    ],
)
def test_learning_rate_of_a_run(keys: dict[str, Any], expected: dict[int, float]):
    config = TrainConfig(**keys)
    assert [config.learning_rate_at(k) for k in expected] == pytest.approx(list(expected.values()), rel=1e-4)


@pytest.mark.parametrize(("limit", "factor"), [(0.0, 1.0), (1e9, 1.0), (0.5, None)])
def test_clip(limit: float, factor: float | None):
    model = small_model()
    before = set_gradients(model, 0)
    by_hand = math.sqrt(sum((g**2).sum() for g in before.values()))
    assert clip(model.parameters(), limit).item() == pytest.approx(by_hand, rel=1e-12)
    factor = limit / by_hand if factor is None else factor
    for name, p in model.named_parameters():
        np.testing.assert_allclose(p.grad.numpy(), before[name] * factor, rtol=1e-5)  # type: ignore[union-attr]


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("patience", "losses", "updates"),  # an update is expected where the last row has a 1
    [
        (1, [1.0, NAN, 1.0, 1.0], [1, 0, 0, 0]),
        (1, [1.0, INF, 1.0], [1, 0, 0]),
        (3, [1.0, NAN, NAN, 1.0, NAN, 1.0], [1, 0, 0, 1, 0, 1]),
        (3, [1.0, NAN, INF, -INF, 1.0, 1.0], [1, 0, 0, 0, 0, 0]),
    ],
)
@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("scaled", [False, True])
def test_guard_voids_updates_to_the_bit(
    patience: int, losses: list[float], updates: list[int], where: str, scaled: bool
):
    """As train.py's loop does it, with and without float16's scaler."""
    model = small_model()
    optimizer, guard = adamw(model, 1e-2, BETAS, DECAY), Guard(torch.device("cpu"), patience)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=4.0)
    in_a_row = 0
    for number, (loss, is_update) in enumerate(zip(losses, updates, strict=True)):
        set_gradients(model, seed=number)
        if where == "gradient":
            model[1].weight.grad[0, 1] *= loss
        scaler.scale(torch.ones(()))
        before = [t.clone() for t in (*model.parameters(), *state_tensors(optimizer, model).values())]
        scaler.unscale_(optimizer)
        norm = clip(model.parameters(), 1.0)
        guard.check(optimizer, torch.tensor(loss if where == "loss" else 1.0), norm)
        optimizer.step()
        scaler.update()
        after = [*model.parameters(), *state_tensors(optimizer, model).values()]
        # A voided first step creates the optimizer's state, but here the first update is always a good one.
        assert number == 0 or all(map(torch.equal, before, after)) != bool(is_update)
        in_a_row = 0 if is_update else in_a_row + 1
        assert guard.bad_in_a_row.item() == in_a_row


def rename(model: nn.Module, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    optimizer = adamw(model, 1e-2, BETAS, DECAY)
    set_gradients(model, 0)
    optimizer.step()
    tensors = state_tensors(optimizer, model)
    change(tensors)
    load_state_tensors(adamw(model, 1e-2, BETAS, DECAY), model, tensors)


def test_optimizer_state_goes_by_name():
    model, twin = small_model(), small_model()
    optimizer, other = adamw(model, 1e-2, BETAS, DECAY), adamw(twin, 1e-2, BETAS, DECAY)
    set_gradients(model, 0)
    optimizer.step()
    other.param_groups.reverse()  # the order of groups and parameters means nothing
    twin.load_state_dict(model.state_dict())
    load_state_tensors(other, twin, state_tensors(optimizer, model))
    set_gradients(model, 1)
    set_gradients(twin, 1)
    optimizer.step()
    other.step()
    assert all(map(torch.equal, model.parameters(), twin.parameters()))

    def another_name(tensors: dict[str, torch.Tensor]) -> None:
        tensors["7.weight/exp_avg"] = tensors.pop("1.weight/exp_avg")

    def another_shape(tensors: dict[str, torch.Tensor]) -> None:
        tensors["1.weight/exp_avg"] = tensors["1.weight/exp_avg"].t()

    with pytest.raises(InputError, match=r"7.weight/exp_avg does not fit this model"):
        rename(model, another_name)
    with pytest.raises(InputError, match=r"1.weight/exp_avg does not fit this model"):
        rename(model, another_shape)


class OnMps(torch.Tensor):
    """A CPU tensor that says it lies on MPS."""

    device = property(lambda self: torch.device("mps"))  # type: ignore[assignment]


def test_guard_takes_the_gradients_away_where_found_inf_is_not_heeded():
    model = nn.Linear(2, 2)
    optimizer, guard = adamw(model, 1e-2, BETAS, DECAY), Guard(torch.device("cpu"), 1)
    before = [p.detach().clone() for p in model.parameters()]
    for loss in (float("nan"), 1.0):  # and the next one too: it is sticky
        model(torch.ones(1, 2)).sum().backward()
        guard.check(optimizer, torch.tensor(loss).as_subclass(OnMps), torch.tensor(1.0))
        optimizer.step()
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert not hasattr(optimizer, "found_inf")
