"""Conservation of text: what prepare reads is in the tokens or named, with a count, in meta.json.

Hypothesis makes folders of files, archives and links, and says beside each what must come of it.
"""

import bz2
import gzip
import io
import json
import lzma
import re
import shutil
import stat
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from text_files import one_thread

from nanogpt.data.dataset import open_dataset
from nanogpt.errors import InputError
from nanogpt.text import prepare as prepare_module
from nanogpt.text import reading, streams
from nanogpt.text.fast_bpe import BYTE_DECODER, make_byte_level_bpe
from nanogpt.text.omissions import Omissions
from nanogpt.text.prepare import prepare
from nanogpt.text.reading import ReadOptions
from nanogpt.text.sources import find_inputs
from nanogpt.text.tokenizer import Tokenizer

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
zstandard = pytest.importorskip("zstandard")
SEPARATOR = "<|endoftext|>"
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


ALPHABET = [character for character, byte in BYTE_DECODER.items() if byte not in "é".encode()]
WITHOUT_E_ACUTE = Tokenizer(
    make_byte_level_bpe({character: i for i, character in enumerate(ALPHABET)}, [], [], [SEPARATOR])
)


@dataclass
class Item:
    """A file or link, the documents in it, and what must be counted."""

    name: str
    data: bytes = b""
    documents: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def counted(self, **counts: int) -> "Item":
        self.counts.update({kind: number for kind, number in counts.items() if number})
        return self


pieces = st.sampled_from(["a", SEPARATOR, "\n", "\r\n", "\r", "é", "中", "😀", " ", "Word", "\ufffd", SEPARATOR[:5]])
contents = st.lists(pieces, max_size=9).map("".join)


def write_parquet(columns: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pa.table(columns), file)
    return file.getvalue()


@st.composite
def texts(draw: st.DrawFn, separator: str) -> Item:
    """A text in UTF-8, with invalid bytes and a mark perhaps, or in UTF-16."""
    parts = draw(st.lists(st.one_of(pieces, st.just("\xff")), max_size=12))  # \xff stands for an invalid byte
    text = "".join(parts)
    plain = re.sub("\r\n|\r", "\n", text)
    is_utf16 = draw(st.booleans()) and "\xff" not in text
    if is_utf16:
        data = text.encode("utf-16")
    else:
        data = b"".join(b"\xff" if part == "\xff" else part.encode() for part in parts)
    has_mark = not is_utf16 and draw(st.booleans())
    if has_mark:
        data = b"\xef\xbb\xbf" + data
    item = Item(draw(st.sampled_from(["a.txt", "b.md", "c.raw", "d"])), data)
    item.counted(replaced=text.count("\xff"), normalized=has_mark + len(re.findall("\r\n|\r", text)))
    plain = plain.replace("\xff", "\ufffd")

    documents = [plain]
    if separator:
        documents = plain.split(separator)
        item.counted(separators=len(documents) - 1)
        if not documents[-1]:
            documents.pop()
    item.documents = [document for document in documents if document]
    return item.counted(empty=len(documents) - len(item.documents))


@st.composite
def json_rows(draw: st.DrawFn) -> Item:
    """Rows with and without text, as lines, as an array or as parquet."""
    rows = draw(st.lists(st.one_of(contents, st.none()), max_size=6))
    item = Item("", documents=[row for row in rows if row])
    item.counted(empty=len(rows) - len(item.documents))
    kind = draw(st.sampled_from(["x.jsonl", "x.ndjson", "x.json", "array.json", "x.parquet"]))
    item.name = kind
    if kind == "array.json":
        item.data = json.dumps([{"text": row} for row in rows], indent=draw(st.sampled_from([None, 1]))).encode()
    elif kind == "x.parquet":
        item.data = write_parquet({"text": pa.array(rows, pa.string()), "n": range(len(rows))})
    else:
        lines = [json.dumps({"text": row}) if row is None or draw(st.booleans()) else json.dumps(row) for row in rows]
        for extra, count in (("", "blank"), ('{"text": 5}', "bad"), ("{", "bad")):
            for _ in range(draw(st.integers(0, 1)) if kind != "x.json" or len(lines) > 1 else 0):
                lines.insert(draw(st.integers(1 if kind == "x.json" else 0, len(lines))), extra)
                item.counted(**{count: 1})
        if kind == "x.json" and len(lines) < 2:
            item.name = "x.jsonl"
        item.data = "".join(line + "\n" for line in lines).encode()
        if item.data and draw(st.booleans()):
            item.data = item.data[:-1]
            item.counts["blank"] -= not lines[-1]  # a line end is no line
        item.counts = +item.counts
    return item


