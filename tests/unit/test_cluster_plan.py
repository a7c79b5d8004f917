"""The arithmetic of docs/scaling.md on clusters: against torch's own collectives, the model, and closed forms."""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from torch.testing._internal.distributed.fake_pg import FakeStore

from model import GPT, GPTConfig
from nanogpt.memory import estimate_training_memory

sys.path.insert(0, str(ROOT / "runs/cluster_plan"))

import plan
import simulate
import tables
from measure import Traffic
from plan import Cluster, Step

QWEN3_8B = tables.MODELS["8B"]


@pytest.mark.parametrize("name", [*tables.MODELS, "small"])
def test_parameters_and_flops_are_the_models(name: str):
    small = GPTConfig(n_layer=2, n_head=2, n_embd=34, n_inner=70, vocab_size=99, block_size=16)  # with biases
    c = tables.MODELS.get(name, small)
    sizes = {name: value for name, value in vars(c).items() if name != "padded_vocab_size"}
    with torch.device("meta"):
        model = GPT(GPTConfig(**sizes))
    assert Counter(plan.block_shapes(c)) == Counter(tuple(p.shape) for p in model.blocks[0].parameters())
    assert plan.all_numel(c) == sum(p.numel() for p in model.parameters())
    padding = (c.padded_vocab_size - c.vocab_size) * c.n_embd * (1 if c.tied else 2)
    assert plan.all_numel(c) - padding == model.count_parameters()
    assert plan.hidden_numel(c) == sum(model.get_parameter(n).numel() for n in model.muon_params())
    assert plan.flops_per_token(c) == model.flops_per_token(c.block_size)


@pytest.mark.parametrize(
    ("shards", "memory", "seconds"), [(1, 131, (0.29, 1.29)), (64, 13.5, (0.29, 1.29)), (8, 27.9, (0.29, 0.29))]
)
def test_8b_on_64_gpus_by_hand(shards: int, memory: float, seconds: tuple[float, float]):
    """16 bytes per parameter over the shards; the root twice in float32 (10 GB) and a block's units (1.5 GB).

    A step reduces 33 GB of gradients and gathers as much, or all-reduces them: 65 GB. In one flat ring all passes
    50 GB/s. By stages 7/8 pass 400 GB/s inside a node, and an eighth, by 7/8, passes 50 GB/s.
    """
    step = tables.STEPS["8B"]
    units = plan.unit_bytes(QWEN3_8B, shards, step.itemsize)
    assert (sum(plan.state_bytes(QWEN3_8B, shards, "adamw").values()) + units) / 1e9 == pytest.approx(memory, 0.01)
    parts = plan.collectives(QWEN3_8B, 64, shards, step)
    assert sum(map(plan.sent_bytes, parts)) == pytest.approx(8 * 63 / 64 * 8.19e9, 1e-3)
    communication = plan.step_seconds(QWEN3_8B, Cluster(64), shards, step).communication
    assert communication == pytest.approx(seconds, 0.02)
    stages = 8 * 8.19e9 * (7 / 8 / 400e9 + 7 / 8 / 8 / 50e9)
    assert communication[0] == pytest.approx(stages, 1e-3)
    tokens, _ = plan.balance_tokens(QWEN3_8B, Cluster(64), shards, step)
    rate = plan.flops_per_token(QWEN3_8B, step.checkpointing) / Cluster(64).flops
    assert communication[0] == pytest.approx(tokens * rate)


def test_collective_seconds_by_hand():
    part = plan.Collective("all-gather", "block", 8e9, 64)
    assert plan.collective_seconds(part, Cluster(64), 64, flat=True) == pytest.approx(8e9 * 63 / 64 / 50e9)
    alone = part._replace(ranks=8)  # in a node
    for flat in (False, True):
        assert plan.collective_seconds(alone, Cluster(8), 8, flat) == 7e9 / 400e9
    swap = part._replace(kind="all-to-all")  # 7 of 64 parts stay in the node, 56 leave it
    assert plan.collective_seconds(swap, Cluster(64), 64) == pytest.approx(7 / 8e9 * 1e9 / 400 + 7 / 50)


@pytest.mark.parametrize("shards", [1, 8, 64])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("name", tables.MODELS)
def test_memory_is_what_a_run_foretells(name: str, optimizer: str, shards: int):
    """train.py's estimate counts a third more activations, for temporaries, and knows dropout, LoRA and CPUs."""
    c, step = tables.MODELS[name], replace(tables.STEPS[name], optimizer=optimizer)
    with torch.device("meta"):
        model = GPT(GPTConfig(**{key: value for key, value in vars(c).items() if key != "padded_vocab_size"}))
    model.activation_checkpointing, model.loss_chunk = step.checkpointing, step.loss_chunk
    estimate = estimate_training_memory(model, optimizer, step.rows, c.block_size, torch.bfloat16, shards)
    assert 0.9 < estimate / plan.memory_bytes(c, shards, step) < 1.3


def test_measured_peaks_are_near_the_formula():
    cases = json.loads((ROOT / "runs/cluster_plan/measured.json").read_text())["cases"]
    sizes = {"4 layers": (4, 4, 512), "124M": (12, 12, 768), "350M": (24, 16, 1024)}
    for case in cases:
        n_layer, n_head, n_embd = sizes[case["model"]]
        c = GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=192, bias=False)
        step = Step(1, itemsize=2 if case["dtype"] == "bfloat16" else 4, optimizer=case["optimizer"])
        assert plan.memory_bytes(c, case["shards"], step) == case["formula"]["memory"]
        assert 0.9 < case["measured"]["memory"] / case["formula"]["memory"] < 1.1


