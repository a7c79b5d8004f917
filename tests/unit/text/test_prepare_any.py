"""data/prepare.py: any text in any wrapping, killed at any instant, with any number of workers."""

import contextlib
import gzip
import hashlib
import json
import lzma
import os
import random
import runpy
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nanogpt.data.dataset import open_dataset
from nanogpt.errors import InputError
from nanogpt.text import prepare as prepare_module
from nanogpt.text.fast_bpe import PATTERNS
from nanogpt.text.prepare import EncodedChunk, Position, chunks, documents, empty_chunk, hash_fraction, prepare
from nanogpt.text.sources import PIECE, ReadOptions, border, find
from nanogpt.text.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
TIKTOKEN = ROOT.parent / "shared/data/tiktoken"
ENV = os.environ | {"PYTHONPATH": str(ROOT), "TIKTOKEN_CACHE_DIR": str(TIKTOKEN)}
DOCS = [f"Document {i}.\n" + "word " * (i % 40) + chr(0x4E00 + i) + "\nGröße 😀\n" for i in range(300)]


def start(*flags: object) -> subprocess.Popen[str]:
    often = "import runpy, prepare_module; prepare_module.SAVE_S = 0.05"  # so that there is more to go on from
    script = f"{often}; runpy.run_path('{ROOT}/data/prepare.py', run_name='__main__')"
    command = [sys.executable, "-c", script, *map(str, flags)]
    return subprocess.Popen(command, text=True, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def run(*flags: object, status: int = 0) -> str:
    with start(*flags) as process:
        output = process.communicate()[0]
    assert process.returncode == status, output
    assert "Traceback" not in output
    return output


def read(*inputs: object, most: int | None = None, counts: EncodedChunk | None = None, **how: Any) -> list[str]:
    """The documents of the inputs, without encoding them."""
    reading, texts = ReadOptions(**how), []
    for chunk, _ in chunks(find([str(name) for name in inputs]), reading, Position(), most, Path()):
        for part, _, raw, _ in documents(chunk, reading, counts or empty_chunk()):
            if not part.begins:
                raw = texts.pop().encode() + raw
            texts.append(raw.decode())
    return texts


def rows(texts: list[str], key: str = "text") -> bytes:
    return "".join(json.dumps({"n": 1, key: text}) + "\n" for text in texts).encode()


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- formats


def pack_tar(path: Path, compression: str, members: dict[str, bytes]) -> Path:
    source = path.parent / "members"
    source.mkdir(exist_ok=True)
    with tarfile.open(path, f"w:{compression}") as archive:
        for name, data in members.items():
            (source / name).write_bytes(data)
            archive.add(source / name, f"in/{name}")
    return path


def test_every_format_holds_the_same_documents(tmp_path: Path):
    folder = tmp_path / "folder/deep"
    folder.mkdir(parents=True)
    for i, text in enumerate(DOCS):
        (folder / f"{i:03}.{'md' if i % 2 else 'txt'}").write_text(text, encoding="utf-8", newline="\r\n")
    (folder / "picture.png").write_bytes(b"\0")
    (folder / ".hidden.txt").write_text("no")
    lines, half = rows(DOCS), rows(DOCS[:150])
    (tmp_path / "a.jsonl").write_bytes(lines[:-1] + b"\n\n")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(half) + gzip.compress(lines[len(half) :]))
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(lines))
    texts = {f"{i:03}.txt": text.encode() for i, text in enumerate(DOCS)}
    pack_tar(tmp_path / "a.tar", "", texts)
    pack_tar(tmp_path / "a.tar.gz", "gz", texts)
    pack_tar(tmp_path / "a.txz", "xz", {"x.jsonl": half, "y.jsonl.gz": gzip.compress(lines[len(half) :]), "z": b""})
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.jsonl", half)
        for name, text in list(texts.items())[150:]:
            archive.writestr(name, text)
    names = [
        "a.jsonl",
        "a.jsonl.gz",
        "a.jsonl.xz",
        "a.tar",
        "a.tar.gz",
        "a.txz",
        "a.zip",
        "folder",
        "f*/**/*.[mt]*",
    ]
    for name in names:
        assert read(tmp_path / name) == DOCS, name
    assert read(tmp_path / "a.jsonl", most=120) == DOCS[:120]
    assert read(tmp_path / "a.tar", most=120) == DOCS[:120]
    assert read(tmp_path / "a.tar", tmp_path / "a.zip") == DOCS + DOCS


