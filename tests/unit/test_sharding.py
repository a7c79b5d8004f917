"""Sharding: which rows a rank keeps, who owns a map; runs/test_distributed.py has whole runs against one process."""

import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from load import build_model
from model import GPTConfig
from nanogpt import cpu_kernels, sharding
from nanogpt.cpu_kernels import use_cpu_kernels
from nanogpt.distributed import World
from nanogpt.errors import RunStopped
from nanogpt.sharding import (
    MapExchange,
    check_shards,
    copy_rows,
    equalize_copies,
    gather_rows,
    is_sharded,
    local,
    make_mesh,
    own_rows,
)


@pytest.mark.parametrize("num_rows", [1, 3, 8, 9, 50])
@pytest.mark.parametrize("shards", [1, 2, 4, 7])
def test_own_rows_are_those_of_chunk(num_rows: int, shards: int):
    rows = torch.arange(num_rows)
    expected = [*rows.chunk(shards), *[rows[:0]] * shards][:shards]  # as fully_shard divides; some get none
    assert all(torch.equal(rows[own_rows(num_rows, rank, shards)], expected[rank]) for rank in range(shards))


def mailbox(sent: dict[int, list[torch.Tensor]], rank: int) -> SimpleNamespace:
    """Stands for torch.distributed: a rank of four, whose messages lie in `sent`; the main process finds them there."""

    def send(tensor: torch.Tensor, to: int, group: object) -> None:
        assert to == 0
        sent.setdefault(rank, []).append(tensor)

    def recv(target: torch.Tensor, source: int, group: object) -> None:
        if source not in sent:
            raise RuntimeError("[pair.cc:534] Connection closed by peer\nmore")
        target.copy_(sent[source].pop(0))

    return SimpleNamespace(get_rank=lambda: rank, get_world_size=lambda _: 4, send=send, recv=recv)


@pytest.mark.parametrize("shape", [(1,), (3,), (8, 2), (9, 2), (50, 3)])
def test_gather_rows_makes_the_whole_tensor(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]):
    whole = torch.randn(shape, dtype=torch.bfloat16)
    copy = torch.zeros_like(whole)
    sent: dict[int, list[torch.Tensor]] = {}
    for rank in (3, 2, 1, 0):
        rows = own_rows(len(whole), rank, 4)
        copy[rows] = whole[rows] if rank == 0 else 0
        monkeypatch.setattr(sharding, "dist", mailbox(sent, rank))
        gather_rows(copy if rank == 0 else whole[rows], None)
    assert torch.equal(copy, whole)
    assert not any(sent.values())  # ranks without rows sent nothing


def test_gather_rows_names_the_rank_that_it_lost(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sharding, "dist", mailbox({1: [torch.ones(2)], 3: [torch.ones(2)]}, 0))
    with pytest.raises(RunStopped, match=r"^rank 2 did not send its part .*closed by peer\): see its output, .*=auto$"):
        gather_rows(torch.ones(8), None)


@pytest.fixture
def world() -> Iterator[World]:
    """Of one rank, whose part of a sharded tensor is the whole."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield World(0, 1, torch.device("cpu"), torch.bfloat16, mesh=make_mesh("cpu", 1, 1))
    dist.destroy_process_group()


def test_copy_rows_fills_with_zeros_what_the_source_lacks(world: World):
    model = build_model(GPTConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=70, block_size=4), None, world)
    weight = model.token_embedding.weight
    assert is_sharded(weight)
    local(weight).data.fill_(7.0)
    copy_rows(weight, torch.ones(70, 8))
    whole = local(weight)
    assert whole.shape == (128, 8)
    assert (whole[:70] == 1).all()
    assert not whole[70:].any()
    with pytest.raises(RuntimeError, match="do not fit"):
        copy_rows(weight, torch.ones(70, 1))


@pytest.mark.parametrize("sizes", [{}, {"bias": False, "arch": "modern", "n_kv_head": 1, "tied": False}])
def test_sharded_model_computes_what_a_plain_one_does(
    world: World, sizes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    """In bfloat16, where gains are rounded too; the blocks' gradients differ by that alone."""
    monkeypatch.setattr(cpu_kernels, "MIN_WIDE_LAYER", 0)
    plain_world = World(0, 1, torch.device("cpu"), torch.bfloat16)
    config = GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=70, block_size=16, **sizes)
    gradients = []
    for one in (plain_world, world):
        torch.manual_seed(0)
        model = build_model(config, None, one)
        use_cpu_kernels(model)
        idx = torch.arange(32).view(2, 16)
        with one.autocast():
            loss = model(idx, idx)[1]
        assert loss is not None
        loss.backward()
        gradients.append({name: local(p.grad) for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() == dict(model.named_parameters()).keys()
    for name, gradient in gradients[0].items():
        difference = (gradients[1][name] - gradient).norm()
        assert difference < 0.02 * gradient.norm(), name


def test_the_hash_of_the_weights_is_that_of_what_was_loaded(world: World):
    """Equal with shards and without; another first row of any tensor shows."""
    config = GPTConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=64, block_size=4)
    plain = World(0, 1, torch.device("cpu"), torch.float32)
    tensors = build_model(config, None, plain).state_dict()
    hashes = {build_model(config, tensors, one).first_rows_hash for one in (plain, world)}
    for name in tensors:
        hashes.add(build_model(config, tensors | {name: tensors[name] + 1}, plain).first_rows_hash)
    assert len(hashes) == 1 + len(tensors)


def test_copies_get_the_weights_of_the_first(world: World, monkeypatch: pytest.MonkeyPatch):
    model = build_model(GPTConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=70, block_size=4), None, world)
    sent: list[torch.Tensor] = []

    def broadcast(tensor: torch.Tensor, group: str, group_src: int) -> None:
        assert (group, group_src) == ("copies", 0)
        sent.append(tensor)
        tensor.fill_(3.0)

    monkeypatch.setattr(sharding.dist, "broadcast", broadcast)
    for copies in (1, 2):
        equalize_copies(model, SimpleNamespace(size=lambda _, n=copies: n, get_group=str))
        assert len(sent) == (len([*model.parameters()]) if copies == 2 else 0)
    assert all((local(p) == 3.0).all() for p in model.parameters())


