"""data/look.py against counts by hand and the rows of a run."""

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, Run
from small_data import shard

from nanogpt import checkpoint
from nanogpt.data.dataset import open_dataset
from nanogpt.data.rows import Rows
from nanogpt.data.write import write_dataset
from nanogpt.errors import InputError
from nanogpt.files import read_json
from nanogpt.text.tokenizer import Tokenizer

Look = Callable[..., str]
WORDS = ["a", "bb", "ccc", "dddd", "Größe"]


@pytest.fixture
def look(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Look:
    """`look(*flags, block_tokens=N)`: the output of data/look.py."""

    def call(*flags: object, block_tokens: int = 2**22) -> str:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["look.py", *map(str, flags)])
        main = runpy.run_path(str(ROOT / "data/look.py"))["main"]
        main.__globals__["BLOCK_TOKENS"] = block_tokens
        main()
        return capsys.readouterr().out

    return call


def make(folder: Path, documents: list[str]) -> np.ndarray:
    ids = np.concatenate([[*text.encode(), 256] for text in documents]).astype(np.uint32)
    splits = {"train": [ids], "val": [ids]}
    write_dataset(folder, splits, Tokenizer.bytes(), {"train": len(ids), "val": len(ids)})
    return ids


@pytest.mark.parametrize("block_tokens", [100, 2**22])
def test_counts_are_those_by_hand(block_tokens: int, look: Look, tmp_path: Path):
    rng = np.random.default_rng(0)
    documents = [WORDS[k] * 2 for k in rng.integers(0, len(WORDS), 500)]
    ids = make(tmp_path, documents)
    output = look(tmp_path, "--windows=2", "--length=9", block_tokens=block_tokens)
    assert f"train: {len(ids):,} tokens, 1.000 bytes of text a token\nvocabulary: 257 ids (byte)" in output
    counts = np.bincount(ids)
    assert f"ids that do not occur: {257 - np.count_nonzero(counts)}" in output
    for byte in (256, ord("d"), "ö".encode()[1]):
        assert re.search(rf"{100 * counts[byte] / len(ids):.3f}% +{byte}  '", output)
    lengths = [len(text.encode()) + 1 for text in documents]
    summary = f"lengths of 500 documents in tokens: median {int(np.median(lengths))}, mean {np.mean(lengths):.1f}"
    assert f"{summary}, longest {max(lengths)}" in output
    for low in (2, 4, 8):
        count = sum(low <= length < 2 * low for length in lengths)
        assert re.search(rf"\n +{low} to {2 * low - 1} +█+ {count}\n", output)
    windows = re.findall(r"train.bin, token ([\d,]+)\n", output)
    assert len(windows) == 2
    for window in windows:
        first = int(window.replace(",", ""))
        assert Tokenizer.bytes().decode(ids[first : first + 9].tolist()) in output


def test_documents_cut_by_gaps_between_blocks_are_not_counted(look: Look, tmp_path: Path):
    make(tmp_path, ["ab"] * 1000)
    output = look(tmp_path, "--count=1500", block_tokens=100)
    assert "counted: 1,500 tokens, evenly spread" in output
    assert "median 3, mean 3.0, longest 3" in output


def test_rows_of_a_step_are_those_of_the_run(look: Look, run: Run, letters: Path):
    keys = {"row_order": "epoch", "seed": 5, "batch_size": 3, "gradient_accumulation_steps": 2, "max_iters": 8}
    run(out_dir="out", **keys)
    tokens = open_dataset(letters, block_size=16).train
    x, _ = Rows(tokens, 16, 4, 5, "epoch")[6 * 4 : 6 * 5]
    rows = ["".join("abcd"[i] for i in row) for row in x.tolist()]
    sizes = ["--batch_size=3", "--gradient_accumulation_steps=2", "--block_size=16"]
    by_run = look("--run=out", "--step=4")
    by_keys = look(letters, "--step=4", "--seed=5", "--row_order=epoch", *sizes)
    for output in (by_run, by_keys):
        assert "update 4 to 5: 6 rows of 16 tokens" in output
        assert re.findall(r"\n([abcd]{16})(?=\n|$)", output) == rows
    assert [int(n) for n in re.findall(r"--- row (\d+):", by_run)] == [*range(24, 30)]
    assert look("--run=out", "--step=4", "--seed=6") != by_run


def test_rows_of_a_step_while_the_batch_grows(look: Look, run: Run, letters: Path):
    keys = {"batch_size": 2, "gradient_accumulation_steps": 3, "batch_growth_tokens": 16 * 20, "max_iters": 8}
    run(out_dir="out", **keys)
    # Two rows a step until two thirds of the growth have passed, at row 14; then four.
    samples = [read_json(path / "state.json")["samples"] for path in checkpoint.list_checkpoints(Path("out"))]
    numbers = [int(n) for n in re.findall(r"--- row (\d+):", look("--run=out", "--step=7"))]
    assert numbers == [*range(14, 18)]
    assert samples[0] == 18
    run(out_dir="out", resume=True, **keys | {"batch_size": 6, "batch_growth_tokens": 0, "max_iters": 9})
    with pytest.raises(InputError, match="its batch changed in a resume"):
        look("--run=out", "--step=7")


def test_targets_of_the_loss_are_marked(look: Look, tmp_path: Path):
    ids = make(tmp_path, ["ask answer"] * 50)
    mask = np.resize([0] * 4 + [1] * 7, len(ids))
    shard(tmp_path, len(ids), {"train": mask, "val": mask})
    output = look(tmp_path, "--windows=3", "--length=22")
    assert "targets of the loss: 63.6% of the tokens" in output
    assert "ask ⟦answer<|endoftext|>⟧" in output
    assert ", 63.6% targets\n" in look(tmp_path, "--step=0", "--batch_size=1", "--block_size=22")


def test_a_mixture_names_the_files(look: Look, tmp_path: Path):
    make(tmp_path / "a", ["aa"] * 20)
    make(tmp_path / "b", ["bb"] * 20)
    sizes = ["--batch_size=2", "--gradient_accumulation_steps=1", "--block_size=8"]
    output = look(f"{tmp_path}/a:0.5,{tmp_path}/b:0.5", "--step=0", *sizes)
    assert f"{tmp_path}/a/train.bin" in output
    assert f"{tmp_path}/b/train.bin" in output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nothing"], "there is no dataset 'nothing'"),
        ([], "no dataset: give a folder"),
        (["letters", "--count=0", "--step=-1"], "--count=0: must be at least 1.*\n--step=-1: must be at least 0"),
        (["letters", "--step=1", "--row_order=x"], "--row_order=x: expected random or epoch"),
        (["letters", "--step=1", "--block_size=99999"], "shorter than one block"),
        (["letters", "--run=nowhere"], "no checkpoint"),
    ],
)
def test_bad_flags_are_errors(flags: list[str], message: str, look: Look, letters: Path):
    with pytest.raises(InputError, match=message):
        look(*(str(letters) if flag == "letters" else flag for flag in flags))