def test_zstandard_and_parquet(tmp_path: Path):
    zstandard = pytest.importorskip("zstandard")
    lines = rows(DOCS, "content")
    half = len(rows(DOCS[:150], "content"))
    packed = zstandard.compress(lines[:half]) + zstandard.compress(lines[half:])
    (tmp_path / "a.jsonl.zst").write_bytes(packed)
    assert read(tmp_path / "a.jsonl.zst", text_key="content") == DOCS
    (tmp_path / "b.jsonl.zst").write_bytes(packed[:-9])  # the library itself takes this for the end
    with pytest.raises(InputError, match=r"b\.jsonl\.zst cannot be read to its end"):
        read(tmp_path / "b.jsonl.zst", text_key="content")
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table({"n": range(301), "text": [*DOCS, None]}), tmp_path / "a.parquet", row_group_size=70)
    assert read(tmp_path / "a.parquet") == DOCS
    with pytest.raises(InputError, match=r"a\.parquet has no column 'body', but n, text"):
        read(tmp_path / "a.parquet", text_key="body")
    source = find([str(tmp_path / "a.parquet")])
    left = chunks(source, ReadOptions(), Position(items=150), None, tmp_path)
    assert [
        raw.decode() for chunk, _ in left for _, _, raw, _ in documents(chunk, ReadOptions(), empty_chunk())
    ] == DOCS[150:]


def test_encodings_are_named_and_what_is_undecodable_is_counted(tmp_path: Path):
    text = "Größe\nß"
    (tmp_path / "a.txt").write_bytes(text.encode("latin-1"))
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    (tmp_path / "c.txt").write_text(text, encoding="utf-16")
    (tmp_path / "d.jsonl").write_text('{"text": "\\ud800x"}')
    counts = empty_chunk()
    assert read(tmp_path / "a.txt", counts=counts) == ["Gr\ufffd\ufffde\n\ufffd"]
    assert counts.replaced == [3, f"{tmp_path}/a.txt, byte 2"]
    counts = empty_chunk()
    assert read(tmp_path / "a.txt", encoding="latin-1", counts=counts) == read(tmp_path / "b.txt") == [text]
    assert read(tmp_path / "c.txt", encoding="utf-16", counts=counts) == [text]
    assert counts.replaced == [0, ""]
    assert read(tmp_path / "d.jsonl", counts=counts) == ["\ufffd\ufffd\ufffdx"]
    assert counts.replaced == [3, f"{tmp_path}/d.jsonl, line 1, byte 0"]
    (tmp_path / "e.txt").write_bytes("x".encode("utf-16") + b"\0")
    read(tmp_path / "e.txt", encoding="utf-16", counts=counts)
    assert counts.replaced[0] == 4


# ---- pieces


