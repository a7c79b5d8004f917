"""Documents of chunks, and the count of everything that is left out or changed."""

import gzip
import random
from pathlib import Path

import pytest
from text_files import DOCS, json_lines, read_documents

from nanogpt.errors import InputError
from nanogpt.text import reading, streams
from nanogpt.text.documents import DocumentParser
from nanogpt.text.omissions import Omissions
from nanogpt.text.reading import ReadOptions, ValSplit, read_chunks
from nanogpt.text.sources import find_inputs


@pytest.mark.parametrize(
    ("data", "encoding", "text", "replaced"),
    [
        ("Größe\nß".encode("latin-1"), "utf-8", "Gr\ufffd\ufffde\n\ufffd", (3, "a.txt, byte 2")),
        ("Größe\nß".encode("latin-1"), "latin-1", "Größe\nß", (0, "")),
        ("Größe\nß".encode("utf-16"), "utf-16", "Größe\nß", (0, "")),
        ("x".encode("utf-16") + b"\0", "utf-16", "x\ufffd", (1, "a.txt, byte 1")),
    ],
)
def test_encodings(data: bytes, encoding: str, text: str, replaced: tuple[int, str], tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(data)
    texts, omissions = read_documents(tmp_path / "a.txt", encoding=encoding)
    assert texts == [text]
    number, place = omissions.get("replaced")
    assert (number, place.removeprefix(f"{tmp_path}/")) == replaced


def test_surrogates_of_json_are_replaced(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('"fine"\n{"text": "\\ud800x"}')
    texts, omissions = read_documents(tmp_path / "a.jsonl")
    assert texts == ["fine", "\ufffd\ufffd\ufffdx"]
    assert omissions.get("replaced") == (3, f"{tmp_path}/a.jsonl, line 2, byte 0")


@pytest.mark.parametrize("size", [1, 2, 3, 99])
def test_line_ends_are_newlines_also_between_blocks(size: int):
    text = b"a\r\nb\rc\n\r\r\nd\r"
    blocks = [text[i : i + size] for i in range(0, len(text), size)]
    omissions = Omissions()
    assert b"".join(streams.normalize_newlines(iter([*blocks, b""]), omissions, "")) == b"a\nb\nc\n\n\nd\n"
    assert omissions.get("normalized") == (5, "")


BAD = [
    ("binary.txt", b"ELF\0\1\2" * 100, "binary.txt: is binary, not text: byte 0 at offset 3"),
    ("windows.txt", "Ünder\r\n".encode("utf-16-le") * 9, "looks like utf-16-le (data/prepare.py --encoding=utf-16-le)"),
    ("paper.pdf", b"%PDF-1.5\nwords", "is not text but PDF"),
    ("really_gz.txt", gzip.compress(b"words"), "is not text but compressed by gzip, whose suffix is .gz"),
    ("cut.txt.gz", gzip.compress(b"text " * 999, mtime=0)[:-9], "cut.txt.gz: cannot be read to its end"),
    ("row.jsonl", json_lines(DOCS[:9]) + b'{"text": \n', "row.jsonl, line 10: "),
    ("deep.jsonl", b"[" * 10**6, "deep.jsonl, line 1: "),
    ("number.jsonl", b'{"text": 5}', "number.jsonl, line 1: '5' is not a string"),
    ("key.jsonl", b'{"body": "x"}', 'key.jsonl, line 1: has no "text", but body: name the column with --text_key;'),
    ("talk.jsonl", b'{"messages": []}', "name the column with --text_key, or use --chat=True"),
]


@pytest.mark.parametrize(("name", "data", "problem"), BAD, ids=[name for name, _, _ in BAD])
def test_bad_rows_and_files_are_errors_or_counted(name: str, data: bytes, problem: str, tmp_path: Path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError) as caught:
        read_documents(tmp_path / name)
    assert problem in str(caught.value)
    assert "--skip_bad=True" in str(caught.value)
    assert "\n" not in str(caught.value)
    _, omissions = read_documents(tmp_path / name, skip_bad=True)
    number, first = omissions.get("bad")
    assert number == 1
    assert first in str(caught.value)


def test_a_document_that_is_cut_short_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reading, "PIECE_BYTES", 2**14)
    monkeypatch.setattr(streams, "CHUNK_BYTES", 2**12)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(random.Random(0).randbytes(2**16).hex().encode())[:-999])
    parser = DocumentParser(ReadOptions(skip_bad=True))
    (source,) = find_inputs([str(tmp_path)], Omissions())
    documents = list(parser.parse(read_chunks(source, parser.options, ValSplit(0.1))))
    assert [document.is_end for document in documents] == [False] * (len(documents) - 1) + [True]
    assert len(documents) > 1
    assert parser.omissions.get("bad")[0] == 1
