"""AdamW and Muon against torch's own, schedules against values by hand, the guard to the bit."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from model import GPT, GPTConfig
from nanogpt.distributed import World
from nanogpt.errors import InputError
from nanogpt.guard import UpdateGuard
from nanogpt.optim import Optimizer, clip_divisor, gradient_norm, orthogonalize
from nanogpt.schedule import learning_rate
from train import TrainConfig

CPU = torch.device("cpu")
ONE, ZERO = torch.ones(()), torch.zeros(())
KEYS: dict[str, Any] = {"learning_rate": 1e-2, "beta1": 0.8, "beta2": 0.97, "weight_decay": 0.3}
KEYS |= {"muon_lr": 2e-2, "muon_momentum": 0.8}


class Small(nn.Module):
    """An embedding, a matrix that holds three maps, as queries, keys and values are held, a tall one and a wide one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(5, 16)
        self.three, self.tall, self.wide = nn.Linear(16, 32), nn.Linear(16, 40), nn.Linear(40, 16)
        self.norm = nn.LayerNorm(16)

    def muon_params(self) -> dict[str, list[int]]:
        return {"three.weight": [16, 8, 8], "tall.weight": [40], "wide.weight": [16]}


def optimizer_of(model: nn.Module, kind: str = "adamw", dtype: torch.dtype = torch.float32) -> Optimizer:
    return Optimizer(model, TrainConfig(**KEYS, optimizer=kind), World(0, 1, CPU, dtype))  # type: ignore[arg-type]


