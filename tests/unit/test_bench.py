"""bench.py: its step is train.py's, its numbers fit together, and it measures a nanoGPT-like checkout beside."""

import json
import multiprocessing
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run, flags, metrics

import bench
from model import GPT, GPTConfig
from nanogpt import distributed
from nanogpt.console import format_bytes
from nanogpt.data.dataset import token_dtype
from nanogpt.device import seed_everything
from nanogpt.errors import run_script

OTHER = '''
import ctypes
import os
from dataclasses import dataclass

import torch


@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool


class GPT(torch.nn.Module):
    """A bigram model that notes its calls, and whether a large block of memory is mapped: enough to be measured."""

    def __init__(self, config):
        super().__init__()
        self.table = torch.nn.Embedding(config.vocab_size, config.vocab_size)

    def forward(self, idx, targets):
        assert not torch.is_autocast_enabled("cpu")
        if os.path.exists("die"):
            os._exit(7)
        library = ctypes.CDLL(None)
        library.malloc.restype, library.free.argtypes = ctypes.c_size_t, [ctypes.c_void_p]
        block = library.malloc(ctypes.c_size_t(2**26))
        with open("calls", "a") as file:
            print(block % 4096 == 16, file=file)  # where glibc's header ends in a mapping of its own
        library.free(block)
        logits = self.table(idx)
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        print("chatter")
        assert (weight_decay, betas, device_type) == (0.1, (0.9, 0.95), "cpu")
        return Still()


class Still:
    """An optimizer that changes nothing; torch's own take seconds to import."""

    def step(self):
        pass

    def zero_grad(self, set_to_none):
        pass
'''


@pytest.fixture
def benched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`benched(key=value …)`: what bench.py and its processes print of a tiny model, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.py").write_text(OTHER)

    def run_bench(**keys: object) -> str:
        monkeypatch.setattr(sys, "argv", ["bench.py", *flags(**{"warmup": 2, "steps": 3, "vocab_size": 50} | keys)])
        capfd.readouterr()
        bench.main()
        return capfd.readouterr().out

    return run_bench


