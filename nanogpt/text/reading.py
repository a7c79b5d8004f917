"""Read texts, JSON lines, JSON and parquet files, compressed or in archives of any depth.

`read_chunks` reads an input as a stream of chunks of about a megabyte, for workers to parse and encode: no file is in
memory as a whole. What is left out is a chunk too, of the kind "bad" or "omitted", which DocumentParser counts.
"""

import codecs
import contextlib
import hashlib
import itertools
import json
import lzma
import os
import re
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from nanogpt.errors import InputError
from nanogpt.text.omissions import Omissions
from nanogpt.text.sources import InputFile, download, file_kind, should_omit
from nanogpt.text.streams import (
    CHUNK_BYTES,
    LastBlock,
    decompress,
    find_binary,
    normalize_newlines,
    read_utf8,
    skip_zeros,
)

PIECE_BYTES = 2**22  # longer documents are encoded in pieces
MAX_RECORD_BYTES = 2**28  # a longer line is not JSON but a file without line ends
TAR_BYTES = 2**16  # bytes of an archive that are read at once
READ_ERRORS = (
    *(OSError, EOFError, ValueError, RuntimeError),
    *(zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile),
)
# In "x\ny", where neither x nor y is white space, the split patterns of GPT-2 and its successors always split before y,
# unless y is a slash (o200k). So the ids of the two sides are those of the whole. In UTF-8, without some rare letters:
_NOT_SPACE = (
    rb"[!-~]|[\xc3-\xdf][\x80-\xbf]|[\xe0\xe4-\xef][\x80-\xbf]{2}|\xe3[\x81-\xbf][\x80-\xbf]|\xe3\x80[\x81-\xbf]"
    rb"|\xe2\x80[\x90-\xa7]|\xf0[\x80-\xbf]{3}"
)
_BOUNDARY = re.compile(rb"(?:" + _NOT_SPACE + rb")\n(?=[!-.0-~\xc3-\xe0\xe4-\xf4]|\xe3[\x81-\xbf])")


@dataclass(frozen=True)
class ReadOptions:
    """Options of reading: the column of the text, the encoding, and what to do with bad rows and conversations."""

    text_key: str = "text"
    encoding: str = "utf-8"  # of text files and JSON lines
    skip_bad: bool = False  # count bad rows and files and leave them out, instead of an error
    chat: bool = False  # rows are conversations
    document_separator: str = ""  # splits texts into documents


@dataclass(frozen=True)
class ValSplit:
    """The rule for which documents are for validation.

    A document is if its hash is below `share`, whatever other documents there are. In a single text it is instead all
    that follows the first `tail_start` bytes.
    """

    share: float
    tail_start: int | None = None

    def is_val(self, document: bytes) -> bool:
        return hash_fraction(document) < self.share


def hash_fraction(document: bytes) -> float:
    """Hash a document to a number in [0, 1)."""
    return int.from_bytes(hashlib.blake2b(document, digest_size=8).digest(), "little") / 2**64


class Chunk(NamedTuple):
    """Some documents, or a piece of one, as read.

    kind: "text" (a document or a piece of it, bytes), "lines" (a list of JSON lines, bytes), "rows" (a list of strings,
    objects or, of a text with separators, bytes); "bad" (a file that is left out; the reason), "omitted" (Omissions).
    """

    kind: str
    name: str  # the file, and the member of an archive
    first: int  # number of the first row, from 1; of a text: offset of the piece in bytes
    data: Any
    is_start: bool = True  # whether it begins a document
    is_end: bool = True
    in_val: bool | None = None  # None: the hash of each document decides
    bytes_read: int = 0  # of the file so far

    @property
    def items(self) -> int:
        """The number of rows or lines, else 1."""
        return len(self.data) if self.kind in ("lines", "rows") else 1

    @property
    def documents(self) -> int:
        if self.kind == "text":
            return int(self.is_start)
        return self.items if self.kind in ("lines", "rows") else 0

    @property
    def size(self) -> int:
        """Bytes of text, about."""
        if self.kind in ("lines", "rows"):
            return sum(len(row if isinstance(row, str | bytes) else str(row)) for row in self.data)
        return len(self.data) if self.kind == "text" else 0

    def slice(self, start: int, end: int) -> "Chunk":
        """The items from `start` to `end`, of lines or rows; anything else has one item, which stays whole."""
        if self.kind not in ("lines", "rows"):
            return self
        return self._replace(data=self.data[start:end], first=self.first + start)


