"""The training loop: what a run does, from its settings to its end."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, Run, environment, flags, metrics, save_as_nanogpt, steps

import train
from configurator import parse
from load import open_data_and_model
from model import GPT, GPTConfig
from nanogpt import checkpoint, distributed
from nanogpt import metrics as metrics_module
from nanogpt.compile import compile_model
from nanogpt.console import format_duration
from nanogpt.data.dataset import open_dataset
from nanogpt.data.rows import EvalWindows, Rows
from nanogpt.distributed import World
from nanogpt.errors import InputError, RunStopped
from nanogpt.guard import UpdateGuard
from nanogpt.memory import estimate_training_memory, pick_micro_batch
from nanogpt.text.tokenizer import Tokenizer
from nanogpt.train_log import StepLogger
from train import TrainConfig


def losses(out_dir: str) -> list[float]:
    return [loss for (loss,) in metrics(out_dir, "loss")]


def learns(out_dir: str) -> bool:
    """Whether the validation loss ends below log 4 = 1.386, what not to know anything of four letters costs."""
    return metrics(out_dir, "val_loss")[-1][0] < 1.3


# ---- one function, however it is computed


def test_accumulation_is_a_larger_batch(run: Run):
    run(out_dir="at_once", batch_size=8, max_iters=30)
    run(out_dir="in_parts", batch_size=2, gradient_accumulation_steps=4, eval_iters=8, max_iters=30)
    assert learns("at_once")
    assert losses("in_parts") == pytest.approx(losses("at_once"), rel=1e-6)
    assert metrics("in_parts", "grad_norm")[-1] == pytest.approx(metrics("at_once", "grad_norm")[-1], rel=1e-4)
    for split in ("train_loss", "val_loss"):
        ours, theirs = (metrics(name, split)[-1][0] for name in ("in_parts", "at_once"))
        assert ours == pytest.approx(theirs, rel=1e-6)


def test_the_first_update_is_torch_s_own(run: Run, letters: Path):
    """One step, written out: the rows, the mean loss, the clipped gradient, the decayed and moved weights."""
    run(out_dir="out", max_iters=1, gradient_accumulation_steps=2, grad_clip=0.5, seed=7)
    torch.manual_seed(7)
    sizes = {name: TINY[name] for name in ("n_layer", "n_head", "n_embd", "block_size", "bias")}
    model = GPT(GPTConfig(vocab_size=4, **sizes))
    train_split = open_dataset(letters, block_size=16).train
    _, loss = model(*Rows(train_split, 16, 4, seed=7)[0:8])
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    assert norm > 0.5
    with torch.no_grad():
        for p in model.parameters():  # AdamW's first step, both moments corrected: the gradient's sign
            rate = 1e-2 / 3
            p.mul_(1 - rate * 0.1 * (p.dim() == 2)).sub_(rate * p.grad / (p.grad.abs() + 1e-8))
    assert metrics("out", "loss", "lr", "grad_norm")[0] == pytest.approx((loss.item(), 1e-2 / 3, norm.item()), rel=1e-5)
    saved = checkpoint.load(Path("out/ckpt/step-000001")).model
    for name, p in model.named_parameters():
        torch.testing.assert_close(saved[name], p.detach(), rtol=0, atol=2e-5)


def test_rows_per_step_grow_in_a_line(run: Run, monkeypatch: pytest.MonkeyPatch):
    """By hand: 12 rows of 16 tokens over the first 640 tokens, which are 40 rows, by multiples of 2."""
    read, original = [], Rows.__getitem__

    def spy(self: Rows, rows: slice) -> Any:
        read.append((rows.start, rows.stop))
        return original(self, rows)

    monkeypatch.setattr(Rows, "__getitem__", spy)
    keys = {"batch_size": 2, "gradient_accumulation_steps": 6, "batch_growth_tokens": 640, "eval_iters": 6}
    run(out_dir="out", max_iters=20, **keys)
    ends, samples = [], 0
    for _ in range(20):
        samples += 12 if samples >= 40 else max(12 * samples // 40 // 2, 1) * 2
        ends.append(samples)
    assert ends[:12] == [2, 4, 6, 8, 10, 12, 14, 18, 22, 28, 36, 46]
    assert metrics("out", "step", "tokens", "loss")[-1][:2] == (20, 16 * ends[-1])
    assert [tokens for (tokens, _) in metrics("out", "tokens", "lr")] == [16 * end for end in ends]
    assert [last for _, last in read if last in ends] == ends  # the rows follow one another, none left out
    assert [first for first, _ in read] == [0, *(last for _, last in read[:-1])]
    config = TrainConfig(block_size=16, **keys)
    assert [config.rows_in(steps) for steps in (0, 1, 12, 20)] == [0, 2, 46, ends[-1]]
    with pytest.raises(InputError, match="batch_growth_tokens: rows grow from batch_size to"):
        TrainConfig(gradient_accumulation_steps=1, batch_growth_tokens=640).check()
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InputError, match="batch_size=2 rows, which do not divide by 3 processes"):
        config.check()


def test_time_left_goes_by_rows_where_these_grow(capsys: pytest.CaptureFixture[str]):
    """20 steps of 2 to 12 rows, each row a second."""
    config = TrainConfig(
        max_iters=20, batch_size=2, gradient_accumulation_steps=6, batch_growth_tokens=640, block_size=16
    )
    model = SimpleNamespace(config=SimpleNamespace(block_size=16), flops_per_token=lambda: 1)
    world, clock = World(0, 1, torch.device("cpu"), torch.float32), SimpleNamespace(seconds=0.0)
    log, samples = StepLogger(config, model, world, None, clock, UpdateGuard(torch.device("cpu"), 1), 0, 0), 0
    for step in range(1, 13):
        samples += config.rows_at(samples)
        clock.seconds = float(samples)
        log.put(step, samples, torch.zeros(8))
        log.read()
    lines = capsys.readouterr().out.splitlines()
    rows = [config.rows_in(step) for step in (10, 20)]
    assert f"| {format_duration(rows[1] - rows[0])} left" in next(
        line for line in lines if line.startswith("step     10")
    )
    left = rows[1] - config.rows_in(10)
    assert any(line.startswith(f"finishes in about {format_duration(left)}, ") for line in lines)


def test_keys_that_could_do_nothing():
    with pytest.raises(InputError, match="patience: eval_interval=0 evaluates at the end alone"):
        TrainConfig(patience=3, eval_interval=0).check()
    with pytest.raises(InputError, match="decay_iters: schedule=cosine has no such fall: give --decay_iters=None"):
        TrainConfig(decay_iters=3).check()


def test_patience(run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """The run ends at the second evaluation in a row that is not better, the best is kept, a resume counts on."""
    told = iter([3.0, 2.0, 2.5, 1.0, 1.5, 1.25, 1.1, 0.5, 0.6, 0.7, 0.8])
    monkeypatch.setattr(train, "evaluate", lambda *_: next(told))
    keys = {"eval_interval": 2, "eval_train": False}
    assert run(out_dir="out", patience=2, **keys) == 0
    assert "step 10: no better for 2 evaluations (patience=2); the best is kept" in capsys.readouterr().out
    assert [loss for (loss,) in metrics("out", "val_loss")] == [3.0, 2.0, 2.5, 1.0, 1.5, 1.25]
    assert checkpoint.find("out").name == "step-000006"
    assert run(out_dir="out", resume=True, **keys) == 0
    assert "step 10: no better for 2 evaluations (patience=2)" in capsys.readouterr().out
    assert run(out_dir="out", resume=True, patience=3, **keys) == 0  # one more in vain
    assert "step 12: no better for 3 evaluations" in capsys.readouterr().out
    run(out_dir="out", resume=True, patience=4, **keys)
    assert "no better" not in capsys.readouterr().out
    assert steps("out")[-1] == 20


def test_norms_of_layers(run: Run):
    """Against the whole norm, and the weights before and after the update."""
    run(out_dir="out", max_iters=4, log_interval=2, eval_interval=1, n_layer=2, log_layers=True, grad_clip=0.5)
    last = json.loads(Path("out/metrics.jsonl").read_text().splitlines()[-2])
    layers = ["tokens", "positions", "blocks.0", "blocks.1", "norm"]
    assert list(last["layer_grad_norms"]) == list(last["layer_update_norms"]) == layers
    assert math.hypot(*last["layer_grad_norms"].values()) == pytest.approx(last["grad_norm"], rel=1e-5)
    before, after = (checkpoint.load(Path(f"out/ckpt/step-00000{k}")).model for k in (3, 4))
    for layer in layers:
        moved = [(after[name] - before[name]).norm() for name in after if name.startswith(layer + ".")]
        assert last["layer_update_norms"][layer] == pytest.approx(math.hypot(*moved), rel=1e-4)
    run(out_dir="each", max_iters=4, n_layer=2, log_layers=True, grad_clip=0.5)
    clipped = [norm > 0.5 for (norm,) in metrics("each", "grad_norm")]
    assert [bool(count) for (count,) in metrics("each", "clipped")] == clipped
    assert [count for (count,) in metrics("out", "clipped")] == [sum(clipped[:2]), sum(clipped[2:])]
    assert metrics("each", "loss")[1::2] == metrics("out", "loss")  # looking changes nothing
    run(out_dir="plain", max_iters=4, n_layer=2, grad_clip=0.5)
    assert metrics("plain", "loss") == metrics("each", "loss")
    keys = {"max_iters": 4, "n_layer": 2, "log_layers": True, "grad_clip": 0.5, "log_interval": 4, "eval_interval": 3}
    run(out_dir="parts", **keys | {"max_iters": 3})
    run(out_dir="parts", resume=True, **keys)
    assert metrics("parts", "clipped") == [(sum(clipped),)]  # what came before the stop is counted too


def test_each_target_that_counts_weighs_the_same(run: Run, one_and_two: Path):
    """Loss masks: the first step's loss and gradient, and the evaluations, written out; in two splits of the rows."""
    path, keys = one_and_two / "one", {"max_iters": 1, "grad_clip": 0.0, "seed": 7, "eval_iters": 0}
    run(out_dir="at_once", dataset=path, batch_size=8, **keys)
    run(out_dir="in_parts", dataset=path, batch_size=1, gradient_accumulation_steps=8, **keys)
    torch.manual_seed(7)
    sizes = {name: TINY[name] for name in ("n_layer", "n_head", "n_embd", "block_size", "bias")}
    model = GPT(GPTConfig(vocab_size=4, **sizes))
    dataset = open_dataset(path, block_size=16)
    masks = {split: getattr(dataset, split).mask(0, len(getattr(dataset, split))) for split in ("train", "val")}

    def loss(split: str, starts: Any) -> torch.Tensor:
        total, count = torch.zeros(()), 0
        for start in starts:
            ids = torch.from_numpy(getattr(dataset, split)[start : start + 17].astype(np.int64))
            odds = model(ids[None, :-1], ids[None, 1:])[0][0].log_softmax(-1)
            for t in range(16):
                if masks[split][start + t + 1]:
                    total, count = total - odds[t, ids[t + 1]], count + 1
        return total / count

    step = loss("train", Rows(dataset.train, 16, 4, 7).starts(slice(0, 8)))
    step.backward()
    norm = torch.stack([p.grad.square().sum() for p in model.parameters()]).sum().sqrt()
    val = loss("val", range(0, 1984, 16)).item()
    for out_dir in ("at_once", "in_parts"):
        assert metrics(out_dir, "loss", "grad_norm")[0] == pytest.approx((step.item(), norm.item()), rel=1e-4)
        assert metrics(out_dir, "val_loss")[0][0] == pytest.approx(val, rel=1e-5)


