"""Documents by datatrove's tasks against the same documents by data/prepare.py."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
from conftest import ROOT, environment
from text_files import DOCS, documents_of

from nanogpt.data.dataset import open_dataset
from nanogpt.errors import InputError
from nanogpt.text.pipeline import Shards, join, task_folder
from nanogpt.text.tokenizer import Tokenizer


def records(texts: list[str]) -> Iterator[SimpleNamespace]:
    for text in texts:
        yield SimpleNamespace(text=text)


def interrupted() -> Iterator[SimpleNamespace]:
    yield from records(DOCS[100:150])
    raise RuntimeError


def test_a_normalizer_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    inner.normalizer = tokenizers.normalizers.NFC()
    Shards(tmp_path, Tokenizer(inner))
    assert "the tokenizer's normalizer changes some characters: NFC" in capsys.readouterr().out


def test_tasks_make_one_dataset(tmp_path: Path):
    out = tmp_path / "out"
    tokenizer = Tokenizer.bytes()
    step = Shards(out, tokenizer, val_share=0.2, shard_tokens=5000)
    for rank in (2, 0):
        assert not [*step(records(DOCS[rank * 100 : (rank + 1) * 100]), rank, 3)]
    with pytest.raises(RuntimeError):
        [*step(interrupted(), 1, 3)]
    with pytest.raises(InputError, match="task 1 is not done"):
        join(out, tokenizer)
    [*step(records(DOCS[100:200]), 1, 3)]

    # As after a kill while files are moved.
    shutil.copytree(out, tmp_path / "killed")
    os.replace(task_folder(tmp_path / "killed", 0) / "train-00000.bin", tmp_path / "killed/preparing/train-00000.bin")
    for folder in (out, tmp_path / "killed"):
        meta = join(folder, tokenizer)
        data = open_dataset(folder, block_size=8, verify=True)
        for split, tokens in (("train", data.train), ("val", data.val)):
            texts = documents_of(split, 0.2)
            expected = [[*tokenizer.encode_ordinary(text).tolist(), tokenizer.end_of_text] for text in texts]
            assert tokens[:].tolist() == [*itertools.chain(*expected)]
            assert meta["splits"][split]["documents"] == len(texts)
            assert meta["splits"][split]["bytes"] == sum(len(text.encode()) for text in texts)
        assert not (folder / "preparing").exists()


def test_a_kill_after_the_files_are_in_place_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tokenizer = Tokenizer.bytes()
    for rank in (0, 1):
        assert not [*Shards(tmp_path, tokenizer, val_share=0.2)(records(DOCS[rank::2]), rank, 2)]
    remove = shutil.rmtree

    def removal(path: Path) -> None:
        if path == tmp_path / "preparing":
            raise KeyboardInterrupt
        remove(path)

    monkeypatch.setattr(shutil, "rmtree", removal)
    with pytest.raises(KeyboardInterrupt):
        join(tmp_path, tokenizer)
    monkeypatch.setattr(shutil, "rmtree", remove)
    assert join(tmp_path, tokenizer) == json.loads((tmp_path / "meta.json").read_text())
    assert not (tmp_path / "preparing").exists()
    with pytest.raises(InputError, match="task 0 is not done"):  # there is nothing left to join
        join(tmp_path, tokenizer)
    data = open_dataset(tmp_path, block_size=8, verify=True)
    texts = [len(text.encode()) + 1 for text in DOCS]
    assert len(data.train) + len(data.val) == sum(texts)


@pytest.mark.slow
def test_fineweb_script_by_datatrove(tmp_path: Path):
    """On parquet files, by two machines at once, two tasks at a time, one without documents; joined on its own."""
    pytest.importorskip("datatrove")
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "in").mkdir()
    for k in range(3):
        part = DOCS[100 * k : 100 * (k + 1)]
        parquet.write_table(pa.table({"text": part, "id": list(map(str, range(100)))}), tmp_path / f"in/{k}.parquet")
    Tokenizer.bytes().save(tmp_path)
    out = tmp_path / "out"
    flags = [f"--input={tmp_path / 'in'}", f"--out={out}", f"--tokenizer={tmp_path / 'tokenizer.json'}"]
    script = [sys.executable, ROOT / "data/fineweb/prepare.py", *flags, "--val_share=0.2", "--tasks=4", "--workers=2"]

    def start(*more: str) -> subprocess.Popen:
        return subprocess.Popen([*script, *more], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def finish(*processes: subprocess.Popen) -> None:
        for process in processes:
            output = process.communicate()[0].decode()
            assert process.returncode == 0, output

    assert start("--machines=2", "--machine=2").wait() == 2
    finish(start("--machines=2", "--machine=0"), start("--machines=2", "--machine=1"))
    finish(start("--machines=2", "--machine=0"))  # has nothing left to do
    finish(start("--join"))
    data = open_dataset(out, block_size=8, verify=True)
    for split, tokens in (("train", data.train), ("val", data.val)):
        documents = np.split(tokens[:], np.flatnonzero(tokens[:] == 256) + 1)
        texts = sorted(bytes(ids[:-1].astype("u1")).decode() for ids in documents if len(ids))
        assert texts == sorted(documents_of(split, 0.2))
    process = subprocess.run([*script, "--join"], env=environment(), capture_output=True, text=True)
    assert process.returncode == 2
    assert "task 0 is not done" in process.stderr
