"""Documents wherever they lie: text and JSON lines, compressed, in archives, in parquet files, on the hub.

A source is a file or a dataset on the hub. `parts` reads one as a stream of parts of about a megabyte, which workers
parse and encode: what is read here is never a whole file in memory.
"""

import codecs
import contextlib
import glob
import gzip
import io
import lzma
import os
import re
import tarfile
import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from nanogpt.errors import InputError
from nanogpt.files import file_sha256, regular_file_size

BLOCK = 2**20  # bytes of text in a part, about
PIECE = 2**22  # bytes of a document that are encoded in one go
LONGEST_ROW = 2**28  # bytes; more is no line of JSON but a file without line ends
KINDS = {".txt": "text", ".md": "text", ".jsonl": "lines", ".parquet": "parquet", ".tar": "tar", ".zip": "zip"}
SHORT = {".tgz": ".tar.gz", ".txz": ".tar.xz"}
KNOWN = ".txt .md .jsonl .parquet .zip .tar, and .gz .xz .zst of these"
# Before the y of "x\ny", where neither is a space, the split patterns of GPT-2 and its successors cut in any case,
# unless y is a slash (o200k): the ids on both sides are those of the whole. In UTF-8, without some rare letters:
_NOT_SPACE = (
    rb"[!-~]|[\xc3-\xdf][\x80-\xbf]|[\xe0\xe4-\xef][\x80-\xbf]{2}|\xe3[\x81-\xbf][\x80-\xbf]|\xe3\x80[\x81-\xbf]"
)
_NOT_SPACE += rb"|\xe2\x80[\x90-\xa7]|\xf0[\x80-\xbf]{3}"
_BORDER = re.compile(rb"(?:" + _NOT_SPACE + rb")\n(?=[!-.0-~\xc3-\xe0\xe4-\xf4]|\xe3[\x81-\xbf])")


@dataclass(frozen=True)
class ReadOptions:
    """How sources are read: the column of the text; the encoding of text and JSON lines; whether what is bad is
    counted and left out instead of an error; whether rows are conversations."""

    text_key: str = "text"
    encoding: str = "utf-8"
    skip_bad: bool = False
    chat: bool = False

    @property
    def is_utf8(self) -> bool:
        return codecs.lookup(self.encoding).name in ("utf-8", "utf-8-sig", "ascii")


class InputFile(NamedTuple):
    """A file, or where `repo` is set a dataset on the hub, or where `sha256` is set too one parquet file of it."""

    name: str  # path, hf:..., or path inside the repository
    size: int = 0  # bytes as it lies there, 0 where unknown
    stamp: int = 0  # time of its last change, ns
    repo: str = ""
    revision: str = ""
    sha256: str = ""


class Chunk(NamedTuple):
    """Some documents, or a piece of one, as they were read."""

    kind: str  # "text": one document or a piece of it; "lines": JSON lines; "rows": strings or objects; "bad": a reason
    name: str  # the file, and the member of an archive
    first: int  # number of the first row, from 1; of a text: the piece's offset in bytes
    data: Any  # bytes, a list of rows, or what is bad
    items: int = 1  # pieces, or rows and empty lines
    begins: bool = True  # a text's first piece
    ends: bool = True  # a text's last piece
    in_val: bool | None = None  # None: its hash tells
    read: int = 0  # bytes of the source that were read until here
    state: Any = None  # of a stream from the hub: where to go on

    @property
    def documents(self) -> int:
        return int(self.begins) if self.kind == "text" else self.items if self.kind != "bad" else 0

    @property
    def size(self) -> int:
        """Bytes, about."""
        if self.kind != "rows":
            return len(self.data)
        return sum(len(row) if isinstance(row, str) else len(str(row)) for row in self.data)

    def rest(self, skip: int) -> "Chunk":
        """Without the first `skip` items, fewer than it has."""
        if not skip:
            return self
        if self.kind == "rows":
            return self._replace(data=self.data[skip:], items=self.items - skip, first=self.first + skip)
        return self._replace(data=self.data.split(b"\n", skip)[-1], items=self.items - skip, first=self.first + skip)

    def head(self, keep: int) -> "Chunk":
        """The first `keep` rows alone."""
        if self.kind == "rows":
            return self._replace(data=self.data[:keep], items=keep)
        return self._replace(data=b"\n".join(self.data.split(b"\n", keep)[:keep]), items=keep)


