"""The preparing scripts as a user runs them, offline."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import tiktoken
import tokenizers

from nanogpt.data.dataset import Tokens, open_dataset
from nanogpt.errors import InputError
from nanogpt.text.sources import InputFile, hub_files

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared/data"
ENV = {"PYTHONPATH": str(ROOT), "TIKTOKEN_CACHE_DIR": str(SHARED / "tiktoken")}
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason=f"{SHARED} is absent")


def run(name: str, *flags: object, status: int = 0) -> str:
    """Run data/<name>/prepare.py; what it printed, errors included."""
    command = [sys.executable, str(ROOT / "data" / name / "prepare.py"), *map(str, flags)]
    done = subprocess.run(command, text=True, env=os.environ | ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == status, done.stdout
    assert "Traceback" not in done.stdout
    return done.stdout


@needs_shared
@pytest.mark.parametrize(
    ("name", "vocab_size", "train", "val"),
    [("shakespeare_char", 65, 1_003_854, 111_540), ("shakespeare", 50_257, 301_966, 36_059)],
)
def test_shakespeare_is_nanogpts(name: str, vocab_size: int, train: int, val: int, tmp_path: Path):
    output = run(name, f"--input={SHARED / 'tinyshakespeare.txt'}", f"--out={tmp_path}")
    assert f"train: {train:,} tokens\nval: {val:,} tokens\nvocabulary: {vocab_size:,} (" in output
    data = open_dataset(tmp_path, block_size=1024, vocab_size=vocab_size, verify=True)
    assert (data.vocab_size, len(data.train), len(data.val)) == (vocab_size, train, val)
    assert data.tokenizer is not None
    assert data.tokenizer.decode(data.train[:300].tolist()).startswith("First Citizen:\nBefore we proceed any further")
    theirs = ROOT.parent / "env/nanoGPT/data" / name
    if theirs.exists():
        for split in ("train.bin", "val.bin"):
            assert (tmp_path / split).read_bytes() == (theirs / split).read_bytes()


def test_a_text_of_ones_own_and_what_cannot_be_read(tmp_path: Path):
    text = "Größe 😀\n" * 50
    path, out = tmp_path / "mine.txt", tmp_path / "new/folder"
    path.write_text(text, encoding="utf-8")
    run("shakespeare_char", "--input", path, "--out", out)
    data = open_dataset(out, block_size=8, verify=True)
    assert data.tokenizer is not None
    assert data.tokenizer.decode([*data.train[:].tolist(), *data.val[:].tolist()]) == text
    path.write_bytes(b"caf\xe9")
    assert "error:" in (output := run("shakespeare_char", f"--input={path}", f"--out={out}", status=2))
    assert "not UTF-8 text: byte 0xe9 at offset 3" in output
    path.write_text("a")
    assert "the train split" in run("shakespeare_char", f"--input={path}", f"--out={out}", status=2)


def test_in_the_tokens_of_another_model(tmp_path: Path):
    """Letters with ids above 65,536, and a limit on the length, which is for the model's user and not for its data."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {f"<{i}>": i for i in range(70_000)} | {letter: 70_000 + i for i, letter in enumerate(letters)}
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = tokenizers.decoders.ByteLevel()
    theirs.enable_truncation(100)
    path, out, text = tmp_path / "mine.txt", tmp_path / "out", "Größe 😀\n" * 50
    path.write_text(text, encoding="utf-8")
    theirs.save(str(tmp_path / "tokenizer.json"))
    output = run("shakespeare", "--input", path, "--out", out, "--tokenizer", tmp_path)
    assert "vocabulary: 70,256 (bpe)" in output
    data = open_dataset(out, block_size=8, vocab_size=70_400, verify=True)
    assert data.tokenizer is not None
    assert data.train[:].dtype == np.dtype("<u4")
    assert len(data.train) + len(data.val) == len(text.encode())
    assert data.tokenizer.decode([*data.train[:].tolist(), *data.val[:].tolist()]) == text


def test_pydocs(tmp_path: Path):
    assert "1,115,394 characters of Python" in run("pydocs_char", f"--out={tmp_path}")
    data = open_dataset(tmp_path, block_size=256, verify=True)
    assert len(data.train) + len(data.val) == 1_115_394
    assert data.tokenizer is not None
    assert data.vocab_size == 96  # printable ASCII and the newline
    assert "Assert statements are a convenient way" in data.tokenizer.decode(data.train[:2000].tolist())


# ---- OpenWebText

DOCS = [f"Document {i}: " + "word " * (i % 50) + chr(0x4E00 + i) for i in range(600)] + [
    "😀 <|endoftext|> isn't special"
]
SHARE = 0.1


def in_val(text: str) -> bool:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") < SHARE * 2**64


def documents(tokens: Tokens) -> Iterator[str]:
    ids, encoding = tokens[:], tiktoken.get_encoding("gpt2")
    assert ids[-1] == encoding.eot_token
    for part in np.split(ids, np.flatnonzero(ids == encoding.eot_token) + 1)[:-1]:
        yield encoding.decode(part[:-1].tolist())


