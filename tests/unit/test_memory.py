"""Memory estimates and the micro-batches that they choose."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from model import GPT, GPTConfig
from nanogpt import memory
from nanogpt.distributed import World
from nanogpt.errors import InputError
from nanogpt.memory import (
    estimate_training_memory,
    optimizer_state_numel,
    optimizer_step_bytes,
    pick_micro_batch,
    raise_if_memory_is_short,
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
    """A block of two shapes: 2 maps of 8 × 16, then 4 of 8 × 8."""
    with torch.device("meta"):
        model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=64, block_size=4, n_inner=16))
    amid_second_shape = 512 + 256 + 4 * (3 * 64 + 2 * 64)
    assert optimizer_step_bytes(model, "muon", torch.float32) == 4 * amid_second_shape
    assert optimizer_step_bytes(model, "muon", torch.bfloat16) == 2 * amid_second_shape
    assert optimizer_step_bytes(model, "adamw", torch.float32) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [SIZES, MODERN | {"n_kv_head": 1}])
def test_optimizer_step_bytes_are_those_of_a_step(sizes: dict[str, Any], dtype: torch.dtype):
    model = GPT(GPTConfig(**sizes | {"n_embd": 128}))
    optimizer = Optimizer(model, World(0, 1, CPU, dtype), kind="muon", learning_rate=1.0)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        optimizer.step(1.0, torch.ones(()), torch.zeros(()))
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes_in_time = (e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    needed = optimizer_step_bytes(model, "muon", dtype)
    assert max(itertools.accumulate(sizes_in_time)) == pytest.approx(needed, rel=0.02)


def test_estimate_grows_with_what_a_step_keeps():
    def estimate(B: int = 8, dtype: torch.dtype = torch.float32, loss_chunk: int = 0, **sizes: Any) -> float:
        with torch.device("meta"):
            model = GPT(GPTConfig(**SIZES | sizes))
        model.loss_chunk = loss_chunk
        return estimate_training_memory(model, "adamw", B, 16, dtype)

    assert estimate(B=16) - estimate() == pytest.approx(estimate() - estimate(B=0))
    assert estimate(dtype=torch.bfloat16) < estimate() < estimate(n_layer=3)
    for dtype, gradients in ((torch.float32, 4), (torch.bfloat16, 4 + 2)):
        whole = estimate(vocab_size=50_000, dtype=dtype)
        saved = whole - estimate(vocab_size=50_000, dtype=dtype, loss_chunk=64)
        assert saved == pytest.approx(12 * 50_000 * (8 * 16 - 64) - gradients * 50_000 * SIZES["n_embd"])


def test_estimate_has_the_squares_of_attentions_backward(monkeypatch: pytest.MonkeyPatch):
    model = GPT(GPTConfig(**SIZES | {"block_size": 256}))
    with_squares = estimate_training_memory(model, "adamw", 2, 256, torch.bfloat16)
    monkeypatch.setattr("nanogpt.memory.MAX_PLAIN_BACKWARD", 0)
    without = estimate_training_memory(model, "adamw", 2, 256, torch.bfloat16)
    assert with_squares - without == 2 * 256 * 6 * SIZES["n_head"] * 256


@pytest.mark.parametrize("sizes", [SIZES, MODERN])
def test_estimate_has_what_dropout_keeps(sizes: dict[str, Any]):
    """A third more than autograd saves, as of all activations."""
    kept: list[int] = []
    estimates: list[float] = []
    for dropout in (0.0, 0.2):
        model = GPT(GPTConfig(**sizes | {"block_size": 256, "dropout": dropout}))
        saved: dict[int, torch.Tensor] = {}
        idx = torch.zeros(4, 256, dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.setdefault(t.data_ptr(), t), lambda t: t):
            model(idx, idx)
        kept.append(
            sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved.values()}.values())
        )
        estimates.append(estimate_training_memory(model, "adamw", 4, 256, torch.float32))
    assert estimates[1] - estimates[0] == pytest.approx(4 / 3 * (kept[1] - kept[0]), rel=0.2)


@pytest.mark.parametrize(("arch", "arrays"), [("gpt2", 1), ("modern", 2)])
def test_estimate_leaves_out_what_a_cpu_computes_again(arch: str, arrays: int):
    config = GPTConfig(**SIZES | {"arch": arch, "bias": False, "n_embd": 768, "n_inner": 1024})
    with torch.device("meta"):
        other = GPT(config)
    estimates = [estimate_training_memory(model, "adamw", 8, 16, torch.float32) for model in (other, GPT(config))]
    assert estimates[0] - estimates[1] == pytest.approx(4 / 3 * 8 * 16 * 2 * arrays * 4 * 1024)  # two layers


@pytest.mark.parametrize("sharing", [1, 2])  # processes on this machine
def test_pick_micro_batch_takes_the_largest_that_fits(sharing: int, monkeypatch: pytest.MonkeyPatch):
    model = GPT(GPTConfig(**SIZES))
    needed = estimate_training_memory(model, "adamw", 4, 16, torch.float32)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(sharing))
    monkeypatch.setattr(memory, "free_memory", lambda _: 1.01 * needed * sharing / memory.USABLE_SHARE)
    assert pick_micro_batch(model, "adamw", [8, 4, 2, 1], WORLD) == 4
    monkeypatch.setattr(World, "all_reduce_sum", lambda _, values: values * 0)  # another rank has less
    assert pick_micro_batch(model, "adamw", [8, 4, 2, 1], WORLD) == 1


GPU = torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "rank", "sharing", "shards", "saves", "processes", "copies"),
    [
        (CPU, 0, 1, 1, True, 1, 1.0),
        (CPU, 0, 2, 1, True, 2, 1.0),
        (CPU, 0, 4, 4, True, 4, 1.75),  # the others' parts
        (CPU, 1, 4, 4, True, 4, 0.0),  # which the main process has counted
        (CPU, 0, 2, 8, True, 2, 1.125),  # of eight only one other is on this machine
        (CPU, 0, 1, 1, False, 1, 0.0),  # a dry run
        (GPU, 0, 1, 1, True, 0, 1.0),
        (GPU, 0, 8, 64, True, 0, 1 + 7 / 64),
    ],
)
def test_memory_of_a_run_is_checked(
    device: torch.device,
    rank: int,
    sharing: int,
    shards: int,
    saves: bool,
    processes: int,
    copies: float,
    monkeypatch: pytest.MonkeyPatch,
):
    """processes, copies: what counts on this machine, beyond the weights, and in copies of a checkpoint."""
    model = GPT(GPTConfig(**SIZES))
    mesh = SimpleNamespace(size=lambda _: shards) if shards > 1 else None
    world = World(rank, 64, device, torch.float32, mesh=mesh)
    numel = model.count_parameters()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(sharing))
    needed = processes * (estimate_training_memory(model, "adamw", 4, 16, torch.float32, shards) - 4 * numel)
    needed += copies * 12 * numel
    arguments = (model, "adamw", 4, 16, world, "a hint", saves)
    monkeypatch.setattr(memory, "free_memory", lambda _: needed + 1)
    raise_if_memory_is_short(*arguments)
    monkeypatch.setattr(memory, "free_memory", lambda _: needed - 1)
    message = r"^a hint; about .* are needed" if processes else "^not enough memory of the host to save: .* takes"
    with pytest.raises(InputError, match=message):
        raise_if_memory_is_short(*arguments)