def kind_of(name: str) -> tuple[str | None, list[str]]:
    """What a file of that name holds (of KINDS, or None), and its compressions, the outer one first."""
    stem, suffix = os.path.splitext(name.lower())
    stem, suffix = os.path.splitext(stem + SHORT.get(suffix, suffix))
    compressions = []
    while suffix in (".gz", ".xz", ".zst"):
        compressions.append(suffix)
        stem, suffix = os.path.splitext(stem)
    return KINDS.get(suffix), compressions


def find(inputs: list[str], earlier: Sequence[InputFile] = ()) -> list[InputFile]:
    """The sources that `inputs` name: files, folders with all below them, globs, hf:OWNER/NAME[@CONFIG][:SPLIT].

    Files of a folder or a glob come in the order of their names. A file's own suffix counts only where it is one of
    KNOWN; a file that was named itself is else read as text. Raises InputError for what is not there, and for a folder
    that holds nothing of these. earlier: sources of the run to continue, whose commit on the hub stays.
    """
    found: dict[str, InputFile] = {}
    for name in inputs:
        if name.startswith("hf:"):
            before = [source for source in earlier if source.name == name]
            found[name] = before[0] if before else _on_hub(name)
            continue
        try:
            if os.path.isdir(name):
                paths = sorted(
                    os.path.join(folder, file)
                    for folder, _, files in os.walk(name)
                    for file in files
                    if _wanted(os.path.relpath(os.path.join(folder, file), name))
                )
                if not paths:
                    raise InputError(f"{name} holds no text: files {KNOWN} are taken; name others by a glob")
            elif os.path.lexists(name) or not glob.has_magic(name):
                paths = [name]
            else:
                paths = sorted(path for path in glob.glob(name, recursive=True) if os.path.isfile(path))
                if not paths:
                    raise InputError(f"no file is named like {name}: check the pattern")
            for path in paths:
                size = regular_file_size(Path(path))
                found[path] = InputFile(path, size, os.stat(path).st_mtime_ns)
                with open(path, "rb"):
                    pass
        except OSError as error:
            raise InputError(
                f"{error.filename or name} cannot be read ({error.strerror}): give files, folders, globs or "
                "hf:OWNER/NAME with --input"
            ) from error
    return list(found.values())


def _wanted(path: str) -> bool:
    hidden = any(part.startswith((".", "__MACOSX")) for part in path.replace("\\", "/").split("/"))
    return not hidden and kind_of(path)[0] is not None


def _hub_parts(name: str) -> tuple[str, str | None, str]:
    """Repository, configuration and split of hf:OWNER/NAME[@CONFIG][:SPLIT]."""
    match = re.fullmatch(r"hf:([^@:]+)(?:@([^:]+))?(?::(.+))?", name)
    if not match:
        raise InputError(f"{name} names no dataset: hf:OWNER/NAME, hf:OWNER/NAME@CONFIG:SPLIT")
    return match[1], match[2], match[3] or "train"


def _on_hub(name: str) -> InputFile:
    """The dataset at its present commit, at which a continued run stays."""
    repo = _hub_parts(name)[0]
    try:
        from huggingface_hub import HfApi

        return InputFile(name, repo=repo, revision=str(HfApi().dataset_info(repo).sha))
    except Exception as error:  # the library's network errors have no class in common
        told = " ".join(str(error).split())[:300]
        raise InputError(f"{repo} was not found on the hub ({told}): check its name and the network") from error


