"""train.py from its settings to its end. oracles/ and test_v0_1.py hold its numbers."""

import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import NO_SIZES, ROOT, Run, SignalAt, environment, flags, metrics, snapshot, steps
from random_models import save_as_nanogpt
from small_data import LETTERS

import load
import train
from configurator import parse
from load import make_schedule
from model import GPT
from nanogpt import checkpoint
from nanogpt import metrics as metrics_module
from nanogpt.data.dataset import open_dataset
from nanogpt.data.rows import EvalWindows
from nanogpt.errors import InputError, RunStopped
from nanogpt.metrics import Stopwatch
from nanogpt.text.tokenizer import Tokenizer
from train import TrainConfig

CONFIGS = {path.name: path for path in (ROOT / "config").glob("*.py")}


def losses(out_dir: str) -> list[float]:
    return [loss for (loss,) in metrics(out_dir, "loss")]


# --- Settings


@pytest.mark.parametrize("name", CONFIGS)
def test_config_files_are_valid(name: str):
    config, explicit = parse(TrainConfig, [str(CONFIGS[name])])
    train.check_config(config)
    assert explicit["dataset"]


def test_config_files_mean_what_nanogpts_mean():
    def read(name: str) -> TrainConfig:
        return parse(TrainConfig, [str(CONFIGS[name])])[0]

    finetune = read("finetune_shakespeare.py")
    assert (finetune.init_from, finetune.max_iters, finetune.rows_per_step) == ("gpt2-xl", 20, 32)
    assert {make_schedule(finetune).lr(step) for step in range(20)} == {3e-5}
    gpt2 = read("train_gpt2.py")
    assert gpt2.rows_per_step * gpt2.block_size == 491_520
    assert [make_schedule(gpt2).lr(step) for step in (2000, 600_000)] == pytest.approx([6e-4, 6e-5])
    for size in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
        config = read(f"eval_{size.replace('-', '_')}.py")
        assert (config.init_from, config.eval_only, config.eval_iters) == (size, True, 500)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"patience": 3, "eval_interval": 0}, "patience: .*--eval_interval"),
        ({"decay_iters": 3}, "decay_iters: schedule=cosine"),
        ({"look_back": True}, "look_back=True: arch=gpt2"),
        ({"look_back": True, "init_from": "gpt2"}, "look_back=True: init_from=gpt2"),
        ({"gradient_accumulation_steps": 1, "batch_growth_tokens": 640}, "batch_growth_tokens: .*accumulation_steps"),
        (
            {"batch_size": 2, "gradient_accumulation_steps": 6, "batch_growth_tokens": 640},
            "batch_size=2 rows, .* 3 proc",
        ),
    ],
)
def test_check_config_refuses_contradictions(keys: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InputError, match=message):
        train.check_config(TrainConfig(**keys))


# --- Metrics and output


def test_soft_targets_and_look_back_change_a_run(run: Run, capsys: pytest.CaptureFixture[str]):
    keys = {"arch": "modern", "bias": False, "max_iters": 1, "log_interval": 1}
    for name, lever in {"plain": {}, "soft": {"ngram_targets": 3}, "looking": {"look_back": True}}.items():
        run(out_dir=name, **keys | lever)
        assert ("targets     of 3-grams" in capsys.readouterr().out) == (name == "soft")
    first_losses = {name: metrics(name, "val_loss")[0] for name in ("plain", "soft", "looking")}
    assert first_losses["plain"] == first_losses["soft"] != first_losses["looking"]
    assert losses("plain") != losses("soft")