OTHERS = [
    ("wrong.parquet", write_parquet({"body": ["x"]}), "bad"),
    (".hidden.txt", b"x", "hidden"),
    ("picture.png", b"x", "unknown.png"),
    ("program", b"\0", "unknown"),
    ("settings.json", b'{"n": 1}', "unknown"),
    ("binary.txt", b"x\0", "bad"),
    ("broken.json", b"[1, ", "bad"),
    ("broken.txt.gz", b"x", "bad"),
    ("broken.jsonl.zst", zstandard.compress(b"x")[:-1], "bad"),
    ("broken.tar", b"x" * 600, "bad"),
    ("broken.zip", b"x", "bad"),
    ("broken.parquet", b"x", "bad"),
]
others = st.sampled_from(OTHERS).map(lambda other: Item(*other[:2]).counted(**{other[2]: 1}))  # files that are left out


@st.composite
def archives(draw: st.DrawFn, items: st.SearchStrategy[Item]) -> Item:
    """A tar, two appended to each other, or a zip."""
    members = draw(st.lists(items, min_size=2, max_size=4))
    is_zip = draw(st.booleans())
    archive = Item("y.zip" if is_zip else "y.tar")
    for number, member in enumerate(members):
        member.name = draw(st.sampled_from(["./", "", "in/"])) + str(number) + member.name.lstrip(".")
        if "hidden" in member.counts and member.data == b"x":
            member.name = "." + member.name.replace("/", "")
        archive.documents += member.documents
        archive.counts += member.counts
    has_link = draw(st.booleans())
    archive.counted(linked=has_link)
    if is_zip:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))) as zipped:
            zipped.mkdir("in")
            for member in members:
                zipped.writestr(member.name, member.data)
            if has_link:
                link = zipfile.ZipInfo("link.txt")
                link.external_attr = (stat.S_IFLNK | 0o777) << 16
                zipped.writestr(link, "0a.txt")
            zipped.writestr("z.png", b"")  # so that there are two members at least
        archive.data = file.getvalue()
        return archive.counted(**{"unknown.png": 1})
    cut = draw(st.integers(0, len(members)))
    for part in (members[:cut], members[cut:]):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as tar:
            for member in part:
                info = tarfile.TarInfo(member.name)
                info.size = len(member.data)
                tar.addfile(info, io.BytesIO(member.data))
            if has_link and len(archive.data):
                link = tarfile.TarInfo("link.txt")
                link.type = tarfile.SYMTYPE
                link.linkname = "0a.txt"
                tar.addfile(link)
        archive.data += file.getvalue()
    return archive


@st.composite
def compressed(draw: st.DrawFn, items: st.SearchStrategy[Item]) -> Item:
    """A file compressed as a whole, or in two streams with zeros between."""
    item = draw(items)
    if item.name.startswith(".") or item.name == "program":
        return item
    suffix = draw(st.sampled_from([*COMPRESSIONS]))
    compress = COMPRESSIONS[suffix]
    cut = draw(st.integers(0, len(item.data)))
    padding = bytes(draw(st.sampled_from([0, 4])))
    item.data = compress(item.data[:cut]) + padding + compress(item.data[cut:]) + padding
    item.name += suffix
    return item


