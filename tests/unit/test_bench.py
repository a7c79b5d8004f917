"""bench.py: its step is train.py's, its numbers are consistent, and it measures a nanoGPT-like checkout too."""

import json
import multiprocessing
import os
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run, call_main, flags, metrics

import bench
from bench import BenchConfig, open_our_steps, open_tokens, pick_recipes
from configurator import parse
from load import new_model_config
from model import GPT, GPTConfig
from nanogpt import timing
from nanogpt.console import format_bytes
from nanogpt.data.dataset import dtype_for
from nanogpt.errors import InputError, run_script
from nanogpt.timing import Worker, time_steps

CHECKOUT = '''
import ctypes
from dataclasses import make_dataclass
from types import SimpleNamespace

import torch

GPTConfig = make_dataclass("GPTConfig", "block_size vocab_size n_layer n_head n_embd dropout bias".split())


class GPT(torch.nn.Module):
    """A bigram model that logs its calls, and whether a large block of memory is a mapping of its own."""

    def __init__(self, config):
        super().__init__()
        self.table = torch.nn.Embedding(config.vocab_size, config.vocab_size)

    def forward(self, idx, targets):
        assert not torch.is_autocast_enabled("cpu")
        library = ctypes.CDLL(None)
        library.malloc.restype = ctypes.c_size_t
        library.free.argtypes = [ctypes.c_void_p]
        block = library.malloc(ctypes.c_size_t(2**26))
        with open("calls", "a") as file:
            print(block % 4096 == 16, file=file)  # the size of glibc's header
        library.free(block)
        logits = self.table(idx)
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        print("chatter")
        assert (weight_decay, betas, device_type) == (0.1, (0.9, 0.95), "cpu")
        # torch's own optimizers take seconds to import
        return SimpleNamespace(step=lambda: None, zero_grad=lambda set_to_none: None)
'''
Bench = Callable[..., str]


@pytest.fixture
def run_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Bench:
    """`run_bench(key=value …)`: the output of bench.py on a tiny model, in a folder with a `checkout`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "checkout").mkdir()
    (tmp_path / "checkout" / "model.py").write_text(CHECKOUT)

    def run(**keys: object) -> str:
        capfd.readouterr()
        call_main(bench.main, *flags(**{"warmup": 2, "steps": 3, "vocab_size": 50} | keys))
        return capfd.readouterr().out

    return run


@pytest.fixture
def bench_error(run_bench: Bench, capfd: pytest.CaptureFixture[str]) -> Bench:
    """`bench_error(key=value …)`: the error message of a bench.py that exits with status 2."""

    def run(**keys: object) -> str:
        with pytest.raises(SystemExit) as stop:
            run_script(lambda: len(run_bench(**keys)))
        assert stop.value.code == 2
        assert not multiprocessing.active_children()
        return capfd.readouterr().err

    return run


@pytest.fixture
def known_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips measuring the device, which takes seconds."""
    monkeypatch.setattr(bench, "measure_matmul_flops", lambda world: 1e9)


def recipes(device: str = "cpu", **keys: Any) -> dict[str, BenchConfig]:
    config, explicit = parse(BenchConfig, [f"--{name}={value}" for name, value in keys.items()])
    return pick_recipes(config, explicit, torch.device(device))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_our_steps_are_those_of_train(run: Run, letters: Path, dtype: str):
    keys = {"dtype": dtype, "dropout": 0.2, "gradient_accumulation_steps": 3, "eval_interval": 100}
    keys |= {"max_iters": 8, "lr_decay_iters": 8}
    assert run(out_dir="run", **keys) == 0
    world, _, steps = open_our_steps(*parse(BenchConfig, flags(dataset=letters, **keys)))
    _, losses = time_steps(steps, 9, world)
    assert list(enumerate(losses, 1)) == metrics("run", "step", "loss")


def test_numbers_are_consistent(run_bench: Bench, monkeypatch: pytest.MonkeyPatch):
    time_products = timing._time_products
    monkeypatch.setattr(timing, "_time_products", lambda _, *rest: time_products(256, *rest))  # large ones take seconds
    out = run_bench(gradient_accumulation_steps=2, vocab_size=100, profile=True, to="report.json")
    assert "a step: 2 × 4 rows of 16 = 128 tokens of random ids" in out
    report = json.loads(Path("report.json").read_text())
    (row,) = report["rows"]
    machine = f"cpu ({torch.get_num_threads()} threads), eager, torch {torch.__version__}"
    peak = report["product_flops"]["float32"]
    assert out.startswith(f"{machine}; matrix products reach {peak / 1e12:.3g} TFLOP/s in float32\n")
    assert "--profile=True" in report["command"]
    times = [row["ms"], *row["quartiles_ms"]]
    cells = [f"{row['parameters']:,}", "float32", f"{times[0]:.2f}", f"{times[1]:.2f} to {times[2]:.2f}"]
    cells += [f"{row['tokens_per_s']:,.0f}", f"{100 * row['of_peak']:.1f}%", "–", format_bytes(row["memory"])]
    cells += [f"{row['first_step_s']:.1f} s", f"{row['last_loss']:.4f}"]
    assert re.search(rf"^ours +{' +'.join(map(re.escape, cells))}$", out, re.MULTILINE)

    model = GPT(GPTConfig(vocab_size=100, block_size=16, n_layer=1, n_head=2, n_embd=16))
    assert row["parameters"] == model.count_parameters()
    assert times == pytest.approx((1000 * np.percentile(row["seconds"], [50, 25, 75])).tolist())
    assert times[2] < 1000 * row["first_step_s"]
    assert row["tokens_per_s"] == pytest.approx(128 / row["ms"] * 1000)
    assert row["of_peak"] * peak == pytest.approx(model.flops_per_token() * row["tokens_per_s"])
    assert row["last_loss"] == pytest.approx(np.log(100), rel=0.1)  # random ids teach nothing
    assert (np.shape(row["seconds"]), row["mfu"], row["side"]) == ((1, 3), None, "ours")
    events = json.loads(Path("trace.json").read_text())["traceEvents"]
    assert "aten::cross_entropy_loss" in {event.get("name") for event in events}


