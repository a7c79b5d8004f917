"""Documents by datatrove's tasks against the same documents by data/prepare.py."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, environment

from nanogpt.data.dataset import open_dataset
from nanogpt.errors import InputError
from nanogpt.text.pipeline import Shards, join, task_folder
from nanogpt.text.prepare import hash_fraction
from nanogpt.text.tokenizer import Tokenizer

DOCS = [f"Document {i}: " + "word " * (i % 30) + "😀\n" for i in range(400)]


class Text:
    def __init__(self, text: str):
        self.text = text


def expected(tokenizer: Tokenizer, split: str, share: float) -> list[int]:
    texts = [text for text in DOCS if (hash_fraction(text.encode()) < share) == (split == "val")]
    return [i for text in texts for i in [*tokenizer.encode_ordinary(text).tolist(), tokenizer.end_of_text]]


def test_tasks_make_one_dataset(tmp_path: Path):
    tokenizer = Tokenizer.bytes()
    step = Shards(tmp_path / "out", tokenizer, val_share=0.2, shard_tokens=5000)
    for rank in (2, 0):
        assert [*step(map(Text, DOCS[rank * 150 : (rank + 1) * 150]), rank, 3)] == []
    with pytest.raises(InputError, match="task 1 is not done"):
        join(tmp_path / "out", tokenizer)
    with pytest.raises(RuntimeError):
        [*step(broken(), 1, 3)]
    with pytest.raises(InputError, match="task 1 is not done"):
        join(tmp_path / "out", tokenizer)
    [*step(map(Text, DOCS[150:300]), 1, 3)]
    # killed while it moved files
    os.replace(task_folder(tmp_path / "out", 0) / "train-00000.bin", tmp_path / "out/preparing/train-00000.bin")
    meta = join(tmp_path / "out", tokenizer)
    data = open_dataset(tmp_path / "out", block_size=8, verify=True)
    assert data.train[:].tolist() == expected(tokenizer, "train", 0.2)
    assert data.val[:].tolist() == expected(tokenizer, "val", 0.2)
    assert sum(part["documents"] for part in meta["splits"].values()) == len(DOCS)
    assert meta["splits"]["train"]["bytes"] == len(data.train) - meta["splits"]["train"]["documents"]
    assert not (tmp_path / "out/preparing").exists()


def broken():
    yield from map(Text, DOCS[150:200])
    raise RuntimeError


@pytest.mark.slow
def test_by_datatrove(tmp_path: Path):
    """The script, on parquet files, with two tasks at a time; a task of no document is none of trouble."""
    pytest.importorskip("datatrove")
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "in").mkdir()
    for k in range(4):
        part = DOCS[100 * k : 100 * (k + 1)]
        parquet.write_table(pa.table({"text": part, "id": list(map(str, range(100)))}), tmp_path / f"in/{k}.parquet")
    Tokenizer.bytes().save(tmp_path)
    script = [
        sys.executable,
        ROOT / "data/fineweb/prepare.py",
        f"--input={tmp_path / 'in'}",
        f"--out={tmp_path / 'out'}",
    ]
    flags = [f"--tokenizer={tmp_path / 'tokenizer.json'}", "--val_share=0.2", "--tasks=5", "--workers=2"]
    done = subprocess.run([*script, *flags], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    data = open_dataset(tmp_path / "out", block_size=8, verify=True)
    for split, tokens in (("train", data.train), ("val", data.val)):
        documents = np.split(tokens[:], np.flatnonzero(tokens[:] == 256) + 1)
        told = sorted(bytes(ids[:-1].astype("u1")).decode() for ids in documents if len(ids))
        assert told == sorted(text for text in DOCS if (hash_fraction(text.encode()) < 0.2) == (split == "val"))