def read_chunks(
    source: InputFile, options: ReadOptions, split: ValSplit, skip: int = 0, staging: Path | None = None
) -> Iterator[Chunk]:
    """Read a file after its first `skip` items: rows, lines, pieces of texts, and omissions.

    A file on the hub is downloaded to `staging` and deleted at the end.
    """
    path = Path(source.name)
    if source.repo:
        assert staging is not None
        path = download(source, staging)
    try:
        file = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        yield Chunk("bad", source.name, 0, f"cannot be read ({error.strerror})")
        return

    with file:
        for chunk in _Reader(options, split, staging).read(_Stream(source.name, source.name, file, is_on_disk=True)):
            if skip < chunk.items:
                yield chunk.slice(skip, chunk.items)._replace(bytes_read=chunk.bytes_read or file.tell())
            skip = max(0, skip - chunk.items)
    if source.repo:
        path.unlink()


class _Stream(NamedTuple):
    """Bytes to read: a file, or a member of an archive."""

    name: str  # for messages: the file, and the member of an archive
    path: str  # of the file, or of the member in its archive
    file: IO[bytes]
    is_on_disk: bool = False  # otherwise it can be read only once, from its start


@dataclass(frozen=True)
class _Reader:
    """Reads streams of all kinds. Methods get the stream's own Omissions, to count what they leave out or change."""

    options: ReadOptions
    split: ValSplit
    staging: Path | None

    def read(self, stream: _Stream) -> Iterator[Chunk]:
        """Read chunks, each after a chunk of what was left out before it.

        An error of reading ends the open document and becomes a chunk of the kind "bad".
        """
        omissions = Omissions()
        chunk = None
        try:
            for chunk in self._read(stream, omissions):
                if omissions.counts:
                    yield Chunk("omitted", stream.name, 0, omissions.take())
                yield chunk
        except READ_ERRORS as error:
            if chunk and not chunk.is_end:
                yield chunk._replace(data=b"", is_start=False, is_end=True)
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            problem = f"cannot be read to its end ({reason}), so it is damaged or cut short"
            yield Chunk("bad", stream.name, 0, problem)
        if omissions.counts:
            yield Chunk("omitted", stream.name, 0, omissions)

    def _read(self, stream: _Stream, omissions: Omissions) -> Iterator[Chunk]:
        kind, compressions = file_kind(stream.path)
        for compression in compressions:
            stream = stream._replace(file=decompress(stream.file, compression), is_on_disk=False)
        readers: dict[str | None, Callable[[_Stream, Omissions], Iterator[Chunk]]] = {
            "tar": self._read_tar,
            "zip": self._read_zip,
            "parquet": self._read_parquet,
            "lines": self._read_lines,
            "json": self._read_json,
        }
        yield from readers.get(kind, self._read_text)(stream, omissions)

    @contextlib.contextmanager
    def _on_disk(self, stream: _Stream) -> Iterator[IO[bytes]]:
        """The stream as a file that can be read in any order: itself, or a temporary copy."""
        if stream.is_on_disk:
            yield stream.file
            return
        with tempfile.TemporaryFile(dir=self.staging) as file:
            shutil.copyfileobj(stream.file, file, CHUNK_BYTES)
            file.seek(0)
            yield file

    # --- Archives

    def _read_zip(self, stream: _Stream, omissions: Omissions) -> Iterator[Chunk]:
        with self._on_disk(stream) as file, zipfile.ZipFile(file) as archive:
            file.seek(0)
            if file.read(4) == b"PK\3\4" and all(info.header_offset for info in archive.infolist()):
                yield Chunk("bad", stream.name, 0, "holds another archive before the last one: give them as two files")
            members = [info for info in archive.infolist() if not info.is_dir()]
            for info in members:
                name = f"{stream.name}:{info.filename}"
                kind = should_omit(info.filename)
                if stat.S_ISLNK(info.external_attr >> 16):
                    kind = "linked"
                elif kind and kind.startswith("unknown") and len(members) == 1:
                    kind = None  # like a file that is named by itself
                if kind:
                    omissions.add(kind, name)
                    continue
                try:
                    member = archive.open(info)
                except READ_ERRORS as error:  # such as encryption
                    yield Chunk("bad", name, 0, f"cannot be read ({error})")
                    continue
                with member:
                    yield from self.read(_Stream(name, info.filename, member))

    def _read_tar(self, stream: _Stream, omissions: Omissions) -> Iterator[Chunk]:
        """Read the members of an archive, and those of others that are appended to it."""
        rest: IO[bytes] | None = stream.file
        while rest:
            blocks: Any = LastBlock(rest)
            with tarfile.open(fileobj=blocks, mode="r|", bufsize=TAR_BYTES) as archive:
                for member in archive:
                    archive.members = []  # type: ignore[attr-defined]  # or the list grows with the archive
                    name = f"{stream.name}:{member.name}"
                    kind = should_omit(member.name)
                    if member.islnk() or member.issym():
                        kind = "linked"
                    elif not member.isfile():
                        kind = "unknown"
                    if not kind:
                        content = archive.extractfile(member)
                        assert content is not None
                        yield from self.read(_Stream(name, member.name, content))
                    elif not member.isdir():
                        omissions.add(kind, name)
            # tarfile takes a damaged header for the end, but after the end are only zeros, or another archive.
            rest = skip_zeros(blocks.from_position(archive.offset), rest)

    # --- Rows

    def _read_parquet(self, stream: _Stream, omissions: Omissions) -> Iterator[Chunk]:
        try:
            from pyarrow.parquet import ParquetFile
        except ImportError as error:
            raise InputError('reading .parquet files needs pyarrow: run pip install -e ".[data]"') from error

        columns = ["messages", "prompt", "completion", "tools"] if self.options.chat else [self.options.text_key]
        with self._on_disk(stream) as file, ParquetFile(file) as parquet:
            names = parquet.schema_arrow.names
            present = [column for column in columns if column in names]
            if not present:
                problem = f"has no column {' or '.join(map(repr, columns))}, but {', '.join(names)}"
                yield Chunk("bad", stream.name, 0, problem)
                return
            size = os.fstat(file.fileno()).st_size if stream.is_on_disk else 0
            first = 1
            for batch in parquet.iter_batches(128, columns=present):
                rows = batch.to_pylist() if self.options.chat else batch.column(0).to_pylist()
                bytes_read = size * (first + len(rows) - 1) // parquet.metadata.num_rows
                yield Chunk("rows", stream.name, first, rows, bytes_read=bytes_read)
                first += len(rows)

    def _read_lines(self, stream: _Stream, omissions: Omissions) -> Iterator[Chunk]:
        yield from _cut_records("lines", stream.name, self._read_utf8(stream, omissions), b"\n", omissions)

    def _read_json(self, stream: _Stream, omissions: Omissions) -> Iterator[Chunk]:
        """Read JSON lines, which the first line shows; or one array of rows, or one row."""
        blocks = self._read_utf8(stream, omissions)
        head = bytearray()  # the first line, and some of what follows it
        for block in blocks:
            head += block
            # Looked at only where a line ends, or one line of many blocks would be copied for each.
            if len(head) > MAX_RECORD_BYTES or (b"\n" in block and head.lstrip().partition(b"\n")[2].strip()):
                break
        line, _, rest = head.lstrip().partition(b"\n")
        if rest.strip() and _is_row(bytes(line)):
            yield from _cut_records("lines", stream.name, itertools.chain([bytes(head)], blocks), b"\n", omissions)
            return

        for block in blocks:
            head += block
            if len(head) > MAX_RECORD_BYTES:
                raise ValueError(f"one JSON value of over {MAX_RECORD_BYTES:,} bytes; convert it to JSON lines")
        try:
            value = json.loads(head) if head.strip() else []
        except (ValueError, RecursionError) as error:
            yield Chunk("bad", stream.name, 0, f"is neither JSON lines nor JSON ({error})")
            return
        keys = {"messages", "prompt"} if self.options.chat else {self.options.text_key}
        if isinstance(value, dict) and not value.keys() & keys:
            place = f"{stream.name}: is one JSON object without {' or '.join(map(repr, sorted(keys)))}"
            omissions.add("unknown", place)
            return
        rows = value if isinstance(value, list) else [value]
        for start in range(0, len(rows), 128):
            yield Chunk("rows", stream.name, start + 1, rows[start : start + 128])

    # --- Texts

    def _read_text(self, stream: _Stream, omissions: Omissions) -> Iterator[Chunk]:
        blocks = normalize_newlines(self._read_utf8(stream, omissions), omissions, stream.name)
        first = next(blocks)
        if problem := find_binary(first):
            if file_kind(stream.path)[0] == "text or binary":
                omissions.add("unknown", f"{stream.name}: {problem}")
            else:
                yield Chunk("bad", stream.name, 0, problem)
            return
        blocks = itertools.chain([first], blocks)
        if separator := self.options.document_separator.encode():
            yield from _cut_records("rows", stream.name, blocks, separator, omissions)
        else:
            yield from self._cut_pieces(stream.name, blocks)

    def _cut_pieces(self, name: str, blocks: Iterable[bytes]) -> Iterator[Chunk]:
        """Cut a document into pieces whose ids are those of the whole.

        A document of several pieces gets its split here, by the first one: the workers see each piece alone.
        """
        offset = 0
        text = b""
        tail_start = self.split.tail_start
        in_val = None if tail_start is None else False
        for block in blocks:
            text += block
            while True:
                end = find_boundary(text) if len(text) > PIECE_BYTES else len(text)
                reaches_tail = False
                if tail_start is not None and not in_val and tail_start < offset + end:
                    reaches_tail = True
                    end = _character_start(text, tail_start - offset)
                    if offset + end == 0:  # one character at least is for training
                        end = next((i for i in range(1, len(text)) if text[i] & 0xC0 != 0x80), len(text))
                if end == len(text):
                    break
                if tail_start is None and offset == 0:
                    in_val = self.split.is_val(text[:end].decode(errors="replace").encode())
                yield Chunk("text", name, offset, text[:end], offset == 0, False, in_val)
                in_val = in_val or reaches_tail
                offset += end
                text = text[end:]
        yield Chunk("text", name, offset, text, offset == 0, True, in_val)

    def _read_utf8(self, stream: _Stream, omissions: Omissions) -> Iterator[bytes]:
        is_utf8 = codecs.lookup(self.options.encoding).name in ("utf-8", "utf-8-sig", "ascii")
        return read_utf8(stream.file, omissions, stream.name, "utf-8" if is_utf8 else self.options.encoding)


