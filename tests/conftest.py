"""Shared fixtures: small datasets from a known source, and train.py run inside this process."""

import json
import os
import runpy
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_data import LETTERS, Source, shard, write_letters

import export
import train
from model import GPT
from nanogpt import checkpoint, trials
from nanogpt.generate import low_precision
from nanogpt.generate.sampling import window_start
from nanogpt.schedule import StepSchedule

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
NO_SIZES: dict[str, Any] = dict.fromkeys(("n_layer", "n_head", "n_embd", "bias"), ...)  # those of existing weights
Run = Callable[..., int]
Export = Callable[..., Path]
AtStep = Callable[[int, Callable[[], Any]], None]
SignalAt = Callable[[int, int], None]


def flags(*files: str, **keys: Any) -> list[str]:
    """The command line of a tiny run; a key that is `...` keeps its default."""
    return [*files, *(f"--{name}={value}" for name, value in (TINY | keys).items() if value is not ...)]


def call_main(main: Callable[[], Any], *words: str) -> Any:
    """Call a script's main in this process, with these words as its command line; then handle signals as before."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["script.py", *words])
            return main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run_script(script: str, *words: str) -> int:
    """Run a script in this process, as `python` does in one of its own; return its exit status."""
    try:
        call_main(partial(runpy.run_path, str(ROOT / script), run_name="__main__"), *words)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture
def source() -> Source:
    return Source(seed=5)


@pytest.fixture(scope="session")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset drawn from a source such as `source`."""
    folder = tmp_path_factory.mktemp("data") / "letters"
    write_letters(folder, Source(seed=5))
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
    return lambda *files, **keys: call_main(train.main, *flags(*files, **{"dataset": letters} | keys))


@pytest.fixture
def run_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Export:
    """`run_export("to", "--flag" …)`: what export.py wrote, in an empty directory and without a network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def call(to: str, *flags: str) -> Path:
        call_main(export.main, f"--to={to}", *flags)
        return Path(to)

    return call


@pytest.fixture(autouse=True)
def no_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing depends on this machine's speed, nor writes to the home directory."""
    monkeypatch.setattr(trials, "bfloat16_speedup", lambda *_: 1.0)
    monkeypatch.setattr(low_precision, "load_or_measure", lambda *_: 1.0)


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


def snapshot(folder: str | Path) -> dict[Path, bytes | None]:
    """The files of a folder with their content, and the folders in it."""
    return {path: path.read_bytes() if path.is_file() else None for path in Path(folder).rglob("*")}


def torchrun(processes: int) -> list[str]:
    """The command that starts a script in some processes."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]


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