def test_bits_per_byte_stand_beside_the_loss(run: Run, letters: Path, capsys: pytest.CaptureFixture[str]):
    shutil.copytree(letters, "text")
    meta = json.loads(Path("text/meta.json").read_text())
    meta["splits"]["val"]["bytes"] = 5_000  # two and a half of each letter
    Path("text/meta.json").write_text(json.dumps(meta))
    run(out_dir="out", dataset="text", max_iters=8)
    told = capsys.readouterr().out
    for loss, bpb in metrics("out", "val_loss", "val_bpb"):
        assert bpb == pytest.approx(loss / math.log(2) / 2.5)
        assert f"val loss {loss:.4f}, {bpb:.4f} bits per byte" in told
    run(out_dir="unknown", max_iters=1)
    assert not metrics("unknown", "val_bpb")
    assert metrics("unknown", "val_loss")


def test_documents_are_masked_on_request(run: Run, one_and_two: Path):
    keys = {"dataset": one_and_two / "two", "max_iters": 1}
    run(out_dir="together", **keys)
    run(out_dir="apart", **keys, mask_documents=True)
    (together,), (apart,) = metrics("together", "loss")[0], metrics("apart", "loss")[0]
    assert together != apart
    with pytest.raises(InputError, match=r"mask_documents=True: letters has no token that ends a document"):
        run(mask_documents=True)