def hub_files(repo: str, under: str, earlier: Sequence[InputFile] = ()) -> list[InputFile]:
    """The parquet files of a dataset on the hub whose path begins with `under`; `earlier` as in `find`."""
    from huggingface_hub import HfApi

    if known := [source for source in earlier if source.repo == repo and source.name.startswith(under)]:
        return known
    try:
        for revision in ("main", "refs/convert/parquet"):
            found: Any = HfApi().dataset_info(repo, revision=revision, files_metadata=True)
            parquet = [file for file in found.siblings if file.rfilename.endswith(".parquet")]
            files = {file.rfilename: file.lfs for file in parquet if file.rfilename.startswith(under)}
            if files and not any("partial" in name for name in files):
                return [
                    InputFile(name, getattr(lfs, "size", None) or 0, 0, repo, found.sha, lfs.sha256)
                    for name, lfs in sorted(files.items())
                ]
    except Exception as error:  # the library's network errors have no class in common
        raise InputError(f"{repo} could not be listed ({error}): check the network, or give --input") from error
    raise InputError(f"{repo} has no whole set of parquet files under {under!r}: give --input")


def parts(
    source: InputFile,
    reading: ReadOptions,
    skip: int = 0,
    state: Any = None,
    folder: Path | None = None,
    cut: int | None = None,
) -> Iterator[Chunk]:
    """The parts of a source from its item `skip` on; an item is a row, a line, or a piece of a text.

    `state` is that of the last part before; what has to be downloaded whole goes to `folder` and is deleted after its
    last part. cut: of a source that is one text, as `text_pieces` takes it.

    Raises InputError for what cannot be read, unless reading.skip_bad: then a part says so.
    """
    path, is_open = source.name, False
    try:
        if source.sha256:
            assert folder is not None
            path = str(download(source, folder))
        if source.repo and not source.sha256:
            yield from _stream_hub(source, skip, state)
        elif kind_of(path)[0] == "parquet":
            yield from _parquet(path, source.name, reading, skip)
        else:
            for part in _file(path, reading, cut):
                is_open = not part.ends
                if skip < part.items:
                    yield part.rest(skip)
                skip = max(0, skip - part.items)
    except (*_damage(), OSError, EOFError, ValueError, RuntimeError) as error:
        told = " ".join(str(error).split())[:300] or type(error).__name__
        bad = _bad(reading, source.name, f"cannot be read to its end ({told}), so it is damaged or cut short")
        if is_open:
            yield Chunk("text", source.name, 0, b"", 0, begins=False)
        if not skip:
            yield bad
    if source.sha256:
        Path(path).unlink()


def _bad(reading: ReadOptions, name: str, why: str) -> Chunk:
    if not reading.skip_bad:
        raise InputError(f"{name} {why}: replace it, or leave it out with --skip_bad=True")
    return Chunk("bad", name, 0, f"{name} {why}")


def _damage() -> tuple[Any, ...]:
    """The errors of damaged files that are not of Python's common kinds."""
    errors: list[Any] = [zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile]
    with contextlib.suppress(ImportError):
        import zstandard

        errors.append(zstandard.ZstdError)
    return tuple(errors)


def _file(path: str, reading: ReadOptions, cut: int | None) -> Iterator[Chunk]:
    """Any file but parquet."""
    kind, compressions = kind_of(path)
    with open(path, "rb") as raw:
        if kind == "zip" and not compressions:
            with zipfile.ZipFile(raw) as archive:
                for info in archive.infolist():
                    if not info.is_dir() and _wanted(info.filename):
                        with archive.open(info) as stream:
                            yield from _stream(f"{path}:{info.filename}", info.filename, stream, raw, reading)
            return
        yield from _stream(path, path, raw, raw, reading, cut)


def _stream(
    name: str, file: str, stream: IO[bytes], raw: IO[bytes], reading: ReadOptions, cut: int | None = None
) -> Iterator[Chunk]:
    """What a stream of bytes holds, by the name of its file; `raw` is the file that tells how much was read."""
    kind, compressions = kind_of(file)
    for compression in compressions:
        stream = _decompressed(stream, compression)
    if kind == "tar":
        with tarfile.open(fileobj=stream, mode="r|", bufsize=BLOCK) as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # which it would collect
                if (
                    member.isfile()
                    and _wanted(member.name)
                    and kind_of(member.name)[0] not in ("tar", "zip", "parquet")
                ):
                    inner = archive.extractfile(member)
                    assert inner is not None
                    yield from _stream(f"{name}:{member.name}", member.name, inner, raw, reading)
    elif kind == "lines":
        for part in _lines(name, stream, reading):
            yield part._replace(read=raw.tell())
    elif kind in ("zip", "parquet"):
        yield _bad(reading, name, "lies inside of another file, where it cannot be read: unpack it first")
    else:
        for part in text_pieces(name, stream, reading, cut):
            yield part._replace(read=raw.tell())