@st.composite
def folders(draw: st.DrawFn) -> tuple[list[Item], str]:
    """The items of a folder, and the separator of documents."""
    separator = draw(st.sampled_from([SEPARATOR, ""]))
    simple = st.one_of(texts(separator), json_rows(), others)
    nested = st.one_of(simple, simple, compressed(simple))
    nested = st.one_of(nested, archives(nested))
    items = draw(st.lists(st.one_of(nested, compressed(nested), archives(nested)), min_size=1, max_size=5))
    for number, item in enumerate(items):
        item.name = ("." if item.name.startswith(".") else "") + f"{number}{item.name.lstrip('.')}"
    if draw(st.booleans()):
        items.append(Item("two.jsonl", b'"first"\n"second"\n', ["first", "second"]))
    return items, separator


def decode(out: Path) -> list[str]:
    """The documents of train, then of val; each split is one if the tokenizer has no end token."""
    data = open_dataset(out, block_size=0, verify=True)
    assert data.tokenizer is not None
    texts = []
    for tokens in (data.train, data.val):
        ends = np.flatnonzero(tokens[:] == (data.end_of_text or -1)) + 1
        for ids in np.split(tokens[:], ends):
            texts.append(data.tokenizer.decode(ids[ids != (data.end_of_text or -1)].tolist()))
    return texts


@pytest.mark.parametrize("examples", [30, pytest.param(2000, marks=pytest.mark.slow)])
def test_text_is_in_the_tokens_or_named(examples: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prepare_module, "worker_pool", one_thread)
    done = Counter[str]()

    @settings(max_examples=examples, derandomize=True, deadline=None, suppress_health_check=[*HealthCheck])
    @given(
        folders(),
        st.sampled_from(["byte", "char", "bpe:300", WITHOUT_E_ACUTE]),
        st.integers(8, 60),
        st.sampled_from([4, 7, 1000]),
        st.booleans(),
    )
    def check(
        folder: tuple[list[Item], str], tokenizer: str | Tokenizer, chunk_bytes: int, piece_bytes: int, has_link: bool
    ) -> None:
        for module in (streams, reading, prepare_module):
            monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)
        monkeypatch.setattr(reading, "PIECE_BYTES", piece_bytes)
        shutil.rmtree(tmp_path, ignore_errors=True)
        (tmp_path / "in").mkdir(parents=True)
        items, separator = folder
        counts: Counter[str] = Counter()
        documents: list[str] = []
        for item in items:
            (tmp_path / "in" / item.name).write_bytes(item.data)
            documents += item.documents
            counts += item.counts
        if has_link:
            (tmp_path / "in/again").symlink_to(tmp_path / "in")
            (tmp_path / "in/linked.txt").write_text("linked")
            (tmp_path / "in/link.txt").symlink_to(tmp_path / "in/linked.txt")
            documents.append("linked")
            counts["duplicate"] = 2

        omissions = Omissions()
        options = ReadOptions(skip_bad=True, document_separator=separator)
        try:
            sources = find_inputs([str(tmp_path / "in")], omissions)
            meta = prepare(
                tmp_path / "out", sources, tokenizer, options=options, val_share=0.3, workers=1, omissions=omissions
            )
        except InputError:
            done["refused"] += 1
            if len({document[:1] for document in documents}) > 1:  # long documents are hashed by their first piece
                raise
            return
        decoded = decode(tmp_path / "out")
        encodable = documents
        if tokenizer is WITHOUT_E_ACUTE:
            encodable = [document.replace("é", "") for document in documents]
            counts["unencodable"] = "".join(documents).count("é")
        if len(documents) == 1:
            assert "".join(decoded) == encodable[0]
        elif tokenizer == "char":
            assert sorted("".join(decoded)) == sorted("".join(documents))
        else:
            assert sorted(filter(None, decoded)) == sorted(filter(None, encodable))
        named = Counter({kind: number for kind, (number, _) in meta["omitted"].items()})
        end_tokens = sum(document.count(SEPARATOR) for document in documents)
        is_whole = len(documents) > 1 and max(map(len, documents)) < piece_bytes / 4
        assert (end_tokens if is_whole else 0) <= named.pop("end_tokens", 0) <= end_tokens  # a cut may hide one
        assert named == +counts
        done.update(["prepared", *(+counts).keys()])

    check()
    assert done["prepared"] > examples / 3
    if examples > 1000:
        assert min(done[kind] for kind in done) > 10, done
