"""evaluate.py against arithmetic by hand and against chance: loss, standard error, flags, messages."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import call_main
from random_models import randomize, save_random_run
from small_data import Source

import evaluate
from model import GPT, GPTConfig
from nanogpt.data.dataset import Shard, Tokens, open_dataset
from nanogpt.data.rows import EvalWindows
from nanogpt.data.write import write_dataset
from nanogpt.distributed import World
from nanogpt.errors import InputError
from nanogpt.evaluation import evaluate as evaluate_windows
from nanogpt.text.tokenizer import Tokenizer

CPU = World(0, 1, torch.device("cpu"), torch.float32)
LETTERS = Tokenizer.characters("abcd")
Evaluate = Callable[..., dict[str, Any]]


@pytest.fixture
def run_evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Evaluate:
    """`run_evaluate("--flag" …)`: the results that evaluate.py writes."""
    monkeypatch.chdir(tmp_path)

    def call(*flags: str) -> dict[str, Any]:
        fixed = ["--device=cpu", "--dtype=float32", "--json=results.json"]
        call_main(evaluate.main, *fixed, *flags)
        return json.loads(Path("results.json").read_text())

    return call


@pytest.fixture
def model() -> GPT:
    """A model of four letters whose predictions differ from place to place."""
    torch.manual_seed(0)
    return randomize(GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=4, block_size=16, dropout=0.5)), 0.2)


def make_split(ids: np.ndarray, mask: np.ndarray | None = None) -> Tokens:
    map_mask = None if mask is None else lambda: mask.astype(np.uint8)
    return Tokens([Shard("ids", len(ids), lambda: ids.astype(np.uint16), map_mask)])


@torch.no_grad()
def losses_one_by_one(model: GPT, ids: np.ndarray, stride: int) -> np.ndarray:
    """−log P of each id after the first, each by its own forward pass in the first window that reaches it."""
    T, losses = model.config.block_size, []
    for at in range(1, len(ids)):
        start = next(start for start in range(0, len(ids), stride) if at <= start + T)
        row = torch.tensor(ids[start:at].astype(np.int64))[None]
        losses.append(-float(model(row)[0][0, -1].double().log_softmax(-1)[int(ids[at])]))
    return np.array(losses)


# --- The loss of a split


@pytest.mark.parametrize("tokens", [2, 17, 18, 70])
@pytest.mark.parametrize("stride", [1, 5, 16, 0])
def test_split_loss_takes_each_token_once_in_its_window(
    source: Source, model: GPT, monkeypatch: pytest.MonkeyPatch, tokens: int, stride: int
):
    monkeypatch.setattr(evaluate, "rows_to_score", lambda *_: 3)
    ids, mask = source.draw(tokens), np.arange(tokens) % 3 > 0
    each = losses_one_by_one(model, ids, stride or 16)
    loss, _, targets = evaluate.split_loss(model, make_split(ids), stride, CPU)
    assert (targets, loss) == (tokens - 1, pytest.approx(each.mean(), abs=1e-6))
    loss, _, targets = evaluate.split_loss(model, make_split(ids, mask), stride, CPU)
    assert (targets, loss) == (mask[1:].sum(), pytest.approx(each[mask[1:]].mean(), abs=1e-6))


def test_split_loss_of_full_windows_is_the_evaluation_of_training(source: Source, model: GPT):
    ids = source.draw(16 * 50 + 1)
    model.document_separator_id = 3
    tokens = make_split(ids, np.random.default_rng(0).random(len(ids)) < np.resize([0.9, 0.1, 0, 0], len(ids)))
    expected = evaluate_windows(model, EvalWindows(tokens, 16, 0, 7, 4), 7, CPU)
    assert evaluate.split_loss(model.eval(), tokens, 0, CPU)[0] == pytest.approx(expected, abs=1e-6)


def test_split_loss_weighs_the_parts_of_a_mixture(source: Source, model: GPT):
    one, two = source.draw(16 * 30 + 1), source.draw(16 * 5 + 1) // 2
    means = losses_one_by_one(model, one, 16).reshape(-1, 16).mean(1)
    loss_1, stderr_1, _ = evaluate.split_loss(model, make_split(one), 0, CPU)
    assert (loss_1, stderr_1) == (pytest.approx(means.mean()), pytest.approx(means.std(ddof=1) / math.sqrt(30)))
    loss_2, stderr_2, _ = evaluate.split_loss(model, make_split(two), 0, CPU)
    loss, stderr, targets = evaluate.split_loss(model, Tokens.mix([make_split(one), make_split(two)], [3, 1]), 0, CPU)
    assert (targets, loss) == (35 * 16, pytest.approx((3 * loss_1 + loss_2) / 4))
    # The difference between the parts is no sampling error.
    assert stderr == pytest.approx(math.hypot(3 * stderr_1, stderr_2) / 4, rel=1e-6)
    assert math.isnan(evaluate.split_loss(model, make_split(one[:17]), 0, CPU)[1])


@pytest.mark.parametrize(("kind", "stride"), [("plain", 0), ("plain", 4), ("masked", 0), ("mixed", 0), ("moody", 0)])
def test_standard_error_is_the_spread_of_other_splits(source: Source, model: GPT, kind: str, stride: int):
    """Splits drawn anew: their losses spread as their standard errors say."""
    random, draws = np.random.default_rng(7), Source(seed=11)

    def draw(size: int) -> Tokens:
        if kind == "moody":  # runs of windows with a single, easy letter
            is_easy = np.repeat(random.random(size // 50 + 1) < 0.5, 50)[:size]
            return make_split(np.where(is_easy, 2, random.integers(4, size=size)))
        # Some blocks have many targets, others few: a mean of the blocks' means would weigh them alike.
        density = np.repeat(random.choice([0.05, 0.9], -(-size // 16)), 16)[:size]
        return make_split(draws.draw(size), random.random(size) < density if kind == "masked" else None)

    pairs = []
    for _ in range(150):
        tokens = draw(16 * 64 * 8 if kind == "moody" else 500)
        if kind == "mixed":
            tokens = Tokens.mix([tokens, draw(200)], [1, 4])
        pairs.append(evaluate.split_loss(model, tokens, stride, CPU)[:2])
    losses, stderrs = np.array(pairs).T
    # The deviation of 150 draws is known to 6%.
    assert 0.82 < np.sqrt((stderrs**2).mean()) / losses.std(ddof=1) < 1.2


def test_split_loss_in_bfloat16_is_autocasts(source: Source, model: GPT):
    ids = source.draw(16 * 4 + 1)
    rows = torch.tensor(ids.astype(np.int64))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(rows[:-1].view(4, 16), rows[1:].view(4, 16))[0]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows[1:]).item()
    bfloat16 = World(0, 1, torch.device("cpu"), torch.bfloat16)
    assert evaluate.split_loss(model, make_split(ids), 0, bfloat16)[0] == pytest.approx(expected, abs=1e-6)
    assert evaluate.split_loss(model, make_split(ids), 0, CPU)[0] != pytest.approx(expected, abs=1e-5)
    with torch.no_grad():
        model.norm.weight[0] = math.inf
    with pytest.raises(InputError, match="NaN or inf logits"):
        evaluate.split_loss(model, make_split(ids), 0, CPU)


# --- The command


def test_evaluate_a_run_on_its_dataset(
    run_evaluate: Evaluate, letters: Path, one_and_two: Path, capsys: pytest.CaptureFixture[str]
):
    model = save_random_run("out", LETTERS, {"dataset": str(letters)}, block_size=16)
    results = run_evaluate("--out_dir=out")
    printed = capsys.readouterr()
    assert printed.err.splitlines() == ["evaluating out/ckpt/step-001234", "computing in float32"]
    assert printed.out.splitlines()[:3] == [
        "val of letters: 1,999 tokens",
        f"loss           {results['loss']:.4f} ± {results['loss_stderr']:.4f} nats per token",
        f"perplexity     {results['perplexity']:.4f} ± {results['perplexity_stderr']:.4f}",
    ]
    assert results["perplexity"] == pytest.approx(math.exp(results["loss"]))
    assert results["perplexity_stderr"] == pytest.approx(results["perplexity"] * results["loss_stderr"])
    assert results["bits_per_byte"] is None  # the dataset does not state its bytes
    assert results["model"] == "out/ckpt/step-001234"
    each = losses_one_by_one(model, np.fromfile(letters / "val.bin", np.uint16), 16)
    assert results["loss"] == pytest.approx(each.mean(), abs=1e-5)
    assert run_evaluate("--init_from=out", "--checkpoint=latest", "--split=train")["tokens"] == 19_999

    mixture = f"{one_and_two / 'one'}:0.7,{one_and_two / 'two'}:0.3"
    plain = run_evaluate("--out_dir=out", f"--dataset={mixture}")["loss"]
    save_random_run("documents", LETTERS, {"dataset": mixture, "mask_documents": True}, block_size=16)
    masked = run_evaluate("--out_dir=documents")["loss"]
    assert masked != pytest.approx(plain, abs=1e-3)
    model.document_separator_id = 3
    tokens = open_dataset(mixture, block_size=16).val
    assert masked == pytest.approx(evaluate.split_loss(model, tokens, 0, CPU)[0], abs=1e-9)


def test_evaluate_a_text_shorter_than_a_window(run_evaluate: Evaluate):
    save_random_run("out", LETTERS)
    Path("text.txt").write_bytes(b"abcd")
    results = run_evaluate("--out_dir=out", "--text=text.txt")
    assert (results["on"], results["tokens"], results["loss_stderr"]) == ("text.txt", 3, None)
    assert results["bits_per_byte"] == pytest.approx(results["loss"] / math.log(2))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks=a", "--stride=4", "--text=x"], "^--text: .*leave it out\n--stride: .*leave it out"),
        (["--tasks=a", "--include_path=no"], "^--include_path=no: is not a folder"),
        (["--tasks=a", "--limit=0"], "^--limit=0: must be at least 1"),
        (["--limit=3", "--chat=True"], "^--limit: .*leave it out\n--chat: .*leave it out"),
        (["--tasks="], "^--tasks is empty"),
        (["--text="], "^--text is empty"),
        (["--text=x", "--split=val"], "^--split: --text=x takes its place"),
        (["--json=nowhere/x.json"], "^--json=nowhere/x.json: cannot be written"),
        (["--stride=25"], "^--stride=25: .*give --stride=24 or less"),
        (["--dataset=other"], "^--dataset=other: its tokenizer is not the model's"),
        (["--dataset=five"], "id 4, but the model's vocab_size is 4"),
        (["--text=latin1.txt"], "^--text=latin1.txt: is not UTF-8 text"),
        (["--text=no.txt"], "^--text=no.txt: could not be read"),
        (["--text=short.txt"], "^--text=short.txt: has no token to predict"),
        (["--text=unknown.txt"], "'x'"),
        (["--init_from=exported"], "^--dataset is unknown"),
    ],
)
def test_evaluate_refuses(run_evaluate: Evaluate, letters: Path, flags: list[str], message: str):
    save_random_run("out", LETTERS, {"dataset": str(letters)})
    save_random_run("exported", LETTERS, {"dataset": None})
    write_dataset(Path("other"), {"train": [np.arange(4)], "val": [np.arange(4)]}, Tokenizer.characters("abce"))
    write_dataset(Path("five"), {"train": [np.arange(5)], "val": [np.arange(5)]}, Tokenizer.characters("abcde"))
    for name, content in (("latin1", b"abc\xff"), ("short", b"a"), ("unknown", b"abcx")):
        Path(f"{name}.txt").write_bytes(content)
    with pytest.raises(InputError, match=message):
        run_evaluate(*(flags if "--init_from" in flags[0] else ["--out_dir=out", *flags]))
    assert not Path("results.json").exists()


def test_evaluate_needs_one_process_and_lm_eval(run_evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(evaluate, "find_spec", lambda name: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"^evaluation runs in one process.*\n--tasks=a: lm_eval is not installed"):
        run_evaluate("--tasks=a")