def test_evaluation_is_the_mean_over_the_whole_split(letters: Path):
    """Also where the last batch is not full, and dropout stays off."""
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=4, block_size=16, dropout=0.5))
    with torch.no_grad():
        model.tokens.weight[:4] *= 30  # predictions that differ from window to window
    val = open_dataset(letters, block_size=16).val[: 16 * 10 + 1]
    windows = EvalWindows(val, 16, 0, 4, 4)
    assert len(windows) == 10
    model.eval()
    expected = sum(model(*windows[k : k + 1])[1].item() for k in range(10)) / 10
    model.train()
    world = distributed.World(0, 1, torch.device("cpu"), torch.float32)
    assert train.evaluate(model, windows, 4, world) == pytest.approx(expected, rel=1e-6)
    assert model.training


def test_float16_trains_and_keeps_its_scale(run: Run):
    run(out_dir="half", dtype="float16", max_iters=60, learning_rate=2e-2, checkpoint_minutes=0)
    run(out_dir="full", max_iters=60, learning_rate=2e-2)
    assert learns("half")
    assert metrics("half", "val_loss")[-1][0] == pytest.approx(metrics("full", "val_loss")[-1][0], abs=0.03)
    scaler = checkpoint.load(Path("half/ckpt/step-000060")).state["scaler"]
    assert scaler["scale"] >= 1
    assert scaler["_growth_tracker"] > 0
    run(out_dir="half", resume=True, dtype="float16", max_iters=64, learning_rate=2e-2)
    again = checkpoint.load(Path("half/ckpt/step-000064")).state["scaler"]
    assert again["_growth_tracker"] == scaler["_growth_tracker"] + 4
    assert again["scale"] == scaler["scale"]