def test_metrics_have_their_fields(run: Run):
    run(out_dir="out", batch_size=2, gradient_accumulation_steps=3, log_interval=4, eval_interval=10)
    lines = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if "loss" in line]
    fields = ["step", "tokens", "time_s", "loss", "lr", "grad_norm", "tokens_per_s", "mfu"]
    assert all(list(line) == fields for line in training)
    fields = ["step", "tokens", "time_s", "train_loss", "val_loss"]
    assert all(list(line) == fields for line in lines if line not in training)
    assert [line["step"] for line in lines] == [0, 4, 8, 10, 12, 16, 20, 20]
    assert all(line["tokens"] == line["step"] * 2 * 3 * 16 for line in lines)
    schedule = make_schedule(TrainConfig(max_iters=20, learning_rate=1e-2, warmup_iters=2))
    assert [line["lr"] for line in training] == [schedule.lr(step - 1) for step in (4, 8, 12, 16, 20)]
    assert {line["mfu"] for line in training} == {None}  # a CPU's peak is unknown
    times = [line["time_s"] for line in lines]
    assert times == sorted(times)
    # Each line has the speed since the line before, so the seconds add up.
    seconds = sum(4 * 6 * 16 / line["tokens_per_s"] for line in training)
    assert seconds == pytest.approx(training[-1]["time_s"], rel=2e-3, abs=2e-3)


def test_time_stands_still_during_evaluation_and_saving(run: Run, monkeypatch: pytest.MonkeyPatch):
    events: list[str] = []

    def record(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def recorded(*args: Any) -> Any:
            events.append(name)
            return original(*args)

        monkeypatch.setattr(owner, name, recorded)

    record(Stopwatch, "start")
    record(Stopwatch, "stop")
    record(train, "evaluate")
    record(train, "save")
    run(out_dir="out", eval_interval=10)
    update = ["start"] * 10
    evaluation = ["stop", "evaluate", "evaluate"]
    assert events == [*evaluation, *update, *evaluation, "stop", "save", *update, *evaluation, "stop", "save"]


def test_a_run_prints_its_size_and_samples(run: Run, capsys: pytest.CaptureFixture[str]):
    run(out_dir="out", sample_chars=30, warmup_iters=50, log_interval=5)
    lines = capsys.readouterr().out.splitlines()
    assert any("4 rows of 16 = 64 tokens, micro-batches of 4" in line for line in lines)
    assert any("20 steps = 1,280 tokens = 0.064 epochs of letters" in line for line in lines)
    assert any("warning: warmup_iters=50 is longer" in line for line in lines)
    samples = [line.strip() for line in lines if line.startswith("    ")]
    assert len(samples) == 4  # at 0, 8, 16 and 20
    assert all(len(sample) == 30 and set(sample) <= set(LETTERS) for sample in samples)
    assert sum(line.startswith("step     10 | loss") for line in lines) == 1
    assert not any(line.startswith("step     11") for line in lines)


def test_wandb_gets_the_numbers_and_continues_on_resume(run: Run, monkeypatch: pytest.MonkeyPatch):
    started: list[Any] = []
    logged: dict[int, set[str]] = {}

    def init(**keys: Any) -> Any:
        def log(numbers: dict[str, float], step: int) -> None:
            logged[step] = numbers.keys()

        started.append((keys["id"], keys["name"], keys["config"]["n_embd"]))
        return SimpleNamespace(id="first", log=log, finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    monkeypatch.setattr(metrics_module, "find_spec", lambda _: True)
    run(out_dir="out", max_iters=3, wandb_log=True, eval_interval=0, log_layers=True)
    run(out_dir="out", max_iters=4, wandb_log=False, resume=True)
    run(out_dir="out", max_iters=5, wandb_log=True, resume=True)
    assert started == [(None, "gpt2", 16), ("first", "gpt2", 16)]
    assert logged.keys() == {1, 2, 3, 5}
    assert {"loss", "lr", "layer_grad_norms/norm"} <= logged[2]
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: 1 / 0))
    with pytest.raises(InputError, match="wandb_log=True"):
        run(wandb_log=True)


# --- Evaluation