@pytest.fixture
def fault(benched: Callable[..., str], capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`fault(key=value …)`: what a user is told who gives bench.py these keys, status 2 being checked."""

    def run_bench(**keys: object) -> str:
        with pytest.raises(SystemExit) as stop:
            run_script(lambda: len(benched(**keys)))
        assert stop.value.code == 2
        return capfd.readouterr().err

    return run_bench


@pytest.fixture
def known_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is not measured, which takes seconds."""
    monkeypatch.setattr(bench, "product_flops", lambda world: 1e9)


def picked(**keys: Any) -> dict[str, bench.BenchConfig]:
    return bench.pick_recipes(
        *bench.parse(bench.BenchConfig, [f"--{k}={v}" for k, v in keys.items()]), torch.device("cpu")
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_step_is_that_of_train(run: Run, letters: Path, dtype: str):
    keys = {"dtype": dtype, "dropout": 0.2, "gradient_accumulation_steps": 3, "eval_interval": 100}
    assert run(out_dir="run", max_iters=8, lr_decay_iters=8, **keys) == 0
    config, given = bench.parse(bench.BenchConfig, flags(dataset=letters, max_iters=8, lr_decay_iters=8, **keys))
    world = distributed.start("cpu", dtype)
    seed_everything(config.seed, config.deterministic)
    model = bench.open_model(config, given)
    tokens = bench.open_tokens(config, model.config)
    _, losses = bench.take_turn(bench.training_steps(config, model, tokens, world), 9, world)
    assert list(enumerate(losses, 1)) == metrics("run", "step", "loss")


def test_numbers_fit_together(benched: Callable[..., str]):
    out = benched(gradient_accumulation_steps=2, vocab_size=100, profile=True, to="figures.json")
    assert "a step is 2 × 4 rows of 16 = 128 tokens of random ids" in out
    machine = rf"cpu \({torch.get_num_threads()} threads\), float32, eager, torch {re.escape(torch.__version__)}"
    peak = float(re.search(rf"^{machine}; matrix products reach ([\d.e-]+) TFLOP/s$", out, re.MULTILINE)[1])  # type: ignore[index]
    cells = r"([\d,]+) +([\d.]+) +([\d.]+) to ([\d.]+) +([\d,]+) +([\d.]+)% +– +(\S+ \w?B) +([\d.]+) s +([\d.]+)"
    row = re.search(rf"^ours +{cells}$", out, re.MULTILINE)
    assert row
    parameters, middle, low, high, rate, share, memory, first_s, loss = row.groups()
    model = GPT(GPTConfig(vocab_size=100, block_size=16, n_layer=1, n_head=2, n_embd=16))
    assert int(parameters.replace(",", "")) == model.count_parameters()
    assert 0 < float(low) <= float(middle) <= float(high) < 1000 * float(first_s)
    assert float(rate.replace(",", "")) == pytest.approx(128 / float(middle) * 1000, rel=0.01)
    assert float(share) / 100 * peak * 1e12 == pytest.approx(
        model.flops_per_token() * float(rate.replace(",", "")),
        rel=0.02,
        abs=6e-4 * peak * 1e12,  # a digit is told
    )
    assert float(loss) == pytest.approx(np.log(100), rel=0.1)  # random ids teach nothing
    names = {event.get("name") for event in json.loads(Path("trace.json").read_text())["traceEvents"]}
    assert "aten::cross_entropy_loss" in names

    figures = json.loads(Path("figures.json").read_text())
    (line,) = figures["rows"]
    assert "--profile=True" in figures["command"]
    assert f"{figures['product_flops'] / 1e12:.3g}" == f"{peak:.3g}"
    assert [f"{ms:.2f}" for ms in (line["ms"], *line["quartiles_ms"])] == [middle, low, high]
    assert (f"{line['last_loss']:.4f}", f"{line['first_step_s']:.1f}") == (loss, first_s)
    assert (format_bytes(line["memory"]), line["mfu"], line["side"]) == (memory, None, "ours")
    assert np.median(line["seconds"]) * 1000 == pytest.approx(line["ms"])


def test_synthetic_rows_are_seeded_and_fit_the_model(letters: Path):
    config, given = bench.parse(bench.BenchConfig, flags(vocab_size=70_000))
    shape = bench.open_model(config, given).config
    tokens = bench.open_tokens(config, shape)[:]
    assert tokens.dtype == token_dtype(70_000)
    assert 65_536 < tokens.max() < shape.vocab_size == 70_000
    assert np.array_equal(tokens, bench.open_tokens(config, shape)[:])
    config, given = bench.parse(bench.BenchConfig, flags(dataset=letters))
    shape = bench.open_model(config, given).config
    assert shape.vocab_size == 4
    assert np.array_equal(bench.open_tokens(config, shape)[:], np.fromfile(letters / "train.bin", "<u2"))


def test_a_table_beside_a_reference(benched: Callable[..., str], known_peak: None, monkeypatch: pytest.MonkeyPatch):
    rows: dict[str, dict[str, Any]] = {
        "tiny": {"steps": 10},
        "tiny, of nowhere": {"dataset": "nowhere"},
        "modern, tiny": {"arch": "modern", "optimizer": "muon", "steps": 2},
        "large": {"n_layer": 1000},
    }
    monkeypatch.setattr(bench, "ROWS", {"cpu": rows})
    keys = {"table": True, "only": "Tiny", "reference": "other", "to": "figures.json", "dtype": "bfloat16"}
    out = benched(**keys, steps=..., gradient_accumulation_steps=2, bias=...)
    assert "chatter" not in out
    assert [line[:9] for line in out.splitlines()[3:]] == [
        *("tiny     ", "  nanoGPT", "  same mo", "tiny, of ", "modern, t", "of peak: ", "memory: t", "nanoGPT c")
    ]
    ratio = (
        r"ours is (\S+) times as fast \(median of 2 rounds of 5 steps each; quartiles .*\), in (\S+) of the memory\n"
    )
    shares = re.search(ratio, out)
    assert shares
    figures = json.loads(Path("figures.json").read_text())
    ours, theirs, fault, modern = figures["rows"]
    assert [np.shape(line["seconds"]) for line in (ours, theirs, modern)] == [(2, 5), (2, 5), (1, 2)]
    assert "there is no dataset 'nowhere'" in fault["error"]
    middle = np.median(np.median(theirs["seconds"], 1) / np.median(ours["seconds"], 1))
    assert shares.groups() == (f"{middle:.2f}", f"{ours['memory'] / theirs['memory']:.2f}")
    calls = Path("calls").read_text().split()
    assert len(calls) == 2 * (2 + 10)
    if platform.libc_ver()[0] == "glibc":
        assert set(calls) == {"True"}  # our lever, which keeps freed memory, is not its


def test_flags_win_over_the_rows_of_the_table():
    plain, modern = (picked(table=True, only=name) for name in ("124M", "modern"))
    assert [(c.n_layer, c.batch_size, c.block_size) for c in plain.values()] == [(12, 4, 256)]
    assert [(c.arch, c.batch_size, c.steps) for c in modern.values()] == [("modern", 24, 50)]
    for recipe in picked(table=True, batch_size=3, steps=20, reference="other").values():
        assert (recipe.batch_size, recipe.steps) == (3, 20)  # though 20 is the default
        assert recipe.reference == ("other" if recipe.arch == "gpt2" else "")


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_models_of_the_tables_are_of_the_sizes_in_their_names(kind: str):
    config, given = bench.parse(bench.BenchConfig, ["--table=True"])
    for name, recipe in bench.pick_recipes(config, given, torch.device(kind)).items():
        sizes = {key: getattr(recipe, key) for key in bench.MODEL_KEYS}
        with torch.device("meta"):
            model = GPT(GPTConfig(vocab_size=recipe.vocab_size, **sizes))
        if millions := re.search(r"([\d.]+)M", name):
            assert model.count_parameters() / 1e6 == pytest.approx(float(millions[1]), rel=0.05)
        if rows := re.search(r"(\d+) × (\d+)", name):
            assert (recipe.rows_per_step, recipe.block_size) == tuple(map(int, rows.groups()))
        elif "half a million" in name:
            assert recipe.rows_per_step * recipe.block_size == 2**19


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"only": "tiny"}, "only=tiny: .* add --table=True"),
        ({"table": True, "only": "huge"}, "only=huge: .*; there are: .*GPT-2 124M.*"),
        ({"table": True, "profile": True}, "table=True: --profile .*"),
        ({"reference": "other", "optimizer": "muon"}, "reference=other: nanoGPT has no .*optimizer=muon.*"),
        ({"to": "nowhere/figures.json"}, "to=nowhere/figures.json: cannot be written .*"),
        ({"n_head": 3}, "n_embd=16 is not divisible by n_head=3: .*"),
    ],
)
def test_contradictions_are_told_before_anything_starts(fault: Callable[..., str], keys: dict[str, Any], told: str):
    assert re.fullmatch(f"error: {told}\n", fault(**keys))