@pytest.mark.skipif(not TIKTOKEN.exists(), reason=f"{TIKTOKEN} is absent")
def test_ids_of_pieces_are_the_wholes(monkeypatch: pytest.MonkeyPatch):
    import tiktoken

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(TIKTOKEN))
    noise = random.Random(0)
    letters = [*"aZéÿ中。ー–…😀9'/ \n!", "\u3000", "\xa0", "\u2009", "'s"]
    gpt2 = tiktoken.get_encoding("gpt2")
    newer = (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    o200k = tiktoken.Encoding("o200k", pat_str=newer, mergeable_ranks=gpt2._mergeable_ranks, special_tokens={})
    words = tiktoken.Encoding(
        "words", pat_str=PATTERNS["words"], mergeable_ranks=gpt2._mergeable_ranks, special_tokens={}
    )
    encodings = [gpt2, o200k, words]
    cuts = 0
    for _ in range(3000):
        text = "".join(noise.choices(letters, k=12)).encode()
        end = border(text + b"a", len(text))
        if text[:end].endswith(b"\n"):
            cuts += 1
            for encoding in encodings:
                head, tail = text[:end].decode(), text[end:].decode()
                whole = encoding.encode_ordinary(text.decode())
                assert encoding.encode_ordinary(head) + encoding.encode_ordinary(tail) == whole, text
    assert cuts > 500


def test_long_documents_are_cut_and_stay_one(tmp_path: Path):
    text = "".join(f"line {i} ends\n" for i in range(PIECE // 15)) + "é" * (PIECE // 2)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "b.txt").write_text("other")
    assert read(tmp_path) == [text, "other"]
    sources = find([str(tmp_path)])
    parts = [part for chunk, _ in chunks(sources, ReadOptions(), Position(), None, tmp_path) for part in chunk]
    assert [(part.begins, part.ends) for part in parts[:2]] == [(True, False), (False, False)]
    assert all(len(part.data) <= PIECE for part in parts)
    assert all(part.data.decode() for part in parts)
    for items in range(len(parts) - 1):  # whatever was done before, the rest comes
        left = chunks(sources, ReadOptions(), Position(items=items), None, tmp_path)
        assert [part.data for chunk, _ in left for part in chunk] == [part.data for part in parts[items:]]


# ---- what cannot be used

BAD = [
    ("empty.txt", b"", [], "the input holds no text"),
    ("empty.jsonl", b"\n\n", [], "the input holds no text"),
    ("short.txt", b"a", [], "the train split would be empty"),
    ("few.jsonl", rows(DOCS[:2]), [], "of 2 documents none fell into the val split by its hash: give more"),
    ("binary.txt", b"ELF\0\1\2" * 100, [], "binary.txt is binary, not text: byte 0 at offset 3"),
    ("cut.txt.gz", gzip.compress(b"text " * 999, mtime=0)[:-9], [], "cut.txt.gz cannot be read to its end"),
    ("cut.txt.xz", lzma.compress(b"text " * 999)[:-9], [], "cut.txt.xz cannot be read to its end"),
    ("no.gz.txt.gz", b"text", [], "no.gz.txt.gz cannot be read to its end"),
    ("no.tar", b"text" * 999, [], "no.tar cannot be read to its end"),
    ("no.zip", b"text" * 999, [], "no.zip cannot be read to its end"),
    ("no.parquet", b"text" * 999, [], "no.parquet cannot be read to its end"),
    ("row.jsonl", rows(DOCS[:9]) + b'{"text": "fine"}\n{"text": \n', [], "row.jsonl, line 11: "),
    ("number.jsonl", b'{"text": 5}', [], "line 1: '5' is no text"),
    (
        "key.jsonl",
        b'{"messages": []}',
        [],
        'line 1: has no "text", but messages: name the column by --text_key',
    ),
    ("a.txt", b"text", ["--encoding=klingon"], "--encoding=klingon is not known"),
    ("a.txt", b"text", ["--encoding=rot13"], "--encoding=rot13 is not known"),
    ("a.txt", b"text", ["--val_share=1"], "lies between 0 and 1, not at 1.0"),
    ("a.txt", b"text", ["--shard_tokens=0"], "in a shard count from 1 up"),
]


@pytest.mark.parametrize(("name", "data", "flags", "told"), BAD)
def test_bad_input_gets_a_line(
    name: str, data: bytes, flags: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    """In this process, with threads for workers; the command line itself is below."""
    (path := tmp_path / name).write_bytes(data)
    monkeypatch.setattr(prepare_module, "_workers", threads)
    script = runpy.run_path(str(ROOT / "data/prepare.py"))
    argv = ["prepare.py", "--input", str(path), f"--out={tmp_path / 'out'}", "--tokenizer=char", *flags]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(InputError) as caught:
        script["main"]()
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="there is no dataset"):
        open_dataset(tmp_path / "out", block_size=8)


@contextlib.contextmanager
def threads(n: int, make: Any) -> Iterator[ThreadPoolExecutor]:
    prepare_module._make, prepare_module._encoder = make, None
    with ThreadPoolExecutor(n) as pool:
        yield pool


def test_bad_input_on_the_command_line(tmp_path: Path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/picture.png").write_bytes(b"\0")
    out = f"--out={tmp_path / 'out'}"
    assert "bare holds no text" in run("--input", tmp_path / "bare", out, status=2)
    assert "no file is named like" in run("--input", tmp_path / "*.txt", out, status=2)
    assert "none.txt cannot be read" in run("--input", tmp_path / "none.txt", out, status=2)
    assert not (tmp_path / "out").exists()


def test_skip_bad_counts_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    good = rows(DOCS)
    (tmp_path / "a.jsonl").write_bytes(good[:5000] + b"\n" + good[5000:])  # one row becomes two bad ones
    (tmp_path / "b.txt").write_bytes(b"\0")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"text " * 999)[:-9])
    (tmp_path / "d.jsonl").write_bytes(b'{"body": "x"}\n' + rows(["last"]))
    monkeypatch.setattr(prepare_module, "_workers", threads)
    sources = find([str(tmp_path)])
    meta = prepare(tmp_path / "out", sources, "char", reading=ReadOptions(skip_bad=True), val_share=0.1, workers=1)
    line = good[:5000].count(b"\n") + 1
    assert meta["bad"][0] == 5
    assert meta["bad"][1].startswith(f"{tmp_path}/a.jsonl, line {line}: ")
    assert "5 bad rows or files were left out; the first: " in capsys.readouterr().out
    assert sum(facts["documents"] for facts in meta["splits"].values()) == len(DOCS)  # one is bad, "last" is new


def test_too_little_disk_is_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.txt").write_text("text " * 1000)
    monkeypatch.setattr(prepare_module, "_workers", threads)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5000))
    with pytest.raises(InputError, match=r"needs about 0\.0 GB and has 0\.0 GB free"):
        prepare(tmp_path / "out", find([str(tmp_path)]), "char", reading=ReadOptions())