def set_gradients(model: nn.Module, seed: int) -> dict[str, np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    return {name: p.grad.numpy().copy() for name, p in model.named_parameters()}  # type: ignore[union-attr]


def test_adamw_is_the_one_of_the_paper():
    model = Small()
    optimizer = optimizer_of(model)
    weights = {name: p.detach().double().numpy().copy() for name, p in model.named_parameters()}
    m, v = ({name: np.zeros_like(w) for name, w in weights.items()} for _ in range(2))
    for t in range(1, 8):
        rate, shrink = 1e-2 / t, 1 + t / 4
        for name, g in set_gradients(model, seed=t).items():
            g = g.astype(np.float64) / shrink
            m[name] = 0.8 * m[name] + 0.2 * g
            v[name] = 0.97 * v[name] + 0.03 * g * g
            direction = (m[name] / (1 - 0.8**t)) / (np.sqrt(v[name] / (1 - 0.97**t)) + 1e-8)
            if g.ndim == 2:  # gains and biases do not decay
                weights[name] = weights[name] * (1 - rate * 0.3)
            weights[name] = weights[name] - rate * direction
        optimizer.step(1 / t, torch.tensor(shrink), ZERO)
        for name, p in model.named_parameters():
            np.testing.assert_allclose(p.detach().numpy(), weights[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_is_torchs_on_each_map(dtype: torch.dtype):
    """A parameter that holds three maps is updated as three parameters are by torch.optim.Muon, whose products are in
    bfloat16: two such ways differ by a percent of an update, another function by more than half of it."""
    model = Small()
    optimizer, rows = optimizer_of(model, "muon", dtype), model.muon_params()
    others = [p for name, p in model.named_parameters() if name not in rows]
    twin = [p.detach().clone() for p in others]

    def parts(what: str) -> list[torch.Tensor]:
        named = dict(model.named_parameters())
        return [part.detach() for name in rows for part in getattr(named[name], what).split(rows[name])]

    theirs = [nn.Parameter(part.clone()) for part in parts("data")]
    oracle = torch.optim.Muon(theirs, lr=2e-2, momentum=0.8, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    for seed in range(4):
        set_gradients(model, seed)
        before = [t.detach().clone() for t in theirs]
        for t, gradient in zip(theirs, parts("grad"), strict=True):
            t.grad = gradient / 2
        oracle.step()
        optimizer.step(1.0, torch.tensor(2.0), ZERO)
        for part, t, b in zip(parts("data"), theirs, before, strict=True):
            assert (part - t.detach()).norm() < 0.03 * (t.detach() - b).norm()
            part.copy_(t.detach())  # so that differences do not add up
    # What is no matrix of a block has been AdamW's.
    for p, before_all in zip(others, twin, strict=True):
        assert not torch.equal(p, before_all)
    assert {key for name in rows for key in optimizer.state[name]} == {"momentum"}


def test_orthogonalize_is_near_the_polar_factor():
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(3, 6, 10), full_matrices=False)
    matrices = u @ torch.diag_embed(torch.linspace(1, 0.1, 6).expand(3, 6)) @ v
    out = orthogonalize(matrices, torch.float32)
    singular = torch.linalg.svdvals(out)
    assert singular.min() > 0.6
    assert singular.max() < 1.3
    inner = u.mT @ out @ v.mT  # of U S' Vᵀ that is S', without any rest beside its diagonal
    assert (inner - torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-4


def test_what_trains_which_parameters_of_a_gpt():
    sizes = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32, "vocab_size": 9, "block_size": 4}
    model = GPT(GPTConfig(arch="modern", bias=False, **sizes))  # type: ignore[arg-type]
    state = optimizer_of(model, "muon").state
    parts = ("attention.qkv", "attention.out", "mlp.gate", "mlp.up", "mlp.down")
    hidden = {f"blocks.{i}.{part}.weight" for i in range(2) for part in parts}
    assert {name for name in state if "momentum" in state[name]} == hidden
    assert {name for name in state if "exp_avg" in state[name]} == {n for n, _ in model.named_parameters()} - hidden
    assert model.muon_params()["blocks.1.attention.qkv.weight"] == [32, 16, 16]


def test_schedules_by_hand():
    def rate(step: int, name: str = "cosine") -> float:
        return learning_rate(name, step, max_lr=1.0, min_lr=0.1, warmup=10, end=110)

    for name in ("cosine", "trapezoid", "constant"):
        assert [rate(k, name) for k in (0, 4, 9)] == pytest.approx([1 / 11, 5 / 11, 10 / 11])
        assert rate(10, name) == 1
    assert rate(35) == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)  # a quarter of the way
    assert rate(60) == pytest.approx(0.55)
    assert rate(110) == rate(10**6) == 0.1
    assert all(rate(k) > rate(k + 1) for k in range(10, 110))
    assert [rate(k, "trapezoid") for k in (50, 60, 85, 110, 500)] == pytest.approx([1, 1, 0.55, 0.1, 0.1])
    assert rate(500, "constant") == 1
    assert learning_rate("cosine", 3, max_lr=1.0, min_lr=0.1, warmup=0, end=0) == pytest.approx(
        0.1
    )  # nothing to divide by


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, {0: 6e-4 / 2001, 2000: 6e-4, 600_000: 6e-5}),
        ({"max_iters": 20, "warmup_iters": 10}, {15: 6e-5 + 5.4e-4 / 2, 20: 6e-5}),
        ({"max_iters": 20, "warmup_iters": 0, "lr_decay_iters": 40, "min_lr": 0.0}, {20: 3e-4, 39: 924.8e-9, 40: 0.0}),
        ({"max_iters": 20, "warmup_iters": 0, "schedule": "trapezoid", "min_lr": 0.0}, {10: 6e-4, 15: 3e-4}),
        (
            {"max_iters": 20, "warmup_iters": 2, "schedule": "trapezoid", "decay_iters": 4, "min_lr": 0.0},
            {0: 2e-4, 16: 6e-4, 17: 4.5e-4, 19: 1.5e-4, 20: 0.0},
        ),
        ({"max_iters": 20, "warmup_iters": 0, "schedule": "constant"}, {19: 6e-4, 20: 6e-4}),
        ({"decay_lr": False}, {0: 6e-4, 1000: 6e-4, 10**7: 6e-4}),
    ],
)
def test_learning_rate_of_a_run(keys: dict[str, Any], expected: dict[int, float]):
    config = TrainConfig(**keys)
    assert [config.learning_rate_at(k) for k in expected] == pytest.approx(list(expected.values()), rel=1e-4)


@pytest.mark.parametrize(("limit", "norm", "shrink"), [(0.0, 9.0, 1.0), (1e9, 9.0, 1.0), (0.5, 9.0, 18.0)])
def test_clipping(limit: float, norm: float, shrink: float):
    assert clip_divisor(limit, torch.tensor(norm)).item() == shrink


def test_gradient_norm():
    model = Small()
    by_hand = math.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in set_gradients(model, 0).values()))
    assert gradient_norm(model.parameters()).item() == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize(("ranks", "maps"), [(2, 3), (4, 3)])  # of one shape, 16 × 16 and wider, among them