# ---- the compiler


@pytest.mark.slow
def test_compiled_trains_to_the_same_losses(run: Run):
    keys = {"max_iters": 40, "gradient_accumulation_steps": 2}
    run(out_dir="plain", **keys)
    run(out_dir="compiled", compile=True, **keys)
    assert losses("compiled") == pytest.approx(losses("plain"), rel=1e-4)
    names = checkpoint.load(Path("compiled/ckpt/step-000040")).model.keys()
    assert names == checkpoint.load(Path("plain/ckpt/step-000040")).model.keys()


@pytest.mark.parametrize("when", ["at once", "at the first batch", "when gradients are there"])
def test_a_compiler_that_fails_is_done_without(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], when: str
):
    def fail(*_: Any) -> Any:
        raise RuntimeError("no C++ compiler was found\nand more")

    def compile(model: torch.nn.Module, mode: str | None) -> Any:
        def fail_late(x: torch.Tensor, y: torch.Tensor) -> None:
            model(x, y)[1].backward()
            fail()

        if when == "at once":
            fail()
        return fail if when == "at the first batch" else fail_late

    run(out_dir="plain")
    monkeypatch.setattr(torch, "compile", compile)
    assert run(out_dir="out", compile=True) == 0
    told = capsys.readouterr().out
    assert "warning: torch.compile failed, going on without it (RuntimeError: no C++ compiler was found)" in told
    assert losses("out") == losses("plain")  # no gradient of the attempt is left


@pytest.mark.parametrize(
    ("device", "rows_per_step", "micro_batch", "size", "graphs"),
    [
        ("cuda", 8, 8, {}, True),
        ("cpu", 8, 8, {"compile": True}, False),
        ("cuda", 16, 8, {}, False),  # the next micro-batch would write over the gradients
        ("cuda", 8, 8, {"n_embd": 8192}, False),  # the host keeps ahead of long steps
        ("cuda", 8, 8, {"compile": False}, None),
    ],
)
def test_when_a_step_becomes_a_graph(
    monkeypatch: pytest.MonkeyPatch, device: str, rows_per_step: int, micro_batch: int, size: Any, graphs: bool | None
):
    asked: list[bool] = []
    monkeypatch.setattr(distributed, "try_compile", lambda model, *others: (model, asked.append(others[-1])))
    monkeypatch.setattr(World, "to_device", lambda _, *tensors: tensors)  # there need not be a GPU
    config = TrainConfig(batch_size=rows_per_step, gradient_accumulation_steps=1, n_head=4, n_layer=2)
    config = replace(config, **{"n_embd": 32} | size)
    with torch.device("meta"):
        model = GPT(GPTConfig(n_layer=2, n_head=4, n_embd=config.n_embd, vocab_size=65, block_size=1024))
    rows = Rows(np.zeros(5000, np.uint16), 1024, 65, 1, "random")
    assert compile_model(config, model, World(0, 1, torch.device(device), torch.float32), rows, micro_batch) is model
    assert asked == ([] if graphs is None else [graphs])


# ---- runs that break