def test_patience_counts_evaluations_over_a_resume(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    val_losses = iter([3.0, 2.0, 2.5, 1.0, 1.5, 1.25, 1.1, 0.5, 0.6, 0.7, 0.8])
    monkeypatch.setattr(train, "evaluate", lambda *_: next(val_losses))
    keys = {"eval_interval": 2, "eval_train": False}

    def message(**more: Any) -> str:
        assert run(out_dir="out", **keys | more) == 0
        return capsys.readouterr().out

    assert "step 10: no new best in 2 evaluations" in message(patience=2)
    assert [loss for (loss,) in metrics("out", "val_loss")] == [3.0, 2.0, 2.5, 1.0, 1.5, 1.25]
    assert checkpoint.find("out").name == "step-000006"
    assert "step 10: no new best in 2 evaluations" in message(resume=True)
    assert "step 12: no new best in 3 evaluations" in message(resume=True, patience=3)
    assert "no new best" not in message(resume=True, patience=4)
    assert steps("out")[-1] == 20


@pytest.mark.parametrize("keys", [{"dry_run": True}, {"eval_only": True}])
def test_dry_runs_and_evaluations_write_nothing(
    run: Run, keys: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run(out_dir="out", max_iters=3)
    before = snapshot("out")
    capsys.readouterr()
    for start in ({"out_dir": "new"}, {"out_dir": "out"}, {"out_dir": "out", "resume": True}):
        assert run(**{"max_iters": 10**6, "warmup_iters": 0, "dropout": 0.1} | start | keys) == 0
    assert snapshot("out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    output = capsys.readouterr().out
    assert output.count("ETA ") == (3 if "dry_run" in keys else 0)
    assert f"model       {GPT.from_checkpoint('out').count_parameters():,} parameters" in output


def test_eval_only_measures_existing_weights_without_dropout(run: Run, capsys: pytest.CaptureFixture[str]):
    run(out_dir="out", eval_iters=0)
    ((train_loss, val_loss),) = metrics("out", "train_loss", "val_loss")[-1:]
    capsys.readouterr()
    for start in ({"out_dir": "out", "resume": True}, {"out_dir": "new", "init_from": "out/ckpt/step-000020"}):
        run(eval_only=True, eval_iters=0, dropout=0.5, **start)
        assert f": train loss {train_loss:.4f} | val loss {val_loss:.4f}" in capsys.readouterr().out


def test_eval_only_makes_passes_of_a_micro_batch(run: Run, monkeypatch: pytest.MonkeyPatch):
    sizes: list[int] = []
    monkeypatch.setattr(train, "eval_batch_size", lambda _, micro_batch, __: sizes.append(micro_batch) or micro_batch)
    keys = {"eval_only": True, "batch_size": 8, "gradient_accumulation_steps": 3}
    for changes in ({}, {"micro_batch_size": 2}, {"micro_batch_size": 12}, {"micro_batch_size": "auto"}):
        run(**keys | changes)
    assert sizes == [8, 2, 8, 8]


def test_evaluation_only_at_the_end_and_of_one_split(run: Run):
    run(out_dir="both", eval_iters=0)
    run(out_dir="end", eval_interval=0, eval_train=False, eval_iters=0)
    (evaluation,) = [line for line in metrics("end") if "val_loss" in line]
    assert evaluation == {"step": 20, "tokens": 20 * 64, "val_loss": metrics("both", "val_loss")[-1][0]}
    assert steps("end") == [20]


# --- Micro-batches and the compiler


def test_auto_micro_batch_is_kept_on_resume(run: Run, monkeypatch: pytest.MonkeyPatch):
    def micro_batch(**keys: Any) -> Any:
        run(out_dir="out", batch_size=8, **keys)
        return checkpoint.load_latest(Path("out"), True).state["config"]["micro_batch_size"]

    monkeypatch.setattr(load, "pick_micro_batch", lambda model, optimizer, sizes, world: sizes[1])
    assert micro_batch(micro_batch_size="auto", max_iters=2) == 4
    monkeypatch.setattr(load, "pick_micro_batch", lambda *_: pytest.fail("chosen again"))
    assert micro_batch(resume=True, max_iters=4) == 4


@pytest.mark.slow
def test_compiled_run_has_the_losses_of_an_eager_one(run: Run):
    keys = {"max_iters": 40, "gradient_accumulation_steps": 2}
    run(out_dir="eager", **keys)
    run(out_dir="compiled", compile=True, **keys)
    assert losses("compiled") == pytest.approx(losses("eager"), rel=1e-4)
    names = checkpoint.load(Path("compiled/ckpt/step-000040")).model.keys()
    assert names == checkpoint.load(Path("eager/ckpt/step-000040")).model.keys()


# --- Runs that break


@pytest.mark.parametrize("eval_interval", [1, 100])
def test_a_run_that_diverges_stops_and_is_not_repeated_by_auto(run: Run, eval_interval: int):
    """A rate of 2e9 breaks the weights in one update; an evaluation or the next update finds it."""
    keys = {"warmup_iters": 0, "decay_lr": False}
    run(out_dir="out", max_iters=8, eval_interval=4, **keys)
    for _ in range(2):
        with pytest.raises(RunStopped, match="finite"):
            run(out_dir="out", resume=True, max_iters=30, learning_rate=2e9, eval_interval=eval_interval, **keys)
        with pytest.raises(RunStopped, match=r"^step \d+.*--resume=auto does not repeat it; .*--learning_rate"):
            run(out_dir="out", resume="auto", max_iters=30, **keys)
    assert steps("out") == [4, 8]
    assert run(out_dir="out", resume=True, max_iters=30, eval_interval=10, **keys) == 0
    assert run(out_dir="out", resume="auto", max_iters=32, **keys) == 0
    assert metrics("out", "step") == sorted(metrics("out", "step"))
    assert metrics("out", "val_loss")[-1][0] < 1.3  # log 4 = 1.386 is what a guess costs


def poison(monkeypatch: pytest.MonkeyPatch, first_call: int, value: float) -> None:
    """Add `value` to the training loss from a forward pass on."""
    forward = GPT.forward
    calls = [0]

    def poisoned(self: GPT, *inputs: Any) -> Any:
        logits, loss = forward(self, *inputs)
        calls[0] += self.training
        return logits, loss + value if self.training and calls[0] >= first_call else loss

    monkeypatch.setattr(GPT, "forward", poisoned)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(("dtype", "value"), [("float32", math.nan), ("float16", math.inf)])
def test_a_broken_loss_changes_nothing_and_stops_the_run(
    run: Run, monkeypatch: pytest.MonkeyPatch, dtype: str, value: float, optimizer: str
):
    """At once in float32; in float16, where overflow is routine, after twenty steps in a row."""
    run(out_dir="healthy", dtype=dtype, optimizer=optimizer, max_iters=5)
    poison(monkeypatch, 6, value)
    last = 6 if dtype == "float32" else 25
    with pytest.raises(RunStopped, match=rf"step {last}, rows {4 * last - 4} to {4 * last - 1}: loss {value}"):
        run(out_dir="out", dtype=dtype, optimizer=optimizer, max_iters=40, eval_interval=5, keep_every=5)
    assert steps("out") == ([5] if dtype == "float32" else [5, 10, 15, 20])
    healthy = checkpoint.load(Path("healthy/ckpt/step-000005"))
    saved = checkpoint.load(Path(f"out/ckpt/step-{steps('out')[-1]:06d}"))
    assert all(torch.equal(saved.model[name], tensor) for name, tensor in healthy.model.items())
    assert all(torch.equal(saved.optimizer[name], tensor) for name, tensor in healthy.optimizer.items())
    nulls = [step for step, loss in metrics("out", "step", "loss") if loss is None]
    assert nulls == ([] if dtype == "float32" else [*range(6, 25)])


@pytest.mark.parametrize(("nth", "stop"), [(1, InputError), (3, RunStopped)])  # before the first update; after some
def test_an_evaluation_out_of_memory_says_what_to_try(
    run: Run, monkeypatch: pytest.MonkeyPatch, nth: int, stop: type[Exception]
):
    evaluations = iter(range(1, 9))
    original = train.evaluate

    def evaluate(*args: Any) -> float:
        if next(evaluations) == nth:
            raise MemoryError
        return original(*args)

    monkeypatch.setattr(train, "evaluate", evaluate)
    with pytest.raises(stop, match="try --micro_batch_size=2"):
        run()


def test_a_broken_step_is_not_saved_at_a_stop(run: Run, monkeypatch: pytest.MonkeyPatch, signal_at: SignalAt):
    signal_at(9, signal.SIGTERM)
    assert run(out_dir="whole", eval_interval=100) == 143
    (last,) = steps("whole")
    poison(monkeypatch, last, math.nan)
    signal_at(9, signal.SIGTERM)
    with pytest.raises(RunStopped, match=f"step {last}, "):
        run(out_dir="out", eval_interval=100)
    assert steps("out") == []


# --- Signals


def test_the_save_signal_saves_and_training_continues(run: Run, signal_at: SignalAt):
    run(out_dir="whole", eval_interval=100)
    signal_at(5, signal.SIGUSR1)
    assert run(out_dir="out", eval_interval=100, keep_every=1) == 0
    assert steps("out") == [7, 20]  # read a step late
    assert losses("out") == losses("whole")


def test_a_signal_to_the_process_saves_and_ends_it(letters: Path, tmp_path: Path):
    # Long enough to be stopped in mid-run; if the test fails, it ends by itself.
    keys = {"dataset": letters, "max_iters": 20_000, "eval_interval": 10**6, "out_dir": tmp_path / "out"}
    command = [sys.executable, ROOT / "train.py", *flags(**keys)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment(), stdout=pipe, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        assert any(line.startswith("step     20") for line in process.stdout)
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 130
    (step,) = steps(tmp_path / "out")
    assert step >= 20
    assert f"stopped at step {step} by a signal; saved: resume with --out_dir=" in output
    assert "Traceback" not in output
    assert metrics(tmp_path / "out")[-1]["step"] == step
    assert checkpoint.load(tmp_path / f"out/ckpt/step-{step:06d}").state["samples"] == 4 * step


# --- Weights and data from elsewhere


def loss_of(model: Any, letters: Path, T: int) -> float:
    """transformers' loss on the whole validation split in windows of T."""
    x, y = EvalWindows(open_dataset(letters, block_size=T).val, T, 0, 1, 4)[0 : 10**6]
    with torch.no_grad():
        return torch.nn.functional.cross_entropy(model(x).logits.flatten(0, 1), y.flatten()).item()


@pytest.mark.parametrize(("kind", "block_size"), [("hugging face", 12), ("nanogpt", ...), ("ours", 12)])
def test_training_starts_from_existing_weights(run: Run, letters: Path, foreign: Any, kind: str, block_size: Any):
    source = "theirs"
    foreign.save_pretrained(source)
    if kind == "nanogpt":
        source = "ckpt.pt"
        foreign = save_as_nanogpt(foreign, Path(source))
    if kind == "ours":
        source = "first"
        run(out_dir=source, init_from="theirs", max_iters=0, block_size=..., **NO_SIZES)
    run(out_dir="out", init_from=source, block_size=block_size, eval_iters=0, max_iters=4, **NO_SIZES)
    T = 32 if block_size is ... else block_size
    assert metrics("out", "val_loss")[0][0] == pytest.approx(loss_of(foreign, letters, T), rel=1e-5)
    assert metrics("out", "val_loss")[-1] < metrics("out", "val_loss")[0]
    state = checkpoint.load(Path("out/ckpt/step-000004")).state
    assert state["model"]["block_size"] == state["config"]["block_size"] == T
    assert state["config"]["n_embd"] == 24
    assert state["model"]["gelu"] == ("erf" if kind == "nanogpt" else "tanh")
    assert (state["step"], state["samples"]) == (4, 16)  # a new run with its own counts
    assert run(out_dir="out", resume=True, max_iters=6, block_size=..., **NO_SIZES) == 0


def test_a_dataset_without_meta_json_is_accepted(run: Run, letters: Path, capsys: pytest.CaptureFixture[str]):
    """Ids alone are GPT-2's; with a tokenizer its vocabulary counts."""
    Path("bare").mkdir()
    for split in ("train", "val"):
        Path(f"bare/{split}.bin").write_bytes((letters / f"{split}.bin").read_bytes())
    run(dataset="bare", out_dir="out", max_iters=1)
    assert "assuming GPT-2's encoding" in capsys.readouterr().out
    assert GPT.from_checkpoint("out").config.vocab_size == 50257
    Tokenizer.characters("abcde").save("bare")
    run(dataset="bare", out_dir="out", max_iters=1)
    assert GPT.from_checkpoint("out").config.vocab_size == 5
