"""data/prepare.py: any text in any wrapping, killed at any instant, with any number of workers."""

import gzip
import json
import lzma
import os
import random
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from nanogpt import InputError
from nanogpt.prepare import Position, chunks, documents, nothing
from nanogpt.sources import PIECE, Reading, border, find

ROOT = Path(__file__).parent.parent
TIKTOKEN = ROOT.parent / "shared/data/tiktoken"
ENV = os.environ | {"PYTHONPATH": str(ROOT), "TIKTOKEN_CACHE_DIR": str(TIKTOKEN)}
DOCS = [f"Document {i}.\n" + "word " * (i % 40) + chr(0x4E00 + i) + "\nGröße 😀\n" for i in range(300)]


def start(*flags: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "data/prepare.py"), *map(str, flags)]
    return subprocess.Popen(command, text=True, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def run(*flags: object, status: int = 0) -> str:
    with start(*flags) as process:
        output = process.communicate()[0]
    assert process.returncode == status, output
    assert "Traceback" not in output
    return output


def read(*inputs: object, most: int | None = None, **how: object) -> list[str]:
    """The documents of the inputs, without encoding them."""
    reading, counts = Reading(**how), nothing()  # type: ignore[arg-type]
    texts: list[str] = []
    for chunk, _ in chunks(find([str(name) for name in inputs]), reading, Position(), most, Path()):
        for part, _, raw, _ in documents(chunk, reading, counts):
            texts[-1:] = (
                [raw.decode()]
                if part.begins and not texts
                else ([texts[-1], raw.decode()] if part.begins else [texts[-1] + raw.decode()])
            )
    read.counts = counts  # type: ignore[attr-defined]
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
    left = chunks(source, Reading(), Position(items=150), None, tmp_path)
    assert [raw.decode() for chunk, _ in left for _, _, raw, _ in documents(chunk, Reading(), nothing())] == DOCS[150:]


def test_encodings_are_named_and_what_is_undecodable_is_counted(tmp_path: Path):
    text = "Größe\nß"
    (tmp_path / "a.txt").write_bytes(text.encode("latin-1"))
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    (tmp_path / "c.txt").write_text(text, encoding="utf-16")
    (tmp_path / "d.jsonl").write_text('{"text": "\\ud800x"}')
    assert read(tmp_path / "a.txt") == ["Gr\ufffd\ufffde\n\ufffd"]
    assert read.counts.replaced == [3, f"{tmp_path}/a.txt, byte 2"]  # type: ignore[attr-defined]
    assert read(tmp_path / "a.txt", encoding="latin-1") == read(tmp_path / "b.txt") == [text]
    assert read(tmp_path / "c.txt", encoding="utf-16") == [text]
    assert read.counts.replaced[0] == 0  # type: ignore[attr-defined]
    assert read(tmp_path / "d.jsonl")[0].endswith("x")
    assert read.counts.replaced[0] == 3  # type: ignore[attr-defined]
    (tmp_path / "e.txt").write_bytes("x".encode("utf-16") + b"\x00")
    read(tmp_path / "e.txt", encoding="utf-16")
    assert read.counts.replaced[0] == 1  # type: ignore[attr-defined]


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
    encodings = [gpt2, o200k]
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
    parts = [
        part for chunk, _ in chunks(find([str(tmp_path)]), Reading(), Position(), None, tmp_path) for part in chunk
    ]
    assert [(part.begins, part.ends) for part in parts[:2]] == [(True, False), (False, False)]
    assert all(len(part.data) <= PIECE for part in parts)
    assert all(part.data.decode() for part in parts)
    for items in range(len(parts) - 1):  # whatever was done before, the rest comes
        left = chunks(sources, Reading(), Position(items=items), None, tmp_path)
        assert [part.data for chunk, _ in left for part in chunk] == [part.data for part in parts[items:]]