@pytest.mark.parametrize("evaluated", [False, True])
def test_a_rate_that_breaks_the_weights(run: Run, evaluated: bool, capsys: pytest.CaptureFixture[str]):
    keys = {"warmup_iters": 0, "decay_lr": False, "eval_interval": 4}
    run(out_dir="out", max_iters=8, **keys)
    good = checkpoint.load(Path("out/ckpt/step-000008"))
    # The first update makes numbers of 1e30, and what follows, a step or an evaluation, is not finite.
    keys["eval_interval"] = 1 if evaluated else 100
    with pytest.raises(RunStopped, match="finite"):
        run(out_dir="out", resume=True, max_iters=30, learning_rate=1e30, **keys)
    assert steps("out") == [4, 8]
    again = checkpoint.load(Path("out/ckpt/step-000008"))
    assert all(torch.equal(again.model[name], tensor) for name, tensor in good.model.items())
    assert run(out_dir="out", resume=True, max_iters=30, **keys | {"eval_interval": 10, "learning_rate": 5e-3}) == 0
    assert metrics("out", "step") == sorted(metrics("out", "step"))
    assert learns("out")


@pytest.mark.parametrize(("dtype", "poison"), [("float32", "nan"), ("float16", "nan"), ("float16", "inf")])
def test_a_broken_loss_stops_the_run_and_touches_nothing(
    run: Run, monkeypatch: pytest.MonkeyPatch, dtype: str, poison: str
):
    """From the update after step 5 on the loss is NaN, or infinite over sound gradients. float32 gives up at once,
    float16, where an overflow is routine, after twenty in a row."""
    calls, forward, saved = [0], GPT.forward, []
    original = checkpoint.save

    def poisoned(self: GPT, idx: torch.Tensor, targets: torch.Tensor | None = None) -> Any:
        logits, loss = forward(self, idx, targets)
        calls[0] += self.training
        return logits, loss + float(poison) if self.training and calls[0] > 5 else loss

    def save(out_dir: Path, model: dict[str, torch.Tensor], *args: Any) -> Path:
        saved.append(args[1]["step"])
        return original(out_dir, model, *args)

    run(out_dir="healthy", dtype=dtype, max_iters=5)
    monkeypatch.setattr(GPT, "forward", poisoned)
    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(
        RunStopped, match=rf"step (6, rows 20 to 23|25, rows 96 to 99): loss {poison}, .*No update was made"
    ):
        run(out_dir="out", dtype=dtype, max_iters=40, eval_interval=5, keep_every=5)
    # In between the evaluations save what stands: the state after step 5.
    assert saved == ([5] if dtype == "float32" else [5, 10, 15, 20])
    healthy = checkpoint.load(Path("healthy/ckpt/step-000005"))
    for step in saved:
        now = checkpoint.load(Path(f"out/ckpt/step-{step:06d}"))
        assert all(torch.equal(now.model[name], tensor) for name, tensor in healthy.model.items())
        assert all(torch.equal(now.optimizer[name], tensor) for name, tensor in healthy.optimizer.items())
    nulls = [step for step, loss in metrics("out", "step", "loss") if loss is None]
    assert nulls == ([] if dtype == "float32" else [*range(6, 25)])


def test_a_broken_step_is_not_saved_at_a_stop(
    run: Run, monkeypatch: pytest.MonkeyPatch, signal_at: Callable[[int, int], None]
):
    """The last step before the save that a signal asks for is read before it is saved."""
    signal_at(9, signal.SIGTERM)
    assert run(out_dir="whole", eval_interval=100) == 143
    (last,) = steps("whole")
    calls, forward = [0], GPT.forward

    def poisoned(self: GPT, idx: torch.Tensor, targets: torch.Tensor | None = None) -> Any:
        logits, loss = forward(self, idx, targets)
        calls[0] += self.training
        return logits, loss + math.nan if self.training and calls[0] == last else loss

    monkeypatch.setattr(GPT, "forward", poisoned)
    signal_at(9, signal.SIGTERM)
    with pytest.raises(RunStopped, match=rf"step {last}, .*not finite"):
        run(out_dir="out", eval_interval=100)
    assert steps("out") == []


def test_auto_does_not_repeat_what_broke(run: Run, capsys: pytest.CaptureFixture[str]):
    keys = {"warmup_iters": 0, "decay_lr": False, "eval_interval": 4}
    run(out_dir="out", max_iters=8, **keys)
    for _ in range(2):
        with pytest.raises(RunStopped, match="not finite"):
            run(out_dir="out", resume=True, max_iters=30, learning_rate=1e30, **keys)
        with pytest.raises(
            RunStopped, match=r"^step \d+.*not finite.*: --resume=auto does not repeat it; .*--learning_rate"
        ):
            run(out_dir="out", resume="auto", max_iters=30, **keys)
    assert run(out_dir="out", resume=True, max_iters=12, **keys) == 0  # asked for, it goes on …
    assert run(out_dir="out", resume="auto", max_iters=16, **keys) == 0  # … and is a run like any other