def test_random_ids_reach_the_end_of_the_vocabulary():
    config, _ = parse(BenchConfig, ["--n_layer=1", "--n_head=1", "--n_embd=1", "--block_size=16"])
    model_config = new_model_config(config, vocab_size=70_000)
    tokens = open_tokens(config, model_config)[:]
    assert tokens.dtype == dtype_for(70_000)
    assert 65_536 < tokens.max() < 70_000
    assert np.array_equal(tokens, open_tokens(config, model_config)[:])


def test_table_alternates_with_a_reference(run_bench: Bench, known_peak: None, monkeypatch: pytest.MonkeyPatch):
    table = {"tiny": "--steps=10", "tiny, without data": "--dataset=nowhere", "large": "--n_layer=1000"}
    monkeypatch.setattr(bench, "TABLES", {"cpu": table})
    keys = {"table": True, "only": "Tiny", "reference": "checkout", "to": "report.json", "dtype": "bfloat16"}
    out = run_bench(**keys, steps=..., gradient_accumulation_steps=2)
    assert "chatter" not in out
    report = json.loads(Path("report.json").read_text())
    ours, theirs, error = report["rows"]
    assert [row["side"] for row in report["rows"]] == ["ours", "nanoGPT", "ours"]
    assert np.shape(ours["seconds"]) == np.shape(theirs["seconds"]) == (2, 5)
    assert "nowhere" in error["error"]
    names = [line[:9] for line in out.splitlines()[3:7]]
    assert names == ["tiny     ", "  nanoGPT", "  same mo", "tiny, wit"]

    pattern = r"ours is (\S+) times as fast \(median of 2 rounds of 5 steps each; .*\), in (\S+) of the memory\n"
    printed = re.search(pattern, out)
    assert printed
    median = np.median(np.median(theirs["seconds"], 1) / np.median(ours["seconds"], 1))
    assert printed.groups() == (f"{median:.2f}", f"{ours['memory'] / theirs['memory']:.2f}")
    calls = Path("calls").read_text().split()
    assert len(calls) == 2 * (2 + 10)  # micro-batches, warmup and measured steps
    if platform.libc_ver()[0] == "glibc":
        assert set(calls) == {"True"}  # our setting of the C library is not nanoGPT's


def test_explicit_keys_override_the_table():
    for recipe in recipes(table=True, batch_size=3, steps=20, reference="checkout").values():
        assert (recipe.batch_size, recipe.steps) == (3, 20)  # though 20 is the default
        assert recipe.reference == ("checkout" if recipe.arch == "gpt2" else "")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_table_names_say_the_sizes(device: str):
    for name, recipe in recipes(device, table=True).items():
        with torch.device("meta"):
            model = GPT(new_model_config(recipe, recipe.vocab_size))
        if millions := re.search(r"([\d.]+)M", name):
            assert model.count_parameters() / 1e6 == pytest.approx(float(millions[1]), rel=0.05)
        if rows := re.search(r"(\d+) × (\d+)", name):
            assert (recipe.rows_per_step, recipe.block_size) == tuple(map(int, rows.groups()))
        elif "half a million" in name:
            assert recipe.rows_per_step * recipe.block_size == 2**19


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"only": "tiny"}, "--only=tiny: .* add --table=True"),
        ({"table": True, "only": "huge"}, "--only=huge: .* GPT-2 124M.*"),
        ({"table": True, "profile": True}, "--table=True: --profile .*"),
        ({"reference": "checkout", "optimizer": "muon"}, "--reference=checkout: nanoGPT has no optimizer=muon; .*"),
        ({"reference": "checkout", "arch": "modern", "bias": False}, ".* nanoGPT has no arch=modern; .*"),
        ({"reference": "checkout", "ngram_targets": 3}, ".* nanoGPT has no ngram_targets=3; .*"),
        ({"reference": "checkout", "mask_documents": True}, ".* nanoGPT has no mask_documents=True; .*"),
        ({"reference": "nowhere"}, "--reference=nowhere: .*"),
        ({"to": "nowhere/report.json"}, "--to=nowhere/report.json: .*"),
        ({"n_head": 3}, "n_embd=16 is not divisible by n_head=3: .*"),
    ],
)
def test_contradictions_are_reported_before_measuring(
    bench_error: Bench, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], message: str
):
    monkeypatch.setattr(bench, "measure_matmul_flops", None)
    assert re.fullmatch(f"error: {message}\n", bench_error(**keys))


@pytest.mark.parametrize("content", ["x = 1", "raise SystemError"])
def test_reference_must_be_like_nanogpt(bench_error: Bench, content: str):
    Path("checkout/model.py").write_text(content)
    assert bench_error(reference="checkout").startswith("error: --reference=checkout: ")


def test_death_of_a_worker_is_reported():
    with pytest.raises(InputError, match="ours: the process died with exit code 7"):
        Worker("ours", "", os._exit, 7)


def test_interrupt_ends_the_workers(run_bench: Bench, known_peak: None, monkeypatch: pytest.MonkeyPatch):
    def interrupt(worker: Worker, count: int, trace: str = "") -> None:
        assert multiprocessing.active_children()
        raise KeyboardInterrupt

    monkeypatch.setattr(Worker, "run", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_bench()
    assert not multiprocessing.active_children()