@pytest.mark.parametrize(("shards", "fewer"), [(4, 2), (64, 4)])
def test_owned_maps_send_less_than_gathering(shards: int, fewer: float):
    """Against sending each rank's rows to all others."""
    parts = plan.collectives(QWEN3_8B, shards, shards, Step(rows=1, optimizer="muon"))
    swapped = sum(plan.sent_bytes(part) for part in parts if part.kind == "all-to-all")
    gathered = 2 * plan.hidden_numel(QWEN3_8B) * (shards - 1) / shards
    assert gathered / swapped >= fewer - 1e-9


@pytest.fixture
def fake_ranks() -> Iterator[Callable[[int], None]]:
    """Start as the first of many ranks whose collectives send nothing."""
    yield lambda size: dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")  # its output is not changed in place
@pytest.mark.parametrize(
    ("gpus", "shards", "itemsize", "checkpointing"), [(2, 2, 2, False), (64, 64, 4, True), (64, 8, 2, True)]
)
def test_collectives_are_those_of_fully_shard(
    fake_ranks: Callable[[int], None], gpus: int, shards: int, itemsize: int, checkpointing: bool
):
    """Two steps of two micro-steps by torch's FSDP2: kinds, calls and bytes of the second. Rows are padded."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    fake_ranks(gpus)
    mesh = init_device_mesh("cpu", (gpus // shards, shards), mesh_dim_names=("copies", "shards"))
    mesh = mesh if shards < gpus else mesh["shards"]
    c = GPTConfig(n_layer=3, n_head=2, n_embd=34, vocab_size=100, block_size=16, bias=False)
    model = GPT(c)
    model.activation_checkpointing = checkpointing
    in_products = MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.float32) if itemsize == 2 else None
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **({"mp_policy": in_products} if in_products else {}))
    fully_shard(model, mesh=mesh)
    x = torch.zeros(2, 16, dtype=torch.int64)
    for _ in range(2):
        traffic = Traffic()
        with traffic:
            for micro_step in range(2):
                model.set_requires_all_reduce(micro_step == 1)
                model.set_is_last_backward(micro_step == 1)
                model(x, x)[1].backward()
        model.zero_grad()

    sent: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for part in plan.collectives(c, gpus, shards, Step(rows=2, micro_steps=2, itemsize=itemsize)):
        sent[part.kind] += plan.sent_bytes(part)
        calls[part.kind] += part.count
    assert traffic.calls == calls
    assert traffic.sent == pytest.approx(sent, abs=calls.total())


# --- The simulator


@pytest.mark.parametrize(("blocks", "ahead"), [(1, 1), (5, 1), (5, 2), (5, 0)])
def test_simulated_step_in_closed_cases(blocks: int, ahead: int):
    def step(*seconds: float) -> float:
        return simulate.simulate_step(blocks, *seconds, ahead)

    assert step(2, 4, 0, 0) == 6 * blocks  # nothing to send
    assert step(0, 0, 3, 5) == 11 * blocks  # nothing to compute
    serial = blocks * (2 + 4 + 2 * 0.3 + 0.5)
    if ahead:  # all but the first gather and the last reduction is hidden
        assert step(2, 4, 0.3, 0.5) == pytest.approx(0.3 + 6 * blocks + 0.5)
        assert step(0.1, 0.2, 3, 5) >= 11 * blocks  # the link is never idle for long
    else:
        assert step(2, 4, 0.3, 0.5) == pytest.approx(serial)
    assert step(2, 4, 3, 5) <= blocks * (2 + 4 + 6 + 5)


def test_slowest_rank_is_slower_with_more_ranks():
    assert simulate.slowest_rank(100, 0.0) == 1
    assert simulate.slowest_rank(1, 0.02, steps=1000) == pytest.approx(1, abs=2e-3)
    slowest = simulate.slowest_rank(1000, 0.02, steps=100)
    assert slowest == pytest.approx(1 + 0.02 * 3.24, abs=2e-3)  # normal order statistics


@pytest.mark.parametrize("save", [5.0, 500.0])
def test_simulated_goodput_is_dalys(save: float):
    between, restart = 20_000.0, 300.0
    for interval in (500.0, 2000.0, 8000.0):
        simulated = simulate.simulate_run(interval, save, restart, between, failures=20_000)
        assert simulated == pytest.approx(simulate.expected_goodput(interval, save, restart, between), rel=0.01)
    assert simulate.simulate_run(1000, save, restart, 1e12, failures=5) == pytest.approx(1000 / (1000 + save), rel=1e-4)
    assert simulate.simulate_run(1e9, save, restart, between, failures=100) == 0  # never saved in time


@pytest.mark.parametrize("save", [1.0, 200.0])
def test_best_interval_is_youngs_and_dalys(save: float):
    between = 176_000.0  # 1,024 GPUs, 50,000 GPU hours per failure
    intervals = [save * 1.01**k for k in range(1200)]
    best = max(intervals, key=lambda s: simulate.expected_goodput(s, save, 300, between))
    assert simulate.daly(save, between) == pytest.approx(best, rel=0.02)
    assert simulate.young(save, between) == pytest.approx(best, rel=0.03)
    by_simulation = max(intervals[::20], key=lambda s: simulate.simulate_run(s, save, 300, between, 1000))
    goodput = [simulate.expected_goodput(s, save, 300, between) for s in (best, by_simulation)]
    assert goodput[1] == pytest.approx(goodput[0], rel=0.003)


@pytest.mark.parametrize("name", tables.TABLES)
def test_tables_are_current(name: str):
    page = tables.DOCS.read_text(encoding="utf-8")
    table = tables.begin(name) + tables.TABLES[name]() + tables.END
    assert table in page, "run `python runs/cluster_plan/tables.py --write`"
