"""Shared fixtures: small datasets from a known source, and train.py run inside this process."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_data import LETTERS, Source, shard

import train
from model import GPT
from nanogpt import checkpoint, trials
from nanogpt.data.write import write_dataset
from nanogpt.generate import low_precision
from nanogpt.generate.sampling import window_start
from nanogpt.schedule import StepSchedule
from nanogpt.text.tokenizer import Tokenizer

ROOT = Path(train.__file__).resolve().parent
if (TIKTOKEN_CACHE := ROOT.parent / "shared/data/tiktoken").exists():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(TIKTOKEN_CACHE))
needs_gpt2 = pytest.mark.skipif(
    "TIKTOKEN_CACHE_DIR" not in os.environ, reason="GPT-2's encoding needs the network, or TIKTOKEN_CACHE_DIR"
)
# A shell starts background jobs with SIGINT ignored, and the programs that the tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # a tiny model gains nothing by more, and on a busy machine threads wait for each other
TIMED_FIELDS = ("time_s", "tokens_per_s", "mfu")  # of metrics.jsonl
# A run of a second; each test says in what it differs.
TINY: dict[str, Any] = {
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 16,
    "block_size": 16,
    "bias": True,
    "batch_size": 4,
    "gradient_accumulation_steps": 1,
    "row_order": "random",
    "max_iters": 20,
    "learning_rate": 1e-2,
    "warmup_iters": 2,
    "lr_decay_iters": 20,
    "eval_interval": 8,
    "eval_iters": 2,
    "log_interval": 1,
    "sample_chars": 0,
    "device": "cpu",
    "dtype": "float32",
    "compile": False,
}
Run = Callable[..., int]
AtStep = Callable[[int, Callable[[], Any]], None]
SignalAt = Callable[[int, int], None]


def flags(*files: str, **keys: Any) -> list[str]:
    """The command line of a tiny run; a key that is `...` keeps its default."""
    return [*files, *(f"--{name}={value}" for name, value in (TINY | keys).items() if value is not ...)]


@pytest.fixture
def source() -> Source:
    return Source(seed=5)


@pytest.fixture(scope="session")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset drawn from a source such as `source`."""
    source = Source(seed=5)
    folder = tmp_path_factory.mktemp("data") / "letters"
    splits = {"train": [source.draw(20_000)], "val": [source.draw(2_000)]}
    write_dataset(folder, splits, Tokenizer.characters(LETTERS))
    return folder


MIXTURE: dict[str, Any] = {"dataset": "one:0.7,two:0.3", "mask_documents": True, "row_order": "epoch"}


@pytest.fixture(scope="session")
def one_and_two(letters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the two sharded datasets of `MIXTURE`: documents end with "d", loss masks vary from row to row."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    for name, tokens in (("one", 999), ("two", 170)):
        shutil.copytree(letters, folder / name)
        meta = json.loads((folder / name / "meta.json").read_text())
        meta["splits"]["val"]["bytes"] = 4000
        meta["end_of_text"] = LETTERS.index("d")
        (folder / name / "meta.json").write_text(json.dumps(meta))
        shares = np.repeat([0.9, 0.1, 0.0, 0.4], 16)  # of the targets that count, by turns
        lengths = {split: info["tokens"] for split, info in meta["splits"].items()}
        masks = {split: random.random(n) < np.resize(shares, n) for split, n in lengths.items()}
        if name == "two":
            masks["val"] = np.ones(lengths["val"])
        shard(folder / name, tokens, masks)
    return folder


@pytest.fixture
def run(letters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run(*files, key=value …)`: train.py's main with TINY's keys in an empty directory; returns its exit status."""
    monkeypatch.chdir(tmp_path)
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    handlers = {number: signal.getsignal(number) for number in signals}

    def run_train(*files: str, **keys: Any) -> int:
        monkeypatch.setattr(sys, "argv", ["train.py", *flags(*files, **{"dataset": letters} | keys)])
        try:
            return train.main()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    return run_train


@pytest.fixture(autouse=True)
def no_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing depends on this machine's speed, nor writes to the home directory."""
    monkeypatch.setattr(trials, "bfloat16_speed", lambda *_: 1.0)
    monkeypatch.setattr(low_precision, "recall", lambda *_: 1.0)


@pytest.fixture
def foreign() -> Any:
    """transformers' GPT-2 of LETTERS with random weights."""
    from random_models import build_gpt2

    return build_gpt2(n_embd=24, vocab_size=len(LETTERS), n_positions=32)


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> AtStep:
    """`at_step(step, action)`: calls the action once, in the update after `step`."""

    def arrange(step: int, action: Callable[[], Any]) -> None:
        original = StepSchedule.lr_scale
        pending = [step]

        def lr_scale(schedule: StepSchedule, at: int) -> float:
            if pending == [at]:
                pending.clear()
                action()
            return original(schedule, at)

        monkeypatch.setattr(StepSchedule, "lr_scale", lr_scale)

    return arrange


@pytest.fixture
def signal_at(at_step: AtStep) -> SignalAt:
    """`signal_at(step, number)`: this process gets the signal once, in the update after `step`."""
    return lambda step, number: at_step(step, lambda: signal.raise_signal(number))


def metrics(out_dir: str | Path, *fields: str) -> list[Any]:
    """The lines of metrics.jsonl without TIMED_FIELDS; with `fields`, tuples of these from the lines that have all."""
    lines = [json.loads(text) for text in (Path(out_dir) / "metrics.jsonl").read_text().splitlines()]
    if fields:
        return [tuple(line[field] for field in fields) for line in lines if set(fields) <= set(line)]
    return [{name: value for name, value in line.items() if name not in TIMED_FIELDS} for line in lines]


def steps(out_dir: str | Path) -> list[int]:
    """The steps of a run's checkpoints, ascending."""
    return sorted(int(path.name[5:]) for path in checkpoint.list_checkpoints(Path(out_dir)))


def assert_same_checkpoint(one: str | Path, other: str | Path, step: int) -> None:
    """Weights, optimizer and counters of two runs at `step` are equal to the bit."""
    a, b = (checkpoint.load(Path(out_dir) / "ckpt" / f"step-{step:06d}") for out_dir in (one, other))
    for ours, theirs in ((a.model, b.model), (a.optimizer, b.optimizer)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    counters = ("step", "samples", "val_loss", "best_val_loss", "scaler", "guard", "model")
    assert [a.state[name] for name in counters] == [b.state[name] for name in counters]


def environment() -> dict[str, str]:
    """For subprocesses: the root and tests/ can be imported, no network, one thread."""
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    return os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@torch.no_grad()
def plain_logprobs(model: GPT, ids: list[int]) -> torch.Tensor:
    """Log-probability in nats of each id after the first, (len(ids) - 1,), from a forward pass of its window."""
    model.eval()
    logprobs = torch.zeros(len(ids) - 1)
    for n in range(1, len(ids)):
        window = torch.tensor([ids[window_start(n, model.config.block_size) : n]])
        logprobs[n - 1] = model(window)[0][0, -1].log_softmax(-1)[ids[n]]
    return logprobs
