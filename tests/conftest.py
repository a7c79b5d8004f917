"""What several test files use: a small dataset whose source is known, and train.py run inside this process."""

import hashlib
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
import transformers

import train
from nanogpt import checkpoint
from nanogpt.data.write import write_dataset
from nanogpt.text.tokenizer import Tokenizer

ROOT = Path(train.__file__).resolve().parent
LETTERS = "abcd"
# A shell gives what it runs in the background SIGINT ignored, and so would each program that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # a tiny model gains nothing by more, and on a busy machine threads wait for each other
# A run of two seconds at most; each test says in what it differs.
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


def flags(*files: str, **keys: Any) -> list[str]:
    """The command line of a tiny run; a key that is `...` is left to its default."""
    return [*files, *(f"--{name}={value}" for name, value in (TINY | keys).items() if value is not ...)]


class Source:
    """A random text of which all is known: the odds of each letter given the two before it.

    Attributes: `odds` (4, 4, 4), P(next | last but one, last); `pairs` (4, 4), the share of each pair in a long text.
    """

    def __init__(self, seed: int):
        self.random = np.random.default_rng(seed)
        n = len(LETTERS)
        self.odds = 0.95 * self.random.dirichlet(np.full(n, 0.3), size=(n, n)) + 0.05 / n
        self.pairs = np.full((n, n), 1 / n**2)
        for _ in range(1000):  # the stationary distribution, by following the source
            self.pairs = np.einsum("ab,abc->bc", self.pairs, self.odds)

    def draw(self, count: int) -> np.ndarray:
        thresholds, where = self.odds.cumsum(-1), self.random.random(count)
        ids = [0, 0]
        for x in where:
            ids.append(min(int(np.searchsorted(thresholds[ids[-2], ids[-1]], x, side="right")), len(LETTERS) - 1))
        return np.array(ids[2:])

    def loss(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """−log P(y | what the window x shows of its past), in nats, both (B, T): nobody can know more. The first letter
        of a window shows itself alone, so what stood before it is summed over."""
        from_one = np.einsum("ab,abc->bc", self.pairs, self.odds) / self.pairs.sum(0)[:, None]
        known = np.empty(x.shape)
        known[:, 0] = from_one[x[:, 0], y[:, 0]]
        known[:, 1:] = self.odds[x[:, :-1], x[:, 1:], y[:, 1:]]
        return -np.log(known)


@pytest.fixture(scope="session")
def source() -> Source:
    return Source(seed=5)


@pytest.fixture(scope="session")
def letters(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset drawn from `source`."""
    folder = tmp_path_factory.mktemp("data") / "letters"
    splits = {"train": [source.draw(20_000)], "val": [source.draw(2_000)]}
    write_dataset(folder, splits, Tokenizer.characters(LETTERS))
    return folder


def shard(folder: Path, tokens: int, mask: dict[str, np.ndarray] | None = None) -> None:
    """Cut each split of a dataset into files of so many tokens, and put a loss mask beside them."""
    meta = json.loads((folder / "meta.json").read_text())
    for split, facts in meta["splits"].items():
        whole = folder / f"{split}.bin"
        ids = np.fromfile(whole, meta["dtype"])
        whole.unlink()
        del facts["sha256"]
        facts["shards"] = []
        for k, first in enumerate(range(0, len(ids), tokens)):
            piece, path = ids[first : first + tokens], folder / f"{split}-{k:05d}.bin"
            piece.tofile(path)
            listed = {"file": path.name, "tokens": len(piece), "sha256": hashlib.sha256(piece.tobytes()).hexdigest()}
            if mask:
                part = mask[split][first : first + tokens].astype(np.uint8)
                part.tofile(path.with_suffix(".mask"))
                listed["mask_sha256"] = hashlib.sha256(part.tobytes()).hexdigest()
            facts["shards"].append(listed)
    (folder / "meta.json").write_text(json.dumps(meta | ({"loss_mask": True} if mask else {})))


ALL_OF_IT: dict[str, Any] = {"dataset": "one:0.7,two:0.3", "mask_documents": True, "row_order": "epoch"}


@pytest.fixture(scope="session")
def one_and_two(letters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two datasets in many shards, whose loss masks leave some rows much, some little and some nothing,
    and whose documents end with a d; for `ALL_OF_IT`."""
    folder, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name, size in (("one", 999), ("two", 170)):
        shutil.copytree(letters, folder / name)
        meta = json.loads((folder / name / "meta.json").read_text())
        meta["splits"]["val"]["bytes"] = 4000
        (folder / name / "meta.json").write_text(json.dumps(meta | {"end_of_text": 3}))
        share = np.repeat([0.9, 0.1, 0.0, 0.4], 16)  # by turns
        lengths = {split: facts["tokens"] for split, facts in meta["splits"].items()}
        masks = {split: random.random(n) < np.resize(share, n) for split, n in lengths.items()}
        shard(folder / name, size, masks if name == "one" else masks | {"val": np.ones(lengths["val"])})
    return folder


@pytest.fixture
def run(letters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run(*files, key=value …)`: train.py's main with a tiny run's keys in an empty folder; returns its status."""
    monkeypatch.chdir(tmp_path)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run_train(*files: str, **keys: Any) -> int:
        monkeypatch.setattr(sys, "argv", ["train.py", *flags(*files, **{"dataset": letters} | keys)])
        try:
            return train.main()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    return run_train


@pytest.fixture
def foreign() -> Any:
    """transformers' model of our four letters, of nobody's training, away from its special start."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 24, "vocab_size": 4, "n_positions": 32}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(**sizes, **no_dropout, initializer_range=0.3, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(3)
    return transformers.GPT2LMHeadModel(config).eval()


def save_as_nanogpt(model: Any, path: Path, **more: Any) -> Any:
    """Write `model`'s weights in the layout of nanoGPT's ckpt.pt (after torch.compile), whose matrices are
    (out, in). Returns transformers' model of the function that they have in nanoGPT, whose GELU is the exact one."""
    tensors = {n: t.t().contiguous() if ".c_" in n and t.dim() == 2 else t for n, t in model.state_dict().items()}
    c = model.config
    args = {"n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd, "block_size": c.n_positions, "bias": True}
    args |= {"vocab_size": c.vocab_size, "dropout": 0.0}
    content = {"model": {f"_orig_mod.{n}": t for n, t in tensors.items()}, "model_args": args, "iter_num": 7}
    torch.save(content | {"best_val_loss": torch.tensor(1.3)} | more, path)
    exact = type(model)(transformers.GPT2Config.from_dict(c.to_dict() | {"activation_function": "gelu"})).eval()
    exact.load_state_dict(model.state_dict())
    return exact


@pytest.fixture
def signal_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """`signal_at(step, number)`: this process gets the signal once, at the beginning of the update after `step`."""

    def arrange(step: int, number: int) -> None:
        original, pending = train.TrainConfig.learning_rate_at, [step]

        def learning_rate_at(config: train.TrainConfig, at: int) -> float:
            if pending == [at]:
                pending.clear()
                signal.raise_signal(number)
            return original(config, at)

        monkeypatch.setattr(train.TrainConfig, "learning_rate_at", learning_rate_at)

    return arrange


def metrics(out_dir: str | Path, *fields: str) -> list[Any]:
    """The lines of metrics.jsonl without what a clock decides; of those with `fields`, these fields alone."""
    timed = ("time_s", "tokens_per_s", "mfu")
    lines = [json.loads(line) for line in (Path(out_dir) / "metrics.jsonl").read_text().splitlines()]
    lines = [{name: value for name, value in line.items() if name not in timed} for line in lines]
    return [tuple(line[f] for f in fields) for line in lines if set(fields) <= set(line)] if fields else lines


def steps(out_dir: str | Path) -> list[int]:
    """The steps of the checkpoints there are, the oldest first."""
    return sorted(int(path.name[5:]) for path in checkpoint.list_checkpoints(Path(out_dir)))


def assert_same_checkpoint(one: str | Path, other: str | Path, step: int) -> None:
    """Weights, optimizer and counters of two runs at `step` are equal to the bit."""
    a, b = (checkpoint.load(Path(out_dir) / "ckpt" / f"step-{step:06d}") for out_dir in (one, other))
    for ours, theirs in ((a.model, b.model), (a.optimizer, b.optimizer)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    counters = ("step", "samples", "val_loss", "best_val_loss", "scaler", "model")
    assert [a.state[name] for name in counters] == [b.state[name] for name in counters]
    moved = [name for name in a.optimizer if name.endswith("/momentum")]  # Muon's; AdamW has a step and two moments
    assert len(a.optimizer) == len(moved) + 3 * (len(a.model) - len(moved)) > 0


def environment() -> dict[str, str]:
    """For subprocesses: the root can be imported, nobody asks the network, and one thread is enough."""
    return os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
