"""Files as blocks of bytes: decompressed, in UTF-8, with newlines as line ends."""

import bz2
import codecs
import io
import itertools
import lzma
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

from nanogpt.errors import InputError
from nanogpt.text.omissions import Omissions

CHUNK_BYTES = 2**20  # read at once
COMPRESSED_BYTES = 2**14  # decompressed at once, into a thousand times as much at the most, or somewhat more
UNICODE_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
BINARY_MARKS = {
    b"%PDF-": "PDF, which pdftotext converts",
    b"{\\rtf": "RTF, which pandoc converts",
    b"PK\3\4": "a zip archive, as .docx, .odt and .epub are",
    b"\x1f\x8b": "compressed by gzip, whose suffix is .gz",
}
# Invalid bytes of an encoding other than UTF-8 become the byte 0xFF, which is invalid in UTF-8 too.
codecs.register_error("nanogpt.invalid", lambda error: ("\udcff", error.end))  # type: ignore[attr-defined]


class LastBlock:
    """A file that remembers the last block read."""

    def __init__(self, file: IO[bytes]):
        self.file = file
        self.last = b""
        self.position = 0

    def read(self, size: int) -> bytes:
        self.last = self.file.read(size)
        self.position += len(self.last)
        return self.last

    def from_position(self, position: int) -> bytes:
        """The end of the last block, from a position in the file."""
        return self.last[len(self.last) - (self.position - position) :] if position < self.position else b""


class _Blocks(io.RawIOBase):
    """A file of the bytes in some blocks."""

    def __init__(self, blocks: Iterator[bytes]):
        self.blocks = blocks
        self.rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.rest:
            block = next(self.blocks, None)
            if block is None:
                return 0
            self.rest = memoryview(block)
        size = min(len(buffer), len(self.rest))
        buffer[:size] = self.rest[:size]
        self.rest = self.rest[size:]
        return size


def _open_blocks(blocks: Iterator[bytes]) -> IO[bytes]:
    return io.BufferedReader(_Blocks(blocks), CHUNK_BYTES)  # type: ignore[return-value]


def skip_zeros(block: bytes, file: IO[bytes]) -> IO[bytes] | None:
    """A block and the rest of a file, without zeros at the start; None if there is nothing else."""
    while block:
        if block := block.lstrip(b"\0"):
            return _open_blocks(itertools.chain([block], iter(partial(file.read, CHUNK_BYTES), b"")))
        block = file.read(CHUNK_BYTES)
    return None


def decompress(file: IO[bytes], compression: str) -> IO[bytes]:
    """A file of the decompressed bytes of all streams in a file. Reading it raises ValueError or EOFError at damage.

    The libraries' own readers take zeros between streams for the end, or data that is cut short.
    """
    make: Callable[[], Any] = {
        ".gz": lambda: zlib.decompressobj(zlib.MAX_WBITS | 16),
        ".bz2": bz2.BZ2Decompressor,
        ".xz": lzma.LZMADecompressor,
        ".zst": _make_zstandard,
    }[compression]

    def blocks() -> Iterator[bytes]:
        stream = make()
        data = b""
        while data := data or file.read(COMPRESSED_BYTES):
            if stream is None:
                data = data.lstrip(b"\0")
                if not data:
                    continue
                stream = make()
            try:
                block = stream.decompress(data)
            except Exception as error:  # each library has its own
                raise ValueError(str(error)) from error
            yield block
            data = b""
            if stream.eof:
                data = stream.unused_data
                stream = None
        if stream is not None:
            raise EOFError("the compressed data has no end")

    return _open_blocks(blocks())


def _make_zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise InputError('reading .zst files needs zstandard: run pip install -e ".[data]"') from error
    return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()  # as `zstd --long=31` writes


def read_utf8(file: IO[bytes], omissions: Omissions, name: str, encoding: str = "utf-8") -> Iterator[bytes]:
    """Read blocks and convert them to UTF-8, without a byte order mark; the last block is empty.

    Marks of UTF-16 and UTF-32 say the encoding. Bytes that are invalid are left to the parser, which counts them.
    """
    start = file.read(CHUNK_BYTES)
    if encoding == "utf-8":
        encoding = next((name for mark, name in UNICODE_MARKS.items() if start.startswith(mark)), encoding)
    blocks: Iterator[bytes] = itertools.chain([start], iter(partial(file.read, CHUNK_BYTES), b""))
    if encoding != "utf-8":
        texts = codecs.iterdecode(blocks, encoding, "nanogpt.invalid")
        blocks = (text.encode("utf-8", "surrogateescape") for text in texts)
    first = next(blocks, b"")
    if first.startswith(codecs.BOM_UTF8):
        first = first.removeprefix(codecs.BOM_UTF8)
        omissions.add("normalized", name)
    yield from filter(None, itertools.chain([first], blocks))
    yield b""


def normalize_newlines(blocks: Iterator[bytes], omissions: Omissions, name: str) -> Iterator[bytes]:
    """Make newlines of the line ends CRLF and CR; the last block is empty."""
    rest = b""  # a carriage return at the end of the block before, which a newline may follow
    for block in blocks:
        text = rest + block
        rest = b"\r" if block.endswith(b"\r") else b""
        text = text.removesuffix(rest)
        if b"\r" in text:
            omissions.add("normalized", name, text.count(b"\r"))
            text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        yield text


def find_binary(start: bytes) -> str:
    """Say why a file that starts so is not text, "" if it may be."""
    known = next((kind for mark, kind in BINARY_MARKS.items() if start.startswith(mark)), None)
    if known:
        return f"is not text but {known}"
    if b"\0" not in start:
        return ""
    problem = f"is binary, not text: byte 0 at offset {start.index(0):,}"
    for offset, encoding in ((1, "utf-16-le"), (0, "utf-16-be")):
        if start[offset::2].count(0) > len(start) // 4 and 0 not in start[1 - offset :: 2]:
            problem += f"; it looks like {encoding} (data/prepare.py --encoding={encoding})"
    return problem


def read_text(path: str | Path, label: str = "", omissions: Omissions | None = None) -> str:
    """Read a text as preparations do: UTF-8, with newlines as line ends, without a byte order mark.

    label: of messages, such as a flag; the path if empty. omissions: counts what is changed.
    Raises InputError for a binary file, and for invalid bytes, with the line.
    """
    label = label or str(path)
    omissions = omissions or Omissions()
    try:
        with open(path, "rb") as file:
            text = b"".join(normalize_newlines(read_utf8(file, omissions, label), omissions, label))
        if problem := find_binary(text[:CHUNK_BYTES]):
            raise InputError(f"{label}: {problem}")
        return text.decode()
    except OSError as error:
        raise InputError(f"{label}: could not be read ({error.strerror}); give a text file") from error
    except UnicodeDecodeError as error:
        line = text.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{label}: is not UTF-8 text: byte 0x{text[error.start]:02x} in line {line:,}; convert it first, "
            "for example with `iconv -t utf-8`"
        ) from error