@pytest.mark.parametrize("content", [None, "x = 1", "raise SystemError"])
def test_what_is_no_checkout_is_refused(fault: Callable[..., str], content: str | None):
    Path("other/model.py").unlink()
    if content:
        Path("other/model.py").write_text(content)
    told = fault(reference="other")
    assert re.fullmatch(r"error: reference=.*model\.py.*; give the path of a nanoGPT checkout\n", told)


def test_what_a_side_finds_wrong_is_told_in_a_line(fault: Callable[..., str], known_peak: None):
    told = fault(dataset="nowhere")
    assert re.fullmatch(r"error: there is no dataset 'nowhere'.*\nerror: to measure on random ids .*\n", told)
    assert not multiprocessing.active_children()


def test_a_side_that_dies_is_told_of(fault: Callable[..., str], known_peak: None):
    Path("die").touch()
    assert fault(reference="other") == "error: nanoGPT: the process died with exit code 7: its last words stand above\n"
    assert not multiprocessing.active_children()


def test_a_ctrl_c_ends_the_sides(benched: Callable[..., str], known_peak: None, monkeypatch: pytest.MonkeyPatch):
    def interrupt(side: bench.Side, count: int | None = None) -> None:
        assert multiprocessing.active_children()
        raise KeyboardInterrupt

    monkeypatch.setattr(bench.Side, "ask", interrupt)
    with pytest.raises(KeyboardInterrupt):
        benched()
    assert not multiprocessing.active_children()
