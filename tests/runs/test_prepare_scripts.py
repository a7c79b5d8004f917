"""data/prepare.py and data/*/prepare.py from the command line, with worker processes."""

import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from conftest import ROOT, environment, needs_gpt2, run_script
from text_files import DOCS, json_lines, pack_tar, read_files

from nanogpt.data.dataset import open_dataset

TINY_SHAKESPEARE = ROOT.parent / "shared/data/tinyshakespeare.txt"


def start(script: str, *flags: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "data" / script), *map(str, flags)]
    return subprocess.Popen(command, text=True, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def run(script: str, *flags: object) -> str:
    with start(script, *flags) as process:
        output = process.communicate()[0]
    assert process.returncode == 0, output
    return output


# --- One text


@needs_gpt2
@pytest.mark.skipif(not TINY_SHAKESPEARE.exists(), reason=f"{TINY_SHAKESPEARE} is absent")
@pytest.mark.parametrize(
    ("name", "vocab_size", "train", "val"),
    [("shakespeare_char", 65, 1_003_854, 111_540), ("shakespeare", 50_257, 301_966, 36_059)],
)
def test_shakespeare_is_nanogpts(name: str, vocab_size: int, train: int, val: int, tmp_path: Path, capsys: Any):
    assert run_script(f"data/{name}/prepare.py", f"--input={TINY_SHAKESPEARE}", f"--out={tmp_path}") == 0
    sizes = f"train: {train:,} tokens\nval: {val:,} tokens\nvocabulary: {vocab_size:,} ("
    assert sizes in capsys.readouterr().out
    data = open_dataset(tmp_path, block_size=1024, vocab_size=vocab_size, verify=True)
    assert (data.vocab_size, len(data.train), len(data.val)) == (vocab_size, train, val)
    assert data.tokenizer is not None
    assert data.tokenizer.decode(data.train[:300].tolist()).startswith("First Citizen:\nBefore we proceed any further")
    nanogpt = ROOT.parent / "env/nanoGPT/data" / name
    if nanogpt.exists():
        for split in ("train.bin", "val.bin"):
            assert (tmp_path / split).read_bytes() == (nanogpt / split).read_bytes()


def test_a_text_with_the_tokenizer_of_another_model(tmp_path: Path, capsys: Any):
    """Ids above 65,536, and a limit on the length, which is for the model's user and not for its data."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {f"<{i}>": i for i in range(70_000)} | {letter: 70_000 + i for i, letter in enumerate(letters)}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.enable_truncation(100)
    model.save(str(tmp_path / "tokenizer.json"))
    text = "Größe 😀\n" * 50
    (tmp_path / "mine.txt").write_text(text, encoding="utf-8")
    flags = (f"--input={tmp_path / 'mine.txt'}", f"--out={tmp_path / 'out'}", f"--tokenizer={tmp_path}")
    assert run_script("data/shakespeare/prepare.py", *flags) == 0
    assert "vocabulary: 70,256 (bpe)" in capsys.readouterr().out
    data = open_dataset(tmp_path / "out", block_size=8, vocab_size=70_400, verify=True)
    assert data.tokenizer is not None
    assert data.train[:].dtype == np.dtype("<u4")
    assert len(data.train) + len(data.val) == len(text.encode())
    assert data.tokenizer.decode([*data.train[:].tolist(), *data.val[:].tolist()]) == text


def test_changed_line_ends_are_counted(tmp_path: Path, capsys: Any):
    (tmp_path / "mine.txt").write_bytes(b"\xef\xbb\xbf" + b"a\r\nb\n" * 9)
    assert run_script("data/shakespeare_char/prepare.py", f"--input={tmp_path / 'mine.txt'}", f"--out={tmp_path}") == 0
    assert "made newlines: 10;" in capsys.readouterr().out
    assert open_dataset(tmp_path, block_size=1).meta["omitted"]["normalized"][0] == 10


def test_a_text_that_is_not_utf8_is_an_error(tmp_path: Path, capsys: Any):
    (tmp_path / "mine.txt").write_bytes(b"caf\xe9")
    assert run_script("data/shakespeare_char/prepare.py", f"--input={tmp_path / 'mine.txt'}", f"--out={tmp_path}") == 2
    assert "byte 0xe9 in line 1" in capsys.readouterr().err


@pytest.mark.slow
def test_pydocs(tmp_path: Path):
    assert "1,115,394 characters of Python" in run("pydocs_char/prepare.py", f"--out={tmp_path}")
    data = open_dataset(tmp_path, block_size=256, verify=True)
    assert len(data.train) + len(data.val) == 1_115_394
    assert data.tokenizer is not None
    assert data.vocab_size == 96  # printable ASCII and the newline
    assert "Assert statements are a convenient way" in data.tokenizer.decode(data.train[:2000].tolist())


# --- Many documents


def test_problems_of_flags_and_inputs_are_reported_before_anything_is_written(tmp_path: Path, capsys: Any):
    out = f"--out={tmp_path / 'out'}"
    assert run_script("data/openwebtext/prepare.py", out, "--val-share=nan", "--docs=0", "--worker=2") == 2
    problems = [line.partition("=")[0] for line in capsys.readouterr().err.splitlines()]
    assert problems == ["error: --val_share", "error: --docs", "error: --worker"]
    assert run_script("data/prepare.py", "--input", str(tmp_path / "none.txt"), out) == 2
    assert "none.txt cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@needs_gpt2
@pytest.mark.slow  # unit/text/test_prepare.py has a kill at any instant
def test_killed_and_resumed_is_as_if_undisturbed(tmp_path: Path):
    rng = random.Random(2)
    folder = tmp_path / "in"
    folder.mkdir()
    words = " ".join(DOCS).split()
    long = "\n".join(" ".join(rng.choices(words, k=9)) for _ in range(4_000))
    (folder / "a.txt").write_text(long * 2, encoding="utf-8")  # in pieces
    (folder / "b.jsonl").write_bytes(json_lines(["\n".join(rng.choices(DOCS, k=60)) for _ in range(100)]))
    pack_tar(tmp_path / "in/c.tar.gz", "gz", {"d.jsonl": json_lines(DOCS), "e.txt": long.encode()})
    flags = ["--input", folder, "--val_share=0.3", "--shard_tokens=50000"]
    began = time.monotonic()
    run("prepare.py", *flags, f"--out={tmp_path / 'whole'}", "--workers=1")
    seconds = time.monotonic() - began
    out = tmp_path / "killed"
    for _ in range(2):
        with start("prepare.py", *flags, f"--out={out}", "--workers=2") as process:
            try:
                process.wait(rng.uniform(0.2, 1.0) * seconds)
            except subprocess.TimeoutExpired:
                process.kill()
        assert process.returncode in (0, -9)
    run("prepare.py", *flags, f"--out={out}", "--workers=2")
    assert read_files(out) == read_files(tmp_path / "whole")