@needs_shared
@pytest.mark.slow
def test_openwebtext_goes_on_after_an_interruption_with_any_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", ENV["TIKTOKEN_CACHE_DIR"])
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    shards = [tmp_path / "0.parquet", tmp_path / "1.parquet", tmp_path / "2.jsonl", tmp_path / "3.txt"]
    parquet.write_table(pa.table({"n": range(400), "text": DOCS[:400]}), shards[0], row_group_size=90)
    parquet.write_table(pa.table({"text": [*DOCS[400:450], None]}), shards[1])
    shards[2].write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCS[450:600]))
    shards[3].write_text(DOCS[600])

    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:500])
    flags = ["--val-share", SHARE, "--input", *shards]
    output = run("openwebtext", "--out", tmp_path / "out", "--workers", 1, *flags, status=2)
    assert "1.parquet cannot be read to its end" in output
    shards[1].write_bytes(whole)
    output = run("openwebtext", "--out", tmp_path / "out", "--workers", 2, *flags)
    assert "1 of 4 inputs were done before" in output
    assert sorted(os.listdir(tmp_path / "out")) == ["meta.json", "tokenizer.json", "train.bin", "val.bin"]
    data = open_dataset(tmp_path / "out", block_size=64, vocab_size=50_257, verify=True)
    for split, expected in (("val", [t for t in DOCS if in_val(t)]), ("train", [t for t in DOCS if not in_val(t)])):
        assert list(documents(getattr(data, split))) == expected
        assert data.meta["splits"][split]["bytes"] == sum(len(text.encode()) for text in expected)
        assert data.meta["splits"][split]["documents"] == len(expected)


@needs_shared
def test_openwebtext_takes_a_part_and_refuses_what_it_cannot_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", ENV["TIKTOKEN_CACHE_DIR"])
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path, part in zip(paths, (DOCS[:300], DOCS[300:]), strict=True):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    flags = ["--out", tmp_path / "out", "--workers", 1, "--val-share", SHARE, "--input", *paths]
    run("openwebtext", *flags, "--docs", 350)
    data = open_dataset(tmp_path / "out", block_size=64)
    assert sorted([*documents(data.train), *documents(data.val)]) == sorted(DOCS[:350])
    paths[1].write_text('{"text": "fine"}\n{"texts": 1}\n')
    assert "b.jsonl, line 2: has no" in run("openwebtext", *flags, status=2)
    assert "c.jsonl cannot be read" in run("openwebtext", "--input", tmp_path / "c.jsonl", status=2)
    for wrong in (["--val-share", 1], ["--val-share", "nan"], ["--docs", 0], ["--workers", 0]):
        told = "lies between 0 and 1" if "--val-share" in wrong else "count from 1 up"
        assert told in run("openwebtext", "--out", tmp_path / "none", *wrong, status=2)
    assert not (tmp_path / "none").exists()


def test_openwebtext_finds_its_shards(monkeypatch: pytest.MonkeyPatch):
    names = {
        "main": ["README.md", "b/partial-train/0.parquet"],
        "refs/convert/parquet": ["t/1.parquet", "t/0.parquet", "other/0.parquet", ".gitattributes"],
    }

    def dataset_info(self, repo: str, revision: str, files_metadata: bool) -> SimpleNamespace:
        lfs = {name: SimpleNamespace(sha256=f"hash of {name}") for name in names[revision] if "parquet" in name}
        files = [SimpleNamespace(rfilename=name, lfs=lfs.get(name)) for name in names[revision]]
        return SimpleNamespace(sha=f"commit of {revision}", siblings=files)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    commit = "commit of refs/convert/parquet"
    names_in_order = [f"t/{i}.parquet" for i in range(2)]
    expected = [InputFile(n, repo="o/w", revision=commit, sha256=f"hash of {n}") for n in names_in_order]
    assert hub_files("o/w", "t/") == expected
    assert hub_files("o/w", "x/", [InputFile("x/0.parquet", repo="o/w")]) == [InputFile("x/0.parquet", repo="o/w")]
    with pytest.raises(InputError, match=r"o/w has no whole set .* under 'x/'"):
        hub_files("o/w", "x/")
    del names["main"]  # stands for no network
    with pytest.raises(InputError, match=r"could not be listed .*--input"):
        hub_files("o/w", "")


HUB = """
import json, pathlib, shutil, types
HERE = pathlib.Path(__file__).parent

class HfApi:
    def dataset_info(self, repo, revision, files_metadata):
        facts = json.loads((HERE / "hub.json").read_text(), object_hook=lambda o: types.SimpleNamespace(**o))
        assert files_metadata
        return facts

def hf_hub_download(repo, name, repo_type, revision, local_dir):
    assert revision == "first", revision
    (local_dir / name).parent.mkdir(exist_ok=True)
    return shutil.copy(HERE / name, local_dir / name)
"""


@needs_shared
def test_openwebtext_checks_its_downloads_and_stays_at_one_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", ENV["TIKTOKEN_CACHE_DIR"])
    monkeypatch.setitem(ENV, "PYTHONPATH", os.pathsep.join((str(tmp_path), str(ROOT))))
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "t").mkdir()
    (tmp_path / "huggingface_hub.py").write_text(HUB)
    files = []
    for i, part in enumerate((DOCS[:300], DOCS[300:])):
        path = tmp_path / f"t/{i}.parquet"
        parquet.write_table(pa.table({"text": part}), path)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        files.append({"rfilename": f"t/{i}.parquet", "lfs": {"sha256": sha256}})
    (tmp_path / "hub.json").write_text(json.dumps({"sha": "first", "siblings": files}))
    path.write_bytes((whole := path.read_bytes())[:-1] + b"?")
    flags = ["--out", tmp_path / "out", "--workers", 1, "--val-share", SHARE]
    assert "t/1.parquet came damaged" in run("openwebtext", *flags, status=2)
    assert os.listdir(tmp_path / "out/preparing/t") == []
    path.write_bytes(whole)
    (tmp_path / "hub.json").write_text(json.dumps({"sha": "second", "siblings": files[:1]}))
    assert "1 of 2 inputs were done before" in run("openwebtext", *flags)
    data = open_dataset(tmp_path / "out", block_size=64, verify=True)
    assert list(documents(data.train)) == [text for text in DOCS if not in_val(text)]