def test_muon_is_shared_out_over_the_ranks(ranks: int, maps: int, monkeypatch: pytest.MonkeyPatch):
    """Each rank does its share alone, and what is put together is the whole; without processes, a rank at a time."""
    whole, shares = torch.randn(maps, 4, 6), []
    expected = orthogonalize(whole, torch.float32)
    for rank in range(ranks):
        optimizer = optimizer_of(Small(), "muon")
        optimizer.world = World(rank, ranks, CPU, torch.float32)
        monkeypatch.setattr(World, "all_gather", lambda self, mine: shares.append(mine) or mine.repeat(ranks, 1, 1))
        assert len(optimizer._orthogonalize(whole)) == maps
    assert {len(share) for share in shares} == {-(-maps // ranks)}
    torch.testing.assert_close(torch.cat(shares)[:maps], expected)


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
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_guard_voids_updates_to_the_bit(
    patience: int, losses: list[float], updates: list[int], where: str, scaled: bool, kind: str
):
    """As train.py's loop does it, with and without float16's scaler."""
    model = Small()
    optimizer, guard = optimizer_of(model, kind), UpdateGuard(CPU, patience)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=4.0)
    in_a_row = 0
    for number, (loss, is_update) in enumerate(zip(losses, updates, strict=True)):
        set_gradients(model, seed=number)
        if where == "gradient":
            for parameter in (model.three.weight, model.embedding.weight):
                parameter.grad[0, 1] *= loss  # type: ignore[index]
        scaler.scale(torch.ones(()))
        before = [t.clone() for t in (*model.parameters(), *optimizer.state_tensors().values())]
        scaler.unscale_(optimizer)  # type: ignore[arg-type]
        norm = gradient_norm(model.parameters())
        skip = guard.check(torch.tensor(loss if where == "loss" else 1.0), norm)
        optimizer.step(1.0, clip_divisor(1.0, norm), skip)
        scaler.update()
        after = [*model.parameters(), *optimizer.state_tensors().values()]
        assert [torch.equal(b, a) for b, a in zip(before, after, strict=True)] == [not is_update] * len(after)
        in_a_row = 0 if is_update else in_a_row + 1
        assert guard.bad_in_a_row.item() == in_a_row


def test_spikes_by_their_definition():
    """numpy's medians of the last hundred norms, spikes among them; a guard that takes over goes on alike."""
    norms = np.random.default_rng(0).lognormal(size=300).astype(np.float32)
    norms[[10, 40, 41, 180]] *= 100
    norms[200:] *= 30  # for good: after a while these are no spikes any more
    guard, skipped = UpdateGuard(CPU, 1, spike_threshold=5.0), 0
    for n, norm in enumerate(norms):
        if n in (15, 130):
            state, guard = guard.state(), UpdateGuard(CPU, 1, spike_threshold=5.0)
            guard.load(json.loads(json.dumps(state)))
        past = norms[max(0, n - 100) : n]
        expected = False
        if len(past) >= 20:
            median = np.sort(past)[(len(past) - 1) // 2]
            deviation = 1.4826 * np.sort(abs(past - median))[(len(past) - 1) // 2]
            expected = norm > median + 5 * deviation
        skipped += expected
        assert guard.check(ONE, torch.tensor(norm)).item() == expected
        assert guard.skipped.item() == skipped
    assert 20 < skipped < 80


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_optimizer_state_goes_by_name(kind: str):
    model, twin = Small(), Small()
    ours, others = optimizer_of(model, kind), optimizer_of(twin, kind)
    set_gradients(model, 0)
    ours.step(1.0, ONE, ZERO)
    twin.load_state_dict(model.state_dict())
    others.load_state_tensors(dict(reversed(ours.state_tensors().items())))  # their order means nothing
    for one, optimizer in ((model, ours), (twin, others)):
        set_gradients(one, 1)
        optimizer.step(1.0, ONE, ZERO)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    with pytest.raises(InputError, match=r"resume with the --optimizer"):
        optimizer_of(twin, "muon" if kind == "adamw" else "adamw").load_state_tensors(ours.state_tensors())


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: {"7.weight/exp_avg": torch.zeros(1)},
        lambda tensors: {"tall.weight/exp_avg": tensors["tall.weight/exp_avg"].t()},
    ],
)
def test_state_of_another_model_is_refused(change: Any):
    model = Small()
    tensors = optimizer_of(model).state_tensors()
    with pytest.raises(InputError, match=f"{next(iter(change(tensors)))} does not fit"):
        optimizer_of(model).load_state_tensors(tensors | change(tensors))


class OnMps(torch.Tensor):
    """A CPU tensor that says it lies on MPS."""

    device = property(lambda self: torch.device("mps"))  # type: ignore[assignment]


def test_where_fused_adamw_heeds_nothing_the_same_is_done_before_it():
    model, twin = Small(), Small()
    optimizer, plain = optimizer_of(model), optimizer_of(twin)
    for skip in (0.0, 1.0, 0.0):
        for one in (model, twin):
            set_gradients(one, 1)
        plain.step(1.0, torch.tensor(3.0), torch.tensor(skip))
        optimizer.step(1.0, torch.tensor(3.0), torch.tensor(skip).as_subclass(OnMps))
        for p, expected in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-7)
