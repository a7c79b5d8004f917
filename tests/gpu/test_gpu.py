"""Checks that need a CUDA GPU: `make test-gpu`, under four minutes. All are skipped without one."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, assert_same_checkpoint, environment, flags, metrics

import nanogpt.compile
from bench import BenchConfig, open_model, open_our_steps
from configurator import parse
from load import build_model
from model import GPT, GPTConfig
from nanogpt import distributed
from nanogpt.compile import compile_model
from nanogpt.data.rows import EvalWindows
from nanogpt.distributed import World
from nanogpt.evaluation import evaluate
from nanogpt.generate.decoder import Decoder
from nanogpt.memory import estimate_training_memory, pick_micro_batch
from nanogpt.optim import Optimizer
from nanogpt.sharding import make_mesh
from nanogpt.timing import time_steps

DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")

SIZES: dict[str, Any] = {"n_layer": 2, "n_head": 4, "n_embd": 256, "block_size": 128, "batch_size": 8, "bias": False}
GPT2 = {"arch": "gpt2", "optimizer": "adamw"}
MODERN = {"arch": "modern", "optimizer": "muon", "n_kv_head": 2}
SOFT = MODERN | {"ngram_targets": 3, "look_back": True}
# train.py with a tiny GPU run's keys, in a process of its own.
TRAIN = {"device": DEVICE, "bias": False, "max_iters": 12, "lr_decay_iters": 12, "eval_interval": 5}


@pytest.fixture(autouse=True)
def full_float32_precision() -> Iterator[None]:
    """Undo the TensorFloat-32 products of `distributed.start`."""
    yield
    torch.set_float32_matmul_precision("highest")


def make_config(**keys: Any) -> BenchConfig:
    base = SIZES | {"gradient_accumulation_steps": 2, "learning_rate": 1e-3, "device": DEVICE}
    config, _ = parse(BenchConfig, flags(**base | keys))
    return config


def losses(**keys: Any) -> list[float]:
    """Losses of the first 20 training steps."""
    world, _, steps = open_our_steps(make_config(**keys), {})
    return time_steps(steps, 21, world)[1]


def make_model(arch: str, **keys: Any) -> GPT:
    torch.manual_seed(1)
    return GPT(
        GPTConfig(arch=arch, n_layer=2, n_head=4, n_embd=128, block_size=128, vocab_size=500, bias=False, **keys)
    )


def gradients(model: GPT) -> torch.Tensor:
    return torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None])


def run_script(script: str, folder: Path, *words: str, **keys: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *words, str(ROOT / script), *flags(**keys)]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=200)


def run_train(folder: Path, *words: str, **keys: Any) -> None:
    done = run_script("train.py", folder, *words, **TRAIN | keys)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("arch", "is_soft"), [("gpt2", False), ("modern", False), ("modern", True)])
def test_network_on_gpu_matches_cpu(arch: str, is_soft: bool):
    ids = torch.randint(500, (4, 128))
    soft_targets = torch.randint(500, (4, 128, 8)), torch.rand(4, 128, 8)
    results = []
    for device in ("cpu", DEVICE):
        model = make_model(arch).to(device)
        soft = [t.to(device) for t in soft_targets] if is_soft else None
        logits, loss = model(ids.to(device), ids.to(device), soft)
        loss.backward()
        results.append((logits.detach().cpu(), gradients(model)))
    for cpu, gpu in zip(*results, strict=True):
        assert (cpu - gpu).abs().max() < 1e-4 * cpu.abs().max()


@pytest.mark.parametrize("keys", [GPT2, MODERN, SOFT], ids=["gpt2", "modern", "soft targets"])
def test_compiled_steps_match_eager(letters: Path, keys: dict[str, Any]):
    eager = losses(dataset=letters, **keys)
    assert eager[-1] < 0.9 * eager[0]  # it learns, so that an error would show
    assert losses(dataset=letters, compile=True, **keys) == pytest.approx(eager, rel=1e-3)


@pytest.mark.parametrize("recipe", [GPT2, SOFT], ids=["gpt2", "soft targets"])
def test_cuda_graph_matches_single_kernels(letters: Path, monkeypatch: pytest.MonkeyPatch, recipe: dict[str, Any]):
    modes = []
    original = torch.compile

    def record_mode(*args: Any, **keys: Any) -> Any:
        modes.append(keys.get("mode"))
        return original(*args, **keys)

    monkeypatch.setattr(torch, "compile", record_mode)
    keys = recipe | {"dataset": letters, "compile": True, "gradient_accumulation_steps": 1, "dropout": 0.1}
    graph = losses(**keys)
    monkeypatch.setattr(nanogpt.compile, "CUDA_GRAPH_FLOPS", 0.0)
    kernels = losses(**keys)
    assert modes == ["reduce-overhead", None]
    assert graph == pytest.approx(kernels, rel=1e-3)


def test_evaluation_by_cuda_graph_matches_eager():
    world = World(0, 1, torch.device(DEVICE), torch.float32)
    model = make_model("modern").to(DEVICE)
    ids = torch.randint(500, (4, 128), device=DEVICE)
    compiled = compile_model(model, world, (ids, ids, None), is_whole_step=True)
    assert compiled is not model
    windows = EvalWindows(np.random.default_rng(0).integers(500, size=3000), 128, 0, 1, vocab_size=500)
    expected = evaluate(model, windows, 4, world)
    assert evaluate(compiled, windows, 4, world) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_loss_is_close_to_float32(letters: Path, dtype: str):
    assert losses(dataset=letters, dtype=dtype) == pytest.approx(losses(dataset=letters), rel=2e-2)


@pytest.mark.parametrize(
    "keys",
    [GPT2, MODERN, SOFT, {"dtype": "float16"}, {"skip_spikes": 5.0, "dropout": 0.1}, SOFT | {"compile": True}],
    ids=["adamw", "muon", "soft targets", "float16", "spikes", "compiled"],
)
def test_step_never_waits_for_the_gpu(letters: Path, keys: dict[str, Any]):
    world, _, steps = open_our_steps(make_config(dataset=letters, **keys), {})
    time_steps(steps, 3, world)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            next(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_flex_attention_matches_sdpa_for_document_masks():
    ids = torch.randint(500, (4, 128), device=DEVICE)
    ids[torch.rand(ids.shape, device=DEVICE) < 0.05] = 3
    results = []
    for compiled in (False, True):  # FlexAttention runs only when compiled
        model = make_model("modern").to(DEVICE)
        model.document_separator_id = 3
        logits, loss = (torch.compile(model) if compiled else model)(ids, ids)
        loss.backward()
        results.append((logits.detach().cpu(), gradients(model)))
    for sdpa, flex in zip(*results, strict=True):
        assert (sdpa - flex).abs().max() < 1e-2 * sdpa.abs().max()


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_optimizer_matches_torch(kind: str):
    model = make_model("modern").to(DEVICE)
    world = World(0, 1, torch.device(DEVICE), torch.float32)
    ours = Optimizer(model, world, kind=kind, learning_rate=0.01, weight_decay=0.1)
    weight = model.get_parameter("blocks.0.mlp.up.weight")
    start = weight.detach().clone()
    twin = weight.detach().clone().requires_grad_()
    theirs: torch.optim.Optimizer
    if kind == "muon":
        theirs = torch.optim.Muon([twin], lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    else:
        theirs = torch.optim.AdamW([twin], lr=0.01, weight_decay=0.1, betas=(0.9, 0.95), foreach=False, fused=False)
    one = torch.ones((), device=DEVICE)
    for _ in range(10):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        assert weight.grad is not None
        twin.grad = weight.grad.clone()
        ours.step(1.0, one, 0 * one)
        theirs.step()
    tolerance = 0.05 if kind == "muon" else 1e-4  # torch's Muon multiplies in bfloat16
    assert (weight - twin).abs().max() < tolerance * (weight - start).abs().max()


@pytest.mark.parametrize("arch", ["gpt2", "modern"])
def test_decode_graph_matches_eager(arch: str):
    model = make_model(arch).to(DEVICE).eval()
    texts = [[1, 2, 3], [4], [5] * 100]
    eager = Decoder(model, rows=3)
    graph = Decoder(model, rows=3, compiled=True)
    expected = eager.prefill(texts)
    actual = graph.prefill(texts)
    for _ in range(40):  # past the end of the third text's window
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
        ids = expected.argmax(-1).cpu()
        expected = eager.decode_step(ids)
        actual = graph.decode_step(ids)


def test_peak_memory_is_near_the_estimate(letters: Path):
    for keys in (GPT2, MODERN):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        config = make_config(dataset=letters, block_size=512, batch_size=32, n_layer=6, **keys)
        world, model_config, steps = open_our_steps(config, {})
        time_steps(steps, 2, world)
        peak = torch.cuda.max_memory_allocated() - before
        with torch.device("meta"):
            model = GPT(model_config)
        assert 0.5 < peak / estimate_training_memory(model, config.optimizer, 32, 512, world.dtype) < 1.2
        del steps


def test_auto_micro_batch_is_the_largest_that_fits(letters: Path):
    config = make_config(dataset=letters, batch_size=4096)
    world = distributed.start(DEVICE, "float32")
    model = open_model(config, {}, World(0, 1, torch.device(DEVICE), torch.float32)).to(DEVICE)
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_reserved() + 2**30  # bytes
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    try:
        sizes = [4096 >> k for k in range(13)]
        rows = pick_micro_batch(model, "adamw", sizes, world)
        assert 1 < rows < 4096
        assert pick_micro_batch(model, "adamw", [2 * rows, 1], world) == 1
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


def test_out_of_memory_is_a_usage_error_that_names_the_flag(letters: Path, tmp_path: Path):
    keys = {"n_embd": 1024, "block_size": 1024, "batch_size": 50_000}  # 200 GB after the embedding alone
    done = run_script("train.py", tmp_path, **TRAIN | keys, dataset=letters)
    assert done.returncode == 2, done.stderr
    assert "--micro_batch_size=25000" in done.stderr
    assert "Traceback" not in done.stderr


def test_deterministic_resume_is_bit_exact(letters: Path, tmp_path: Path):
    keys = SOFT | {"dataset": letters, "dropout": 0.1, "deterministic": True}
    run_train(tmp_path, out_dir="whole", **keys)
    run_train(tmp_path, out_dir="cut", **keys | {"max_iters": 5})
    run_train(tmp_path, out_dir="cut", **keys | {"resume": True})
    assert metrics(tmp_path / "whole", "step", "loss") == metrics(tmp_path / "cut", "step", "loss")
    assert_same_checkpoint(tmp_path / "whole", tmp_path / "cut", 12)


def test_bench_measures_a_gpu(tmp_path: Path):
    done = run_script("bench.py", tmp_path, device=DEVICE, vocab_size=50, steps=3, compile=True, to="bench.json")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert 0 < row["quartiles_ms"][0] <= row["ms"] < 1000 * row["first_step_s"]
    assert row["memory"] > 16 * row["parameters"]  # weights, gradients and AdamW's state


@two_gpus
@pytest.mark.parametrize("keys", [GPT2, SOFT, MODERN | {"shards": 2}], ids=["gpt2", "soft targets", "sharded"])
def test_two_nccl_ranks_match_one_process(letters: Path, tmp_path: Path, keys: dict[str, Any]):
    keys = keys | {"dataset": letters, "gradient_accumulation_steps": 4}
    run_train(tmp_path, out_dir="one", **keys | {"shards": 1})
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    run_train(tmp_path, *launcher, out_dir="two", **keys | {"backend": "nccl"})
    one, two = (dict(metrics(tmp_path / name, "step", "loss")) for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-3)


@pytest.fixture
def mesh() -> Iterator[Any]:
    """Of this process alone, whose one part is the whole."""
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield make_mesh(DEVICE, 1, 1)
    dist.destroy_process_group()


@pytest.mark.parametrize("keys", [GPT2, MODERN], ids=["gpt2", "modern"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_sharded_gpu_matches_a_plain_one(mesh: Any, keys: dict[str, Any], compiled: bool, dtype: torch.dtype):
    plain = make_model(keys["arch"]).to(DEVICE)
    tensors = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    ids = torch.randint(plain.config.vocab_size, (4, plain.config.block_size), device=DEVICE)
    runs = []
    for world in (World(0, 1, torch.device(DEVICE), dtype, mesh=mesh), World(0, 1, torch.device(DEVICE), dtype)):
        model = build_model(plain.config, tensors, world) if world.mesh else plain
        trained = compile_model(model, world, [ids, ids, None], is_whole_step=False) if compiled else model
        optimizer = Optimizer(model, world, kind=keys["optimizer"], learning_rate=1e-2)
        runs.append([])
        for _ in range(8):
            with world.autocast():
                loss = trained(ids, ids)[1]
            loss.backward()
            one = torch.ones((), device=DEVICE)
            optimizer.step(1.0, one, 0 * one)
            optimizer.zero_grad()
            runs[-1].append(loss.item())
    assert runs[1][-1] < runs[1][0]  # it learns
    assert runs[0] == pytest.approx(runs[1], rel=1e-4 if dtype == torch.float32 else 2e-2)
