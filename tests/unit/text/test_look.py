"""data/look.py against counts by hand and the rows of a run."""

import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, Run
from small_data import shard

from nanogpt.data.dataset import open_dataset
from nanogpt.data.rows import Rows
from nanogpt.data.write import write_dataset
from nanogpt.errors import InputError
from nanogpt.text.tokenizer import Tokenizer

Look = Callable[..., str]
WORDS = ["a", "bb", "ccc", "dddd", "Größe"]


@pytest.fixture
def look(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Look:
    def call(*flags: object) -> str:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["look.py", *map(str, flags)])
        runpy.run_path(str(ROOT / "data/look.py"))["main"]()
        return capsys.readouterr().out

    return call


def make(folder: Path, documents: list[str]) -> np.ndarray:
    tokenizer = Tokenizer.bytes()
    ids = np.concatenate([[*text.encode(), 256] for text in documents]).astype(np.uint32)
    write_dataset(folder, {"train": [ids], "val": [ids]}, tokenizer, {"train": len(ids), "val": len(ids)})
    return ids


def test_counts(look: Look, tmp_path: Path):
    draw = np.random.default_rng(0)
    documents = [WORDS[k] * 2 for k in draw.integers(0, len(WORDS), 500)]
    ids = make(tmp_path, documents)
    told = look(tmp_path, "--windows=2", "--length=9")
    assert f"train: {len(ids):,} tokens, 1.000 bytes of text a token\nvocabulary: 257 ids (byte)" in told
    counts = np.bincount(ids)
    assert f"ids that do not occur: {257 - np.count_nonzero(counts)}" in told
    for byte in (256, ord("d"), ord("ö".encode()[1:].decode("latin-1"))):
        assert re.search(rf"{100 * counts[byte] / len(ids):.3f}% +{byte}  '", told)
    lengths = [len(text.encode()) + 1 for text in documents]
    facts = f"lengths of 500 documents in tokens: median {int(np.median(lengths))}, mean {np.mean(lengths):.1f}"
    assert f"{facts}, longest {max(lengths)}" in told
    bins = {low: sum(low <= length < 2 * low for length in lengths) for low in (2, 4, 8)}
    for low, count in bins.items():
        assert re.search(rf"\n +{low} to {2 * low - 1} +█+ {count}\n", told)
    windows = re.findall(r"train.bin, token ([\d,]+)\n", told)
    assert len(windows) == 2
    for window in windows:
        first = int(window.replace(",", ""))
        assert Tokenizer.bytes().decode(ids[first : first + 9].tolist()) in told


def test_a_part_is_counted_in_spread_blocks(look: Look, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Documents of three tokens: what is cut off at the border of a block that was left out must not be counted."""
    ids = make(tmp_path, ["ab"] * 1000)
    source = (ROOT / "data/look.py").read_text().replace("BLOCK = 2**22", "BLOCK = 100")
    (tmp_path / "look.py").write_text(source)
    monkeypatch.setattr(sys, "argv", ["look.py", str(tmp_path), "--count=1500"])
    told = []
    monkeypatch.setattr("builtins.print", lambda *words, **how: told.append(" ".join(map(str, words))))
    runpy.run_path(str(tmp_path / "look.py"))["main"]()
    assert "counted: 1,500 tokens, evenly spread" in told
    assert any("median 3, " in line for line in told)
    assert any("mean 3.0, longest 3" in line for line in told)
    assert len(ids) == 3000


def test_the_rows_of_a_step(look: Look, run: Run, letters: Path):
    keys = {"row_order": "epoch", "seed": 5, "batch_size": 3, "gradient_accumulation_steps": 2, "max_iters": 8}
    run(out_dir="out", **keys)
    tokens = open_dataset(letters, block_size=16).train
    x, _ = Rows(tokens, 16, 4, 5, "epoch")[6 * 4 : 6 * 5]
    rows = ["".join("abcd"[i] for i in row) for row in x.tolist()]
    by_run = look("--run=out", "--step=4")
    sizes = ["--batch_size=3", "--gradient_accumulation_steps=2", "--block_size=16"]
    by_keys = look(letters, "--step=4", "--seed=5", "--row_order=epoch", *sizes)
    for told in (by_run, by_keys):
        assert "update 4 to 5: 6 rows of 16 tokens" in told
        assert re.findall(r"\n([abcd]{16})(?=\n|$)", told) == rows
    assert [int(n) for n in re.findall(r"--- row (\d+):", by_run)] == [*range(24, 30)]


def test_what_counts_is_marked(look: Look, tmp_path: Path):
    ids = make(tmp_path, ["ask answer"] * 50)
    mask = np.resize([0] * 4 + [1] * 7, len(ids))
    shard(tmp_path, len(ids), {"train": mask, "val": mask})
    told = look(tmp_path, "--windows=3", "--length=22")
    assert "the loss looks at 63.6% of the tokens" in told
    assert "ask ⟦answer<|endoftext|>⟧" in told
    assert "6" in re.findall(r"([\d.]+)% counted", look(tmp_path, "--step=0", "--batch_size=1", "--block_size=22"))[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nothing"], "there is no dataset 'nothing'"),
        ([], "no dataset was named"),
        (["letters", "--count=0"], "--count and --length count from 1 up"),
        (["letters", "--step=1", "--row_order=x"], "it is random or epoch"),
        (["letters", "--step=1", "--block_size=99999"], "shorter than one block"),
        (["letters", "--run=nowhere"], "holds no checkpoint"),
    ],
)
def test_what_cannot_be_looked_at(flags: list[str], message: str, look: Look, letters: Path):
    with pytest.raises(InputError, match=message):
        look(*(str(letters) if flag == "letters" else flag for flag in flags))


def test_a_mixture(look: Look, tmp_path: Path):
    make(tmp_path / "a", ["aa"] * 20)
    make(tmp_path / "b", ["bb"] * 20)
    sizes = ["--batch_size=2", "--gradient_accumulation_steps=1", "--block_size=8"]
    told = look(f"{tmp_path}/a:0.5,{tmp_path}/b:0.5", "--step=0", *sizes)
    assert f"{tmp_path}/a/train.bin" in told
    assert f"{tmp_path}/b/train.bin" in told
    assert json.loads((tmp_path / "a/meta.json").read_text())["vocab_size"] == 257
