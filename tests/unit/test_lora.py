"""LoRA's shapes, counts and hashes, and equal gradients whatever else is on. tests/oracles/test_peft.py has PEFT."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
from random_models import MODERN, SMALL, randomize
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import GPT, GPTConfig
from nanogpt import cpu_kernels
from nanogpt.cpu_kernels import use_cpu_kernels
from nanogpt.distributed import World
from nanogpt.lora import add_lora, base_sha256
from nanogpt.memory import estimate_training_memory, optimizer_state_numel, trained_numel
from nanogpt.optim import Optimizer

IDX = torch.arange(24).view(1, 24) * 5 % 70
WORLD = World(0, 1, torch.device("cpu"), torch.float32)
GROUPED = MODERN | {"n_kv_head": 2, "tied": False}


def make_model(targets: str = "attention,mlp", **sizes: Any) -> tuple[GPT, dict[str, Tensor], dict[str, Tensor]]:
    """A model with random adapters, these, and the tensors of its base."""
    torch.manual_seed(0)
    model = randomize(GPT(GPTConfig(**{"vocab_size": 70} | sizes)), 0.1).train()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    add_lora(model, "base", rank=3, alpha=6.0, targets=targets)
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for p in adapters.values():
        p.data.normal_(std=0.1)
    return model, adapters, base


@pytest.mark.parametrize(
    ("sizes", "targets", "shapes"),
    [
        (SMALL, "attn", {"attention.qkv c_attn": (32, 96), "attention.out c_proj": (32, 32)}),
        (GROUPED, "q_proj, v_proj", {"attention.qkv q_proj": (32, 32), "attention.qkv v_proj": (32, 16)}),
    ],
)
def test_adapters_have_the_shapes_of_their_layers(
    sizes: dict[str, Any], targets: str, shapes: dict[str, tuple[int, int]]
):
    _, adapters, _ = make_model(targets, **sizes)
    expected = {}
    for name, (inputs, outputs) in shapes.items():
        layer, part = name.split()
        for block in range(2):
            expected[f"blocks.{block}.{layer}.lora_A.{part}"] = (3, inputs)
            expected[f"blocks.{block}.{layer}.lora_B.{part}"] = (outputs, 3)
    assert {name: tuple(p.shape) for name, p in adapters.items()} == expected


@pytest.mark.parametrize("sizes", [SMALL, GROUPED])
def test_counts_equal_the_tensors_and_torchs_flop_counter(sizes: dict[str, Any]):
    model, adapters, _ = make_model(**sizes)
    c = model.config
    numel = sum(p.numel() for p in adapters.values())
    optimizer = Optimizer(model, WORLD, learning_rate=1.0)
    assert optimizer.parameters.keys() == adapters.keys()
    state = {name: t.numel() for name, t in optimizer.state_tensors().items() if not name.endswith("/step")}
    assert trained_numel(model) == numel
    assert optimizer_state_numel(model, "adamw") == sum(state.values()) == 2 * numel
    base = model.count_parameters() - numel
    assert estimate_training_memory(model, "adamw", 0, 24, torch.float32) == 4 * (base + 4 * numel)

    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the fused one is not counted
        model(IDX, IDX)[1].backward()
    padding = (c.padded_vocab_size - c.vocab_size) * c.n_embd
    # Below the first adapters nothing trains, so the first layer has no gradient of its input.
    first = model.blocks[0].attention.qkv
    unneeded = first.weight.numel() + sum(A.numel() for A in first.lora_A.values())
    # The B of q, k and v are one matrix with zeros around them; torch counts its backward, not addmm_
    # (findings/torch_flop_counter_in_place.sh).
    B = sum(p.numel() for name, p in adapters.items() if ".lora_B." in name)
    zeros = 0
    for block in model.blocks:
        parts = block.attention.qkv.lora_B
        zeros += 3 * len(parts) * len(block.attention.qkv.weight) - sum(p.numel() for p in parts.values())
    expected = model.flops_per_token() + 4 * padding - 2 * unneeded - 2 * B + 4 * zeros
    assert counter.get_total_flops() == IDX.numel() * expected


def with_checkpointing(model: GPT) -> None:
    model.activation_checkpointing = True
    model.loss_chunk = 7


@pytest.mark.parametrize("sizes", [SMALL, GROUPED | {"qk_norm": False, "qkv_bias": True}])
@pytest.mark.parametrize("targets", ["attention,mlp", "attention"])
@pytest.mark.parametrize("change", [with_checkpointing, use_cpu_kernels])
def test_gradients_are_equal_whatever_else_is_on(
    sizes: dict[str, Any], targets: str, change: Callable[[GPT], None], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cpu_kernels, "MIN_WIDE_LAYER", 0)
    model, adapters, _ = make_model(targets, **sizes)
    losses, gradients = [], []
    for _ in range(2):
        loss = model(IDX, IDX)[1]
        losses.append(loss.item())
        gradients.append(torch.autograd.grad(loss, list(adapters.values())))
        change(model)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for one, other in zip(*gradients, strict=True):
        assert one.abs().max() > 1e-6
        assert (one - other).abs().max() <= 1e-5 * one.abs().max()


@pytest.mark.parametrize("sizes", [SMALL, GROUPED])
def test_the_hash_is_of_the_weights_alone(sizes: dict[str, Any]):
    """Not of the padding, nor of positions beyond the run's context."""
    model, _, base = make_model(**sizes)
    config = asdict(model.config)
    hashed = base_sha256(base, config)
    assert model.lora == {"alpha": 6.0, "base": "base", "base_sha256": hashed}
    unpadded = {name: t[:70] if name in ("token_embedding.weight", "head.weight") else t for name, t in base.items()}
    longer = dict(reversed(unpadded.items()))
    if "position_embedding.weight" in base:
        longer["position_embedding.weight"] = torch.cat((base["position_embedding.weight"], torch.ones(3, 32)))
    assert base_sha256(longer, config) == hashed
    for name, tensor in unpadded.items():
        assert base_sha256(unpadded | {name: tensor + tensor.abs().max() / 2**20}, config) != hashed, name


def test_memory_includes_the_activation_of_an_mlp_with_adapters(monkeypatch: pytest.MonkeyPatch):
    """Backward computes it again only where `down` has none."""
    monkeypatch.setattr("nanogpt.memory.MIN_WIDE_LAYER", 0)
    gate, down = (
        estimate_training_memory(make_model(target, **GROUPED)[0], "adamw", 2, 24, torch.float32)
        for target in ("gate", "down")
    )
    n_inner = GPTConfig(**GROUPED).n_inner
    assert down - gate == pytest.approx(2 * 2 * 24 * 4 / 3 * 2 * 4 * n_inner)  # layers, tokens, bytes