def _is_row(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), str | dict)
    except (ValueError, RecursionError):
        return False


def _cut_records(
    kind: str, name: str, blocks: Iterable[bytes], separator: bytes, omissions: Omissions
) -> Iterator[Chunk]:
    """Cut blocks at a separator into chunks of whole records; of "rows", count the separators.

    Raises ValueError for a record of more than MAX_RECORD_BYTES.
    """
    first = 1
    incomplete: list[bytes] = []  # parts of the record that is not at its end
    tail = b""  # its last bytes, where a separator may have begun
    for block in blocks:
        incomplete.append(block)
        tail += block
        if separator in tail:
            *records, tail = b"".join(incomplete).split(separator)
            if kind == "rows":
                omissions.add("separators", name, len(records))
            yield Chunk(kind, name, first, records)
            first += len(records)
            incomplete = [tail]
        tail = tail[-len(separator) :]
        if sum(map(len, incomplete)) > MAX_RECORD_BYTES:
            unit = "line" if kind == "lines" else "document"
            raise ValueError(f"{unit} {first:,} is longer than {MAX_RECORD_BYTES:,} bytes")
    if rest := b"".join(incomplete):
        yield Chunk(kind, name, first, [rest])


def find_boundary(text: bytes) -> int:
    """Find where to cut a longer text, after at most PIECE_BYTES.

    Both sides have the ids of the whole, unless there is no such place.
    """
    for start in (max(0, PIECE_BYTES - 2**14), 0):  # most texts have a boundary in the last 16 KB
        ends = [match.end() for match in _BOUNDARY.finditer(text, start, PIECE_BYTES)]
        if ends:
            return ends[-1]
    return _character_start(text, PIECE_BYTES)


def split_pieces(text: bytes) -> Iterator[bytes]:
    """Cut a long text into pieces whose ids are those of the whole."""
    while len(text) > PIECE_BYTES:
        end = find_boundary(text)
        yield text[:end]
        text = text[end:]
    yield text


def _character_start(text: bytes, position: int) -> int:
    """The start of the UTF-8 character around a byte."""
    candidates = range(position, max(-1, position - 4), -1)
    return next((i for i in candidates if text[i] & 0xC0 != 0x80), position)
