"""Memory estimates and the micro-batches that they choose."""

from typing import Any

import pytest
import torch

from model import GPT, GPTConfig
from nanogpt import memory
from nanogpt.distributed import World
from nanogpt.errors import InputError
from nanogpt.memory import (
    estimate_training_memory,
    optimizer_state_numel,
    optimizer_step_bytes,
    pick_micro_batch,
    raise_if_cpu_memory_is_short,
)
from nanogpt.optim import Optimizer

CPU = torch.device("cpu")
WORLD = World(0, 1, CPU, torch.float32)
SIZES: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 64, "vocab_size": 64, "block_size": 16}
MODERN = SIZES | {"arch": "modern", "bias": False}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("sizes", [SIZES, MODERN])
def test_optimizer_state_numel_counts_its_tensors(sizes: dict[str, Any], kind: str):
    model = GPT(GPTConfig(**sizes))
    optimizer = Optimizer(model, WORLD, kind=kind, learning_rate=1.0)
    numel = sum(t.numel() for name, t in optimizer.state_tensors().items() if not name.endswith("/step"))
    assert optimizer_state_numel(model, kind) == numel


def test_optimizer_step_bytes_by_hand():
    """An MLP of two shapes; the update of the wide one is alive while the square one is computed."""
    with torch.device("meta"):
        model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=64, block_size=4, n_inner=16))
    wide = 2 * (8 * 8 * 16 + max(8 * 8 * 16, 8 * (8 * 16 + 8 * 8)))  # up and down, 8 × 16
    square = 4 * (8 * 8 * 8 + max(8 * 8 * 8, 8 * (8 * 8 + 8 * 8)))  # q, k, v and out, 8 × 8
    assert optimizer_step_bytes(model, "muon", 4) == max(square, 4 * 4 * 64 + wide)
    assert optimizer_step_bytes(model, "adamw", 4) == 0


def test_estimate_grows_with_what_a_step_keeps():
    def estimate(B: int = 8, dtype: torch.dtype = torch.float32, loss_chunk: int = 0, **sizes: Any) -> float:
        with torch.device("meta"):
            model = GPT(GPTConfig(**SIZES | sizes))
        model.loss_chunk = loss_chunk
        return estimate_training_memory(model, "adamw", B, 16, dtype)

    assert estimate(B=16) - estimate() == pytest.approx(estimate() - estimate(B=0))
    assert estimate(dtype=torch.bfloat16) < estimate() < estimate(n_layer=3)
    saved = estimate(vocab_size=50_000) - estimate(vocab_size=50_000, loss_chunk=64)
    assert saved == pytest.approx(12 * 50_000 * (8 * 16 - 64) - 8 * 50_000 * SIZES["n_embd"])


@pytest.mark.parametrize("sharing", [1, 2])  # processes on this machine
def test_pick_micro_batch_takes_the_largest_that_fits(sharing: int, monkeypatch: pytest.MonkeyPatch):
    model = GPT(GPTConfig(**SIZES))
    needed = estimate_training_memory(model, "adamw", 4, 16, torch.float32)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(sharing))
    monkeypatch.setattr(memory, "free_memory", lambda _: 1.01 * needed * sharing / memory.USABLE_SHARE)
    assert pick_micro_batch(model, "adamw", [8, 4, 2, 1], WORLD) == 4
    monkeypatch.setattr(World, "all_reduce_sum", lambda _, values: values * 0)  # another rank has less
    assert pick_micro_batch(model, "adamw", [8, 4, 2, 1], WORLD) == 1
    monkeypatch.setattr(memory, "free_memory", lambda _: 0.99 * needed * sharing)
    with pytest.raises(InputError, match=r"a hint; about .* are needed"):
        raise_if_cpu_memory_is_short(needed, CPU, "a hint")
