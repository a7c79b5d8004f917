"""Optimizer: its parts and its state by name; oracles/test_torch_training.py has its updates against torch's."""

from typing import Any

import pytest
import torch

from model import GPT, GPTConfig
from nanogpt.distributed import World
from nanogpt.errors import InputError
from nanogpt.optim import Optimizer, clip_divisor

CPU = torch.device("cpu")
ONE = torch.ones(())
ZERO = torch.zeros(())


def make_model() -> GPT:
    torch.manual_seed(0)
    return GPT(
        GPTConfig(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, vocab_size=9, block_size=4, arch="modern", bias=False)
    )


def make_optimizer(model: GPT, kind: str = "adamw") -> Optimizer:
    return Optimizer(model, World(0, 1, CPU, torch.float32), kind=kind, learning_rate=1e-2)


def set_gradients(model: GPT, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def test_muon_trains_the_blocks_matrices_alone():
    model = make_model()
    params = model.muon_params()
    names = ("attention.qkv", "attention.out", "mlp.gate", "mlp.up", "mlp.down")
    assert params.keys() == {f"blocks.{i}.{name}.weight" for i in range(2) for name in names}
    assert params["blocks.1.attention.qkv.weight"] == [32, 16, 16]


@pytest.mark.parametrize(("limit", "norm", "divisor"), [(0.0, 9.0, 1.0), (1e9, 9.0, 1.0), (0.5, 9.0, 18.0)])
def test_clip_divisor_bounds_the_norm(limit: float, norm: float, divisor: float):
    assert clip_divisor(limit, torch.tensor(norm)).item() == divisor


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("blocks.7.mlp.up.weight/exp_avg", torch.zeros(1)), ("norm.weight/exp_avg", torch.zeros(31))],
)
def test_state_tensors_of_another_model_or_kind_are_refused(name: str, tensor: torch.Tensor):
    optimizer = make_optimizer(make_model())
    with pytest.raises(InputError, match=f"{name} does not fit"):
        optimizer.load_state_tensors(optimizer.state_tensors() | {name: tensor})
    with pytest.raises(InputError, match="--optimizer"):
        make_optimizer(make_model(), "muon").load_state_tensors(optimizer.state_tensors())


class OnMps(torch.Tensor):
    """A CPU tensor that says it is on MPS."""

    device: Any = property(lambda self: torch.device("mps"))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_skipped_update_changes_nothing(kind: str):
    """Neither parameters nor state, though the gradients are NaN."""
    model = make_model()
    optimizer = make_optimizer(model, kind)
    set_gradients(model, 1)
    optimizer.step(1.0, torch.ones(()), torch.zeros(()))
    tensors = {**dict(model.named_parameters()), **optimizer.state_tensors()}
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.nan)
    optimizer.step(1.0, torch.ones(()), torch.ones(()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors.items())


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