# ---- what is written


def test_shards_are_full_and_the_split_is_stable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prepare_module, "_workers", threads)
    (tmp_path / "a.jsonl").write_bytes(rows(DOCS[:200]))
    (tmp_path / "b.jsonl").write_bytes(rows(DOCS[200:]))
    expected = {
        split: [t for t in DOCS if (hash_fraction(t.encode()) < 0.2) == (split == "val")] for split in ("train", "val")
    }
    for most in (1000, 10**6):  # the second takes the place of the first
        sources = find([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")])
        meta = prepare(
            tmp_path / "out", sources, "char", reading=ReadOptions(), val_share=0.2, shard_tokens=most, workers=2
        )
        tokenizer = Tokenizer.load(tmp_path / "out")
        assert tokenizer is not None
        names = {"meta.json", "tokenizer.json"}
        for split, texts in expected.items():
            facts = meta["splits"][split]
            shards = facts.get("shards") or [facts | {"file": f"{split}.bin"}]
            paths = [tmp_path / "out" / shard["file"] for shard in shards]
            names |= {path.name for path in paths}
            assert [shard["tokens"] for shard in shards[:-1]] == [most] * (len(shards) - 1)
            assert [path.stat().st_size // 2 for path in paths] == [shard["tokens"] for shard in shards]
            assert [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths] == [s["sha256"] for s in shards]
            ids = np.concatenate([np.fromfile(path, np.uint16) for path in paths])
            assert tokenizer.decode(ids.tolist()) == "".join(texts)
            assert facts["tokens"] == len(ids)
            assert (facts["bytes"], facts["documents"]) == (len("".join(texts).encode()), len(texts))
        assert set(os.listdir(tmp_path / "out")) == names
    assert "shards" not in facts


def test_one_text_is_cut_in_ten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prepare_module, "_workers", threads)
    text = "Größe 😀\n" * 1000
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(text.encode()))
    prepare(tmp_path / "out", find([str(tmp_path / "a.txt.xz")]), "char", reading=ReadOptions(), workers=1)
    data = open_dataset(tmp_path / "out", block_size=8, verify=True)
    assert data.tokenizer is not None
    assert data.tokenizer.decode([*data.train[:].tolist(), *data.val[:].tolist()]) == text
    assert len(data.tokenizer.decode(data.train[:].tolist()).encode()) == pytest.approx(0.9 * len(text.encode()), abs=4)


# ---- the hub


def test_a_stream_goes_on_where_the_network_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With the real library over files of ours: at once, and by the same command again when the network stays away."""
    datasets, hub = pytest.importorskip("datasets"), pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(prepare_module, "_workers", threads)
    monkeypatch.setattr(hub, "HfApi", lambda: SimpleNamespace(dataset_info=lambda repo: SimpleNamespace(sha="abc")))
    texts = [f"{i} {text}" for i in range(3) for text in DOCS]
    for k in range(2):
        (tmp_path / f"{k}.jsonl").write_bytes(rows(texts[450 * k : 450 * (k + 1)], "body"))
    original, asked, read = datasets.load_dataset, [], []
    breaks_after = [10**9]

    class Stream:
        def __init__(self) -> None:
            files = [str(tmp_path / f"{k}.jsonl") for k in range(2)]
            self.stream = original("json", data_files=files, split="train", streaming=True)
            self.state_dict, self.load_state_dict = self.stream.state_dict, self.stream.load_state_dict

        def __iter__(self) -> Iterator[dict[str, Any]]:
            for n, row in enumerate(self.stream):
                if n == breaks_after[0]:
                    raise ConnectionError("the network is away")
                read.append(row["body"])
                yield row

    def load_dataset(repo: str, config: str | None, split: str, revision: str, streaming: bool) -> Stream:
        asked.append((repo, config, split, revision, streaming))
        return Stream()

    def attempt(out: str) -> None:
        sources = find(["hf:some/texts@en:train"], prepare_module.earlier(tmp_path / out))
        reading = ReadOptions(text_key="body")
        prepare(tmp_path / out, sources, "byte", reading=reading, val_share=0.2, workers=2)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    attempt("whole")
    assert asked == [("some/texts", "en", "train", "abc", True)]
    assert read == texts

    breaks_after[0] = 300  # of each connection; what was not complete is read again
    attempt("flaky")
    assert files(tmp_path / "flaky") == files(tmp_path / "whole")

    breaks_after[0] = 50  # never as much as is handed over at a time
    asked.clear()
    with pytest.raises(InputError, match=r"could not be read on from row 1 .*away.*: run the command again to go on"):
        attempt("again")
    assert len(asked) == 5
    count = iter([200, 50, 50, 50, 50, 10**9])

    class Worse(Stream):
        def __init__(self) -> None:
            super().__init__()
            breaks_after[0] = next(count)

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **keys: Worse())
    with pytest.raises(InputError, match="could not be read on from row 129"):
        attempt("again")
    read.clear()
    attempt("again")
    assert read == texts[128:]  # what the journal holds is not read again
    assert files(tmp_path / "again") == files(tmp_path / "whole")


# ---- killed


@pytest.mark.skipif(not TIKTOKEN.exists(), reason=f"{TIKTOKEN} is absent")
@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_killed_and_continued_is_as_if_undisturbed(workers: int, tmp_path: Path):
    noise = random.Random(workers)
    folder = tmp_path / "in"
    folder.mkdir()
    words = " ".join(DOCS).split()
    long = "\n".join(" ".join(noise.choices(words, k=9)) for _ in range(8_000))
    (folder / "a.txt").write_text(long * 2, encoding="utf-8")  # in pieces
    (folder / "b.jsonl").write_bytes(rows(["\n".join(noise.choices(DOCS, k=60)) for _ in range(100)]))
    pack_tar(folder / "c.tar.gz", "gz", {"d.jsonl": rows(DOCS), "e.txt": long.encode()})
    flags = ["--input", folder, "--val_share=0.3", "--shard_tokens=200000"]
    began = time.monotonic()
    run(*flags, f"--out={tmp_path / 'whole'}", f"--workers={3 - workers}")
    took = time.monotonic() - began
    out, kills = tmp_path / "killed", 0
    for _ in range(2):
        with start(*flags, f"--out={out}", f"--workers={workers}") as process:
            try:
                process.wait(noise.uniform(0.2, 0.5) * took)  # another number of workers may be twice as fast
            except subprocess.TimeoutExpired:
                process.kill()
                kills += 1
        assert process.returncode in (0, -9)
    run(*flags, f"--out={out}", f"--workers={workers}")
    assert kills
    assert files(out) == files(tmp_path / "whole")
