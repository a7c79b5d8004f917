"""bench.py: its step is train.py's, its numbers fit together, and it measures a nanoGPT-like checkout beside."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Run, flags, metrics

import bench
from nanogpt import data, distributed, run_script

OTHER = '''
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
    """A bigram model that counts its calls: enough to be measured."""

    calls = 0

    def __init__(self, config):
        super().__init__()
        self.table = torch.nn.Embedding(config.vocab_size, config.vocab_size)

    def forward(self, idx, targets):
        GPT.calls += 1
        assert not torch.is_autocast_enabled("cpu")
        logits = self.table(idx)
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        print("chatter")
        assert (weight_decay, betas, device_type) == (0.1, (0.9, 0.95), "cpu")
        return torch.optim.SGD(self.parameters(), lr=learning_rate)
'''


@pytest.fixture
def benched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`benched(key=value …)`: what bench.py prints of a tiny model, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run_bench(**keys: object) -> str:
        monkeypatch.setattr(sys, "argv", ["bench.py", *flags(**{"warmup": 2, "steps": 3} | keys)])
        capsys.readouterr()
        bench.main()
        return capsys.readouterr().out

    return run_bench


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_step_is_that_of_train(run: Run, letters: Path, dtype: str):
    keys = {"dtype": dtype, "dropout": 0.2, "gradient_accumulation_steps": 3, "eval_interval": 100}
    assert run(out_dir="run", max_iters=8, lr_decay_iters=8, **keys) == 0
    config, given = bench.parse(bench.BenchConfig, flags(dataset=letters, max_iters=8, lr_decay_iters=8, **keys))
    world = distributed.start("cpu", dtype)
    distributed.seed(config.seed, config.deterministic)
    model, tokens = bench.open_model_and_tokens(config, given)
    side = bench.Side("ours", bench.our_steps(config, model, tokens, world))
    bench.take_turn(side, 9, world)
    assert list(enumerate(side.losses, 1)) == metrics("run", "step", "loss")


def test_numbers_fit_together(benched: Callable[..., str]):
    out = benched(gradient_accumulation_steps=2, vocab_size=100, profile=True)
    assert "a step is 2 × 4 rows of 16 = 128 tokens of random ids" in out
    assert f"cpu ({torch.get_num_threads()} threads), float32, eager, torch {torch.__version__}" in out
    row = re.search(r"^ours +([\d.]+) +([\d.]+) to ([\d.]+) +([\d,]+) +– +\S+ \w?B +([\d.]+)$", out, re.MULTILINE)
    assert row
    middle, low, high, rate, loss = (float(cell.replace(",", "")) for cell in row.groups())
    assert 0 < low <= middle <= high
    assert rate == pytest.approx(128 / middle * 1000, rel=0.01)
    assert loss == pytest.approx(np.log(100), rel=0.1)  # random ids teach nothing
    names = {event.get("name") for event in json.loads(Path("trace.json").read_text())["traceEvents"]}
    assert "aten::cross_entropy_loss" in names


def test_synthetic_rows_are_seeded_and_fit_the_model(letters: Path):
    config, given = bench.parse(bench.BenchConfig, flags(vocab_size=70_000))
    model, tokens = bench.open_model_and_tokens(config, given)
    assert tokens.dtype == data.token_dtype(70_000)
    assert 65_536 < tokens.max() < model.config.vocab_size == 70_000
    assert np.array_equal(tokens, bench.open_model_and_tokens(config, given)[1])
    config, given = bench.parse(bench.BenchConfig, flags(dataset=letters))
    model, tokens = bench.open_model_and_tokens(config, given)
    assert model.config.vocab_size == 4
    assert np.array_equal(tokens, np.fromfile(letters / "train.bin", "<u2"))


def test_a_reference_is_measured_in_turns(benched: Callable[..., str], letters: Path, tmp_path: Path):
    (tmp_path / "model.py").write_text(OTHER)
    out = benched(reference=tmp_path, dataset=letters, steps=10, gradient_accumulation_steps=2, dtype="bfloat16")
    assert "chatter" not in out
    ratio = r"same model, same batch: ours is ([\d.]+) times as fast \(median of 2 rounds of 5 steps each; quartiles "
    assert float(re.search(ratio, out)[1]) > 0  # type: ignore[index]
    assert sys.modules["reference_model"].GPT.calls == 2 * (2 + 10)


@pytest.mark.parametrize("content", [None, "x = 1", "raise SystemError"])
def test_what_is_no_checkout_is_refused(
    benched: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None
):
    if content:
        (tmp_path / "model.py").write_text(content)
    with pytest.raises(SystemExit) as stop:
        run_script(lambda: len(benched(reference=tmp_path)))
    assert stop.value.code == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"error: reference=.*model\.py.*; give the path of a nanoGPT checkout\n", error)