def _decompressed(stream: IO[bytes], compression: str) -> IO[bytes]:
    if compression == ".gz":
        return gzip.GzipFile(fileobj=stream, mode="rb")  # type: ignore[return-value]
    if compression == ".xz":
        return lzma.LZMAFile(stream)  # type: ignore[return-value]
    return io.BufferedReader(_Zstandard(stream), BLOCK)


class _Zstandard(io.RawIOBase):
    """The library's own reader takes a file that is cut short for a whole one; this one raises EOFError."""

    def __init__(self, stream: IO[bytes]):
        try:
            import zstandard
        except ImportError as error:
            raise InputError("reading .zst files needs zstandard: run `pip install -e .[data]`") from error
        self._stream, self._library = stream, zstandard.ZstdDecompressor()
        self._frame: Any = None
        self._packed, self._text = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._text:
            self._packed = self._packed or self._stream.read(2**16)
            if not self._packed:
                if self._frame:
                    raise EOFError("its last frame is not complete")
                return 0
            frame = self._frame = self._frame or self._library.decompressobj()
            self._text = memoryview(frame.decompress(self._packed))
            self._packed = frame.unused_data
            if frame.eof:
                self._frame = None
        n = min(len(buffer), len(self._text))
        buffer[:n], self._text = self._text[:n], self._text[n:]
        return n


def _utf8(stream: IO[bytes], reading: ReadOptions) -> Iterator[bytes]:
    """Blocks of a stream in UTF-8, without the mark that some programs put before it; what is wrong in UTF-8 stays so,
    what is wrong in another encoding becomes U+FFFD."""
    decoder = None if reading.is_utf8 else codecs.getincrementaldecoder(reading.encoding)("replace")
    mark: bytes = codecs.BOM_UTF8
    done = False
    while not done:
        block = stream.read(BLOCK)
        done = not block
        if decoder:
            block = decoder.decode(block, done).encode("utf-8", "surrogatepass")
        block, mark = block.removeprefix(mark), b"" if block else mark
        yield block


def _lines(name: str, stream: IO[bytes], reading: ReadOptions) -> Iterator[Chunk]:
    first, held, size = 1, [b""], 0
    for block in _utf8(stream, reading):
        end = block.rfind(b"\n") + 1
        if end:
            data = b"".join([*held, block[:end]])
            count = data.count(b"\n")
            yield Chunk("lines", name, first, data, count)
            first, held, size = first + count, [], 0
        held.append(block[end:])
        size += len(held[-1])
        if size > LONGEST_ROW:
            raise ValueError(f"line {first:,} is longer than {LONGEST_ROW:,} bytes")
    if size:
        yield Chunk("lines", name, first, b"".join(held))


def text_pieces(name: str, stream: IO[bytes], reading: ReadOptions, cut: int | None = None) -> Iterator[Chunk]:
    """One document: its line ends turned to newlines, in pieces at whose borders its tokens end too.

    cut: bytes of the text (in UTF-8, line ends turned) of which all that comes later is for the validation split, and
    all before for the training split.
    """
    text, offset, held, begins = b"", 0, b"", True
    for block in _utf8(stream, reading):
        block, held = held + block, b""
        if b"\r" in block:
            if block.endswith(b"\r"):  # a newline may follow
                block, held = block[:-1], b"\r"
            block = block.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        text += block
        if begins and not offset and b"\0" in text[:PIECE]:
            yield _bad(reading, name, f"is binary, not text: byte 0 at offset {text.index(0):,}")
            return
        while len(text) > PIECE:
            end = border(text)
            if cut is not None and offset < cut < offset + end:
                end = _character(text, cut - offset)
            yield Chunk("text", name, offset, text[:end], 1, begins, False, None if cut is None else offset >= cut)
            text, offset, begins = text[end:], offset + end, False
    text += b"\n" if held else b""
    if cut is not None and offset < cut < offset + len(text):
        end = _character(text, cut - offset)
        yield Chunk("text", name, offset, text[:end], 1, begins, False, False)
        text, offset, begins = text[end:], offset + end, False
    yield Chunk("text", name, offset, text, 1, begins, True, None if cut is None else offset >= cut)