def test_spikes_are_skipped_and_told(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """The rows of step 25 give a gradient a hundred times too large: with the guard the run ends as if that update had
    not been, also over a stop in between, and the count goes on."""
    forward, calls = GPT.forward, [0]

    def spiked(self: GPT, idx: torch.Tensor, targets: torch.Tensor | None = None) -> Any:
        logits, loss = forward(self, idx, targets)
        calls[0] += self.training
        return logits, loss * 100 if self.training and calls[0] in (25, 45) else loss

    monkeypatch.setattr(GPT, "forward", spiked)
    keys = {"max_iters": 50, "skip_spikes": 8, "grad_clip": 0.0, "eval_interval": 30}
    run(out_dir="whole", **keys)
    told = capsys.readouterr().out
    assert re.findall(r"step (\d+): update skipped, gradient norm [\d.]+ is a spike \((\d) so far\)", told) == [
        ("25", "1"),
        ("45", "2"),
    ]
    counts = dict(metrics("whole", "step", "skipped"))
    assert [counts[step] for step in (24, 25, 44, 45, 50)] == [0, 1, 1, 2, 2]
    calls[0] = 0
    run(out_dir="parts", **keys | {"max_iters": 30})
    capsys.readouterr()
    run(out_dir="parts", resume=True, **keys)
    assert "(1 so far)" not in capsys.readouterr().out
    assert metrics("parts", "step", "loss", "skipped") == metrics("whole", "step", "loss", "skipped")


# ---- signals, in processes of their own


def test_a_signal_to_save_and_go_on(run: Run, signal_at: Callable[[int, int], None]):
    run(out_dir="whole", eval_interval=100)
    signal_at(5, signal.SIGUSR1)
    assert run(out_dir="out", eval_interval=100, keep_every=1) == 0
    assert steps("out") in ([6, 20], [7, 20])  # read a step late
    assert losses("out") == losses("whole")


def test_a_second_interrupt_ends_at_once(run: Run, monkeypatch: pytest.MonkeyPatch):
    original = TrainConfig.learning_rate_at

    def interrupt(config: TrainConfig, at: int) -> float:
        if at == 12:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return original(config, at)

    monkeypatch.setattr(TrainConfig, "learning_rate_at", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(out_dir="out")
    found = checkpoint.load_latest(Path("out"), "auto")
    assert found
    assert found.state["step"] == 8
    monkeypatch.setattr(TrainConfig, "learning_rate_at", original)
    assert run(out_dir="out", resume="auto") == 0


def test_a_signal_saves_and_ends(letters: Path, tmp_path: Path):
    running: dict[int, subprocess.Popen[str]] = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        # Long enough to be caught in the middle; whatever fails here, it ends by itself.
        keys = {"dataset": letters, "max_iters": 20_000, "eval_interval": 10**6, "out_dir": tmp_path / f"out{number}"}
        command = [sys.executable, ROOT / "train.py", *flags(**keys)]
        running[number] = subprocess.Popen(
            command, env=environment(), stdout=subprocess.PIPE, text=True, stderr=subprocess.STDOUT
        )
    for number, process in running.items():
        assert process.stdout is not None
        assert any(line.startswith("step     20") for line in process.stdout)
        process.send_signal(number)
        told = process.communicate(timeout=60)[0]
        assert process.returncode == 128 + number  # 143 and 130
        out_dir = tmp_path / f"out{number}"
        (step,) = steps(out_dir)
        assert step >= 20
        assert f"stopped at step {step} by a signal; saved: go on with --resume=True" in told
        assert "Traceback" not in told
        assert metrics(out_dir)[-1]["step"] == step
        assert checkpoint.load(out_dir / f"ckpt/step-{step:06d}").state["samples"] == 4 * step


# ---- runs that write nothing


@pytest.mark.parametrize("keys", [{"dry_run": True}, {"eval_only": True}])
def test_nothing_is_written(run: Run, keys: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run(out_dir="out", max_iters=3)
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    for start in ({"out_dir": "new"}, {"out_dir": "out"}, {"out_dir": "out", "resume": True}):
        assert run(**{"max_iters": 10**6, "warmup_iters": 0, "dropout": 0.1} | start | keys) == 0
    assert {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    told = capsys.readouterr().out
    if "dry_run" in keys:
        assert told.count("finishes in about") == 3
        assert "step 4 rows of 16 = 64 tokens" in " ".join(told.split())
        assert f"model       {GPT.from_checkpoint('out').count_parameters():,} parameters" in told


def test_eval_only_measures_the_weights_it_is_given(run: Run, capsys: pytest.CaptureFixture[str]):
    run(out_dir="out", eval_iters=0)
    ((train_loss, val_loss),) = metrics("out", "train_loss", "val_loss")[-1:]
    capsys.readouterr()
    for start in ({"out_dir": "out", "resume": True}, {"out_dir": "new", "init_from": "out/ckpt/step-000020"}):
        run(eval_only=True, eval_iters=0, dropout=0.5, **start)
        assert f": train loss {train_loss:.4f} | val loss {val_loss:.4f}" in capsys.readouterr().out


def test_evaluation_at_the_end_alone_and_of_one_split(run: Run):
    run(out_dir="both", eval_iters=0)
    run(out_dir="end", eval_interval=0, eval_train=False, eval_iters=0)
    evaluations = [line for line in metrics("end") if "val_loss" in line]
    assert [line["step"] for line in evaluations] == [20]
    assert "train_loss" not in evaluations[0]
    assert evaluations[0]["val_loss"] == metrics("both", "val_loss")[-1][0]
    assert steps("end") == [20]


@pytest.mark.parametrize(("size", "rows"), [(2, 2), (3, 2), ("auto", 8), (100, 8)])
def test_a_micro_batch_changes_no_step(run: Run, size: Any, rows: int, monkeypatch: pytest.MonkeyPatch):
    run(out_dir="plain", batch_size=8)
    read, original = set(), Rows.__getitem__

    def spy(self: Rows, span: slice) -> Any:
        read.add(span.stop - span.start)
        return original(self, span)

    monkeypatch.setattr(Rows, "__getitem__", spy)
    run(out_dir="cut", batch_size=8, micro_batch_size=size)
    assert read == {rows}
    assert losses("cut") == pytest.approx(losses("plain"), rel=1e-6)
    assert [line["tokens"] for line in metrics("cut")] == [line["tokens"] for line in metrics("plain")]


def test_auto_takes_what_is_free_and_keeps_to_it(run: Run, monkeypatch: pytest.MonkeyPatch, letters: Path):
    """Between the estimates for two sizes lies room for the smaller. A resumed run does not ask again."""
    config, given = parse(TrainConfig, argv=flags(dataset=letters, batch_size=8, micro_batch_size="auto"))
    _, model, _ = open_data_and_model(config, given, None)
    world = World(0, 1, torch.device("cpu"), torch.float32)
    enough = estimate_training_memory(model, config, 4, 16, world) / 0.8 * 1.01
    for neighbors in (2, 1):  # two processes on a machine share what is free
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(neighbors))
        monkeypatch.setattr(distributed, "free_memory", lambda _, free=enough * neighbors: free)
        assert pick_micro_batch(config, model, world) == 4
    run(out_dir="out", batch_size=8, micro_batch_size="auto", max_iters=2)
    monkeypatch.setattr(distributed, "free_memory", lambda _: None)
    run(out_dir="out", resume=True, max_iters=4, batch_size=8)
    saved = [checkpoint.load(Path(f"out/ckpt/step-00000{step}")).state["config"] for step in (2, 4)]
    assert [config["micro_batch_size"] for config in saved] == [4, 4]


@pytest.mark.parametrize("dropout", [0.0, 0.2])  # whose noise is drawn again in backward, the same
def test_less_memory_is_the_same_run(run: Run, dropout: float):
    run(out_dir="plain", n_layer=2, dropout=dropout)
    run(out_dir="lean", n_layer=2, dropout=dropout, activation_checkpointing=True, loss_chunk=24)
    assert losses("lean") == pytest.approx(losses("plain"), rel=1e-5)


# ---- weights from elsewhere


def loss_of(model: Any, letters: Path, T: int) -> float:
    """transformers' loss on the whole validation split, each window of T."""
    val = open_dataset(letters, block_size=T).val
    x, y = EvalWindows(val, T, 0, 1, 4)[0 : 10**6]
    with torch.no_grad():
        logits = model(x).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten()).item()


@pytest.mark.parametrize("kind", ["hugging face", "nanogpt", "ours"])
@pytest.mark.parametrize("block_size", [..., 12])
def test_training_starts_from_weights_of_elsewhere(run: Run, letters: Path, foreign: Any, kind: str, block_size: Any):
    start = "theirs"
    foreign.save_pretrained(start)
    if kind == "nanogpt":
        start = "ckpt.pt"
        foreign = save_as_nanogpt(foreign, Path(start))
    shape = dict.fromkeys(("n_layer", "n_head", "n_embd", "bias"), ...)
    if kind == "ours":
        run(out_dir="first", init_from="theirs", max_iters=0, block_size=..., **shape)
        start = "first"
    run(out_dir="out", init_from=start, block_size=block_size, eval_iters=0, max_iters=4, **shape)
    T = 32 if block_size is ... else block_size
    assert metrics("out", "val_loss")[0][0] == pytest.approx(loss_of(foreign, letters, T), rel=1e-5)
    state = checkpoint.load(Path("out/ckpt/step-000004")).state
    assert state["model"]["block_size"] == state["config"]["block_size"] == T
    assert state["config"]["n_embd"] == 24
    assert state["model"]["gelu"] == ("erf" if kind == "nanogpt" else "tanh")
    assert (state["step"], state["samples"]) == (4, 16)  # a new run, its own counts
    assert metrics("out", "val_loss")[-1] < metrics("out", "val_loss")[0]
    assert run(out_dir="out", resume=True, max_iters=6, block_size=..., **shape) == 0


# ---- recipes


CONFIGS = {path.name: path for path in (ROOT / "config").glob("*.py")}


@pytest.mark.parametrize("name", CONFIGS)
def test_recipes_are_valid(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(metrics_module, "find_spec", lambda _: True)  # train_gpt2.py logs to wandb
    config, given = parse(train.TrainConfig, [str(CONFIGS[name])])
    config.check()
    known = {"openwebtext", "fineweb", "shakespeare", "shakespeare_char", "shakespeare_qwen3", "chat"}
    assert given["dataset"] in known


def test_recipes_mean_what_nanogpt_means():
    assert len(CONFIGS) >= 10

    def read(name: str) -> train.TrainConfig:
        return parse(train.TrainConfig, [str(CONFIGS[name])])[0]

    finetune = read("finetune_shakespeare.py")
    assert (finetune.init_from, finetune.max_iters, finetune.rows_per_step) == ("gpt2-xl", 20, 32)
    assert {finetune.learning_rate_at(step) for step in range(20)} == {3e-5}
    gpt2 = read("train_gpt2.py")
    assert gpt2.rows_per_step * gpt2.block_size == 491_520
    assert gpt2.learning_rate_at(2000) == pytest.approx(6e-4)
    assert gpt2.learning_rate_at(600_000) == pytest.approx(6e-5)
    for size in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
        config = read(f"eval_{size.replace('-', '_')}.py")
        assert (config.init_from, config.eval_only, config.eval_iters) == (size, True, 500)


# ---- what is said


def test_what_a_run_says(run: Run, capsys: pytest.CaptureFixture[str]):
    run(out_dir="out", sample_chars=30, warmup_iters=50, log_interval=5)
    told = capsys.readouterr().out.splitlines()
    assert any(" ".join(line.split()) == "step 4 rows of 16 = 64 tokens, in micro-batches of 4" for line in told)
    assert any("20 steps = 1,280 tokens = 0.064 epochs of letters" in line for line in told)
    assert "warning: warmup_iters=50 is longer than the schedule, 20 updates" in told
    samples = [line.strip() for line in told if line.startswith("    ")]
    assert len(samples) == 4  # at 0, 8, 16 and 20
    assert all(len(sample) == 30 and set(sample) <= set("abcd") for sample in samples)
    assert sum(line.startswith("step     10 | loss") for line in told) == 1
    assert not any(line.startswith("step     11") for line in told)


def test_a_dataset_without_a_description(run: Run, letters: Path, capsys: pytest.CaptureFixture[str]):
    """nanoGPT's own folders: ids alone are GPT-2's, a tokenizer tells the vocabulary."""
    Path("bare").mkdir()
    for split in ("train", "val"):
        Path(f"bare/{split}.bin").write_bytes((letters / f"{split}.bin").read_bytes())
    run(dataset="bare", out_dir="out", max_iters=1)
    assert "ids are taken for GPT-2's encoding" in capsys.readouterr().out
    assert GPT.from_checkpoint("out").config.vocab_size == 50257
    Tokenizer.characters("abcde").save("bare")
    run(dataset="bare", out_dir="out", max_iters=1)
    assert GPT.from_checkpoint("out").config.vocab_size == 5