class Exchange(MapExchange):
    """The exchange of one rank among several, each a thread, without a process group."""

    def __init__(self, rank: int, barrier: threading.Barrier, sent: dict[int, Any]):
        ranks = barrier.parties
        mesh = SimpleNamespace(get_group=lambda _: None, get_local_rank=lambda _: rank, size=lambda _: ranks)
        super().__init__(MATRICES, SPLITS, mesh if ranks > 1 else None)
        self.barrier, self.sent = barrier, sent

    def _all_to_all(self, rows: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
        if len(self.owned) == 1:
            return super()._all_to_all(rows, sent, received)
        self.sent[self.rank] = rows.split(sent)
        self.barrier.wait()
        parts = [self.sent[source][self.rank] for source in range(len(self.owned))]
        self.barrier.wait()
        assert [len(part) for part in parts] == received
        return torch.cat(parts)


MATRICES = {"qkv": torch.arange(60.0).view(10, 6), "up": torch.arange(42.0).view(7, 6)}
SPLITS = {"qkv": [4, 2, 4], "up": [7]}


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_exchange_sends_each_row_to_one_owner_and_back(ranks: int):
    barrier = threading.Barrier(ranks, timeout=10)
    sent: dict[int, Any] = {}

    def double(rank: int) -> list[tuple[str, int, int]]:
        """Double the maps; return those that this rank owns."""
        exchange = Exchange(rank, barrier, sent)
        parts = {name: matrix[own_rows(len(matrix), rank, ranks)] for name, matrix in MATRICES.items()}
        rows = torch.cat([view.reshape(-1) for view in exchange.views(parts)])
        maps: list[torch.Tensor] = []
        expected = 2 * rows
        result = exchange.apply(lambda whole: maps.extend(w.clone() for w in whole) or [2 * w for w in whole], rows)
        assert torch.equal(result, expected)
        owned = []
        for one, whole in zip(exchange.owned[rank], maps, strict=True):
            first = int(whole[0, 0] - MATRICES[one.name][0, 0]) // 6
            assert torch.equal(whole, MATRICES[one.name][first : first + one.rows])
            owned.append((one.name, first, one.rows))
        return owned

    with ThreadPoolExecutor(ranks) as pool:
        futures = [pool.submit(double, rank) for rank in range(ranks)]
        for future in as_completed(futures):
            future.result()  # the first to fail, not those that wait for it
    owned = [future.result() for future in futures]
    assert sorted(itertools.chain(*owned)) == [("qkv", 0, 4), ("qkv", 4, 2), ("qkv", 6, 4), ("up", 0, 7)]
    assert sum(map(bool, owned)) == min(ranks, 4)  # all have work


def test_shards_that_cannot_work_are_named():
    assert not check_shards(1, 3, "float16", 8, 5.0)
    assert not check_shards(0, 3, "bfloat16", 0, None)
    assert not check_shards(0, 1, "float16", 8, 5.0)  # one process has no shards
    (problem,) = check_shards(2, 3, "auto", 0, None)
    assert problem.startswith("shards=2: does not divide 3 process(es); ")
    names = [problem.partition(":")[0] for problem in check_shards(2, 4, "float16", 8, 5.0)]
    assert names == ["dtype=float16", "lora_rank", "minutes"]