def border(text: bytes, size: int = PIECE) -> int:
    """Where a piece of at most `size` bytes of a longer text ends: ids of pieces are those of the whole text."""
    for start in (max(0, size - 2**14), 0):  # most texts have a border there
        if ends := [match.end() for match in _BORDER.finditer(text, start, size)]:
            return ends[-1]
    return _character(text, size)


def _character(text: bytes, at: int) -> int:
    """The start of the character around byte `at`."""
    return next((i for i in range(at, max(0, at - 4), -1) if text[i] & 0xC0 != 0x80), at)


def _parquet(path: str, name: str, reading: ReadOptions, skip: int) -> Iterator[Chunk]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise InputError("reading parquet files needs pyarrow: run `pip install -e .[data]`") from error
    columns = ["messages", "prompt", "completion"] if reading.chat else [reading.text_key]
    with pyarrow.parquet.ParquetFile(path) as file:
        there = file.schema_arrow.names
        if not (found := [column for column in columns if column in there]):
            bad = _bad(reading, name, f"has no column {' or '.join(map(repr, columns))}, but {', '.join(there)}")
            if not skip:
                yield bad
            return
        rows, group = 0, 0
        while group < file.num_row_groups and rows + file.metadata.row_group(group).num_rows <= skip:
            rows += file.metadata.row_group(group).num_rows
            group += 1
        share = os.path.getsize(path) / max(1, file.metadata.num_rows)
        groups = list(range(group, file.num_row_groups))
        for batch in file.iter_batches(128, row_groups=groups, columns=found):
            data = batch.to_pylist() if reading.chat else batch.column(0).to_pylist()
            if rows + len(data) > skip:
                part = Chunk("rows", name, rows + 1, data, len(data), read=int(share * (rows + len(data))))
                yield part.rest(max(0, skip - rows))
            rows += len(data)


def _stream_hub(source: InputFile, skip: int, state: Any) -> Iterator[Chunk]:
    """Rows of a dataset on the hub as they come. A network that fails is asked again, with pauses."""
    try:
        import datasets
    except ImportError as error:
        raise InputError("hf: needs Hugging Face datasets: run `pip install -e .[data]`") from error
    repo, config, split = _hub_parts(source.name)
    rows, failures = skip, 0
    while True:
        try:
            stream = datasets.load_dataset(repo, config, split=split, revision=source.revision, streaming=True)
            if state is not None:
                stream.load_state_dict(state)
            data: list[Any] = []
            for row in stream:
                data.append(row)
                if len(data) == 128:
                    rows, state, failures = rows + 128, stream.state_dict(), 0
                    yield Chunk("rows", source.name, rows - 127, data, 128, state=state)
                    data = []
            if data:
                yield Chunk("rows", source.name, rows + 1, data, len(data), state=stream.state_dict())
            return
        except Exception as error:  # the libraries' network errors have no class in common
            failures += 1
            if failures > 4:
                told = " ".join(str(error).split())[:300]
                raise InputError(
                    f"{source.name} could not be read on from row {rows + 1:,} ({told}): run the command again to go "
                    "on there"
                ) from error
            time.sleep(2**failures)


def download(source: InputFile, folder: Path) -> Path:
    """A file of the hub, checked, in `folder`. Raises InputError where the network fails or its SHA-256 differs."""
    from huggingface_hub import hf_hub_download

    try:
        path = Path(
            hf_hub_download(source.repo, source.name, repo_type="dataset", revision=source.revision, local_dir=folder)
        )
    except Exception as error:  # as above
        raise InputError(
            f"{source.name} could not be downloaded ({error}): run the command again to go on here; should commit "
            f"{source.revision} be gone from the hub, delete {folder} to begin anew"
        ) from error
    if file_sha256(path) != source.sha256:
        path.unlink()
        raise InputError(f"{source.name} came damaged (its SHA-256 differs) and was deleted: run the command again")
    return path
