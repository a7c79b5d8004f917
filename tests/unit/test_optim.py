"""Optimizer: clipping, state by name, shares of the ranks; oracles/test_torch_training.py has its updates against torch's."""

import math
from typing import Any

import pytest
import torch

from model import GPT, GPTConfig
from nanogpt.distributed import World
from nanogpt.errors import InputError
from nanogpt.optim import Optimizer, clip_divisor, gradient_norm, orthogonalize

CPU = torch.device("cpu")
ONE = torch.ones(())
ZERO = torch.zeros(())


def make_model() -> GPT:
    torch.manual_seed(0)
    return GPT(
        GPTConfig(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, vocab_size=9, block_size=4, arch="modern", bias=False)
    )


def make_optimizer(model: GPT, kind: str = "adamw", world: World | None = None) -> Optimizer:
    return Optimizer(model, world or World(0, 1, CPU, torch.float32), kind=kind, learning_rate=1e-2)


def set_gradients(model: GPT, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def test_muon_trains_the_blocks_matrices_alone():
    model = make_model()
    state = make_optimizer(model, "muon").state
    assert {name for name in state if "momentum" in state[name]} == model.muon_params().keys()
    assert {name for name in state if "exp_avg" in state[name]} == state.keys() - model.muon_params().keys()
    assert state.keys() == dict(model.named_parameters()).keys()


def test_orthogonalize_is_near_the_polar_factor():
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(3, 6, 10), full_matrices=False)
    matrices = u @ torch.diag_embed(torch.linspace(1, 0.1, 6).expand(3, 6)) @ v
    out = orthogonalize(matrices, torch.float32)
    singular = torch.linalg.svdvals(out)
    assert singular.min() > 0.6
    assert singular.max() < 1.3
    inner = u.mT @ out @ v.mT  # diagonal if `out` has the singular vectors of `matrices`
    assert (inner - torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-4


@pytest.mark.parametrize(("limit", "norm", "divisor"), [(0.0, 9.0, 1.0), (1e9, 9.0, 1.0), (0.5, 9.0, 18.0)])
def test_clip_divisor_bounds_the_norm(limit: float, norm: float, divisor: float):
    assert clip_divisor(limit, torch.tensor(norm)).item() == divisor


def test_gradient_norm_is_that_of_all_gradients_together():
    model = make_model()
    set_gradients(model, 0)
    model.norm.weight.grad = None  # a parameter without a gradient
    norms = [p.grad.double().norm().item() for p in model.parameters() if p.grad is not None]
    assert gradient_norm(model.parameters()).item() == pytest.approx(math.hypot(*norms), rel=1e-5)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_the_maps_of_muon(ranks: int, monkeypatch: pytest.MonkeyPatch):
    """The ranks run one after another; each orthogonalizes its share of three maps."""
    maps = torch.randn(3, 4, 6)
    shares: list[torch.Tensor] = []

    def all_gather(world: World, share: torch.Tensor) -> torch.Tensor:
        shares.append(share)
        return share.repeat(ranks, 1, 1)

    monkeypatch.setattr(World, "all_gather", all_gather)
    for rank in range(ranks):
        optimizer = make_optimizer(make_model(), "muon", World(rank, ranks, CPU, torch.float32))
        assert len(optimizer._orthogonalize(maps)) == 3
    assert {len(share) for share in shares} == {math.ceil(3 / ranks)}
    torch.testing.assert_close(torch.cat(shares)[:3], orthogonalize(maps, torch.float32))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_state_tensors_are_loaded_by_name(kind: str):
    model = make_model()
    twin = make_model()
    ours = make_optimizer(model, kind)
    theirs = make_optimizer(twin, kind)
    set_gradients(model, 0)
    ours.step(1.0, ONE, ZERO)
    twin.load_state_dict(model.state_dict())
    theirs.load_state_tensors(dict(reversed(ours.state_tensors().items())))
    for one, optimizer in ((model, ours), (twin, theirs)):
        set_gradients(one, 1)
        optimizer.step(1.0, ONE, ZERO)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    other = make_optimizer(make_model(), "muon" if kind == "adamw" else "adamw")
    with pytest.raises(InputError, match="--optimizer"):
        other.load_state_tensors(ours.state_tensors())


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("blocks.7.mlp.up.weight/exp_avg", torch.zeros(1)), ("norm.weight/exp_avg", torch.zeros(31))],
)
def test_state_tensors_of_another_model_are_refused(name: str, tensor: torch.Tensor):
    optimizer = make_optimizer(make_model())
    with pytest.raises(InputError, match=f"{name} does not fit"):
        optimizer.load_state_tensors(optimizer.state_tensors() | {name: tensor})


class OnMps(torch.Tensor):
    """A CPU tensor that says it is on MPS."""

    device: Any = property(lambda self: torch.device("mps"))


def test_mps_divides_and_skips_without_the_fused_kernel():
    model = make_model()
    twin = make_model()
    optimizer = make_optimizer(model)
    plain = make_optimizer(twin)
    for skip in (0.0, 1.0, 0.0):
        for one in (model, twin):
            set_gradients(one, 1)
        plain.step(1.0, torch.tensor(3.0), torch.tensor(skip))
        optimizer.step(1.0, torch.tensor(3.0), torch.tensor(skip).as_subclass(OnMps))
        for p, expected in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-7)
