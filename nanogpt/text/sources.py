"""Read documents from text and JSON lines, compressed or in archives, from parquet files and from the hub.

`find_inputs` lists the files that the command line names. `read_chunks` reads one as a stream of chunks of about a
megabyte, for workers to parse and encode: no file is in memory as a whole. Nothing is left out silently: a file that is
damaged, binary or of an unknown kind becomes a chunk of the kind "bad" or "ignored", which DocumentParser counts.
"""

import codecs
import fnmatch
import glob
import gzip
import hashlib
import lzma
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from nanogpt.errors import InputError
from nanogpt.files import file_sha256, regular_file_size

CHUNK_BYTES = 2**20  # of text in a chunk, about
PIECE_BYTES = 2**22  # longer documents are encoded in pieces
MAX_LINE_BYTES = 2**28  # a longer line is not JSON but a file without line ends
FILE_KINDS = {".txt": "text", ".md": "text", ".jsonl": "lines", ".parquet": "parquet", ".tar": "tar", ".zip": "zip"}
COMPRESSIONS = (".gz", ".xz", ".zst")
ALIASES = {".tgz": ".tar.gz", ".txz": ".tar.xz"}
SUPPORTED = ".txt .md .jsonl .parquet .zip .tar, and .gz .xz .zst of these"
CONVERTED = "refs/convert/parquet"  # the branch for the hub's own conversions, as CONFIG/SPLIT/NNNN.parquet
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

    @property
    def is_utf8(self) -> bool:
        return codecs.lookup(self.encoding).name in ("utf-8", "utf-8-sig", "ascii")


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


class InputFile(NamedTuple):
    """A file on disk, or if `repo` is set a parquet file of a dataset on the hub."""

    name: str  # path, or path in the repository
    size: int = 0  # bytes; 0: unknown
    mtime_ns: int = 0
    repo: str = ""
    revision: str = ""
    sha256: str = ""
    origin: str = ""  # the input that named it on the hub

    @property
    def text_bytes(self) -> int:
        """Bytes of text, estimated: compression makes English three times smaller."""
        kind, compressions = file_kind(self.name)
        return self.size * (3 if compressions or kind in ("zip", "parquet") else 1)


class Chunk(NamedTuple):
    """Some documents, or a piece of one, as read.

    kind: "text" (a document or a piece of it, bytes), "lines" (JSON lines, bytes), "rows" (a list of strings or
    objects); or "bad" or "ignored" (a file that is left out; the reason).
    """

    kind: str
    name: str  # the file, and the member of an archive
    first: int  # number of the first row, from 1; of a text: offset of the piece in bytes
    data: Any
    items: int = 1  # pieces, or rows and empty lines
    is_start: bool = True  # whether it begins a document
    is_end: bool = True
    in_val: bool | None = None  # None: the hash of each document decides
    bytes_read: int = 0  # of the file so far

    @property
    def documents(self) -> int:
        if self.kind == "text":
            return int(self.is_start)
        return self.items if self.kind in ("lines", "rows") else 0

    @property
    def size(self) -> int:
        """Bytes of text, about."""
        if self.kind != "rows":
            return len(self.data)
        return sum(len(row) if isinstance(row, str) else len(str(row)) for row in self.data)

    def slice(self, start: int, end: int) -> "Chunk":
        """The items from `start` to `end`, of lines or rows; a text has one item, which stays whole."""
        if self.kind not in ("lines", "rows") or (start, end) == (0, self.items):
            return self
        data = self.data[start:end] if self.kind == "rows" else b"\n".join(self.data.split(b"\n")[start:end])
        return self._replace(data=data, items=end - start, first=self.first + start)


# ---- what to read


def file_kind(name: str) -> tuple[str | None, list[str]]:
    """The kind of a file by its name (a value of FILE_KINDS, or None), and its compressions, the outer one first."""
    stem, suffix = os.path.splitext(name.lower())
    stem, suffix = os.path.splitext(stem + ALIASES.get(suffix, suffix))
    compressions = []
    while suffix in COMPRESSIONS:
        compressions.append(suffix)
        stem, suffix = os.path.splitext(stem)
    return FILE_KINDS.get(suffix), compressions


def is_supported(path: str) -> bool:
    """True for files of folders and archives that are read: not hidden, and of a known kind."""
    is_hidden = any(part.startswith((".", "__MACOSX")) for part in path.replace("\\", "/").split("/"))
    return not is_hidden and file_kind(path)[0] is not None


def find_inputs(inputs: list[str], earlier: Sequence[InputFile] = ()) -> list[InputFile]:
    """List the files that `inputs` name: files, folders with all below them, globs, hf:OWNER/NAME[@CONFIG][:SPLIT].

    Files of a folder or a glob are sorted by name. A folder gives the files of SUPPORTED kinds; a file named by itself
    is read as text if its kind is unknown. earlier: the files of the preparation to resume, which keeps its revisions
    on the hub. Raises InputError for an input that does not exist or holds nothing to read.
    """
    files: dict[str, InputFile] = {}
    for name in inputs:
        if name.startswith("hf:"):
            files |= {f"{name}/{file.name}": file for file in find_on_hub(name, earlier)}
            continue
        try:
            for path in _expand(name):
                size = regular_file_size(Path(path))
                with open(path, "rb"):  # raises OSError if the file cannot be read
                    files[path] = InputFile(path, size, os.stat(path).st_mtime_ns)
        except OSError as error:
            raise InputError(
                f"{error.filename or name} cannot be read ({error.strerror}): give files, folders, globs or "
                "hf:OWNER/NAME with --input"
            ) from error
    return list(files.values())


def _expand(name: str) -> list[str]:
    """The paths of a file, a folder or a glob."""
    if os.path.isdir(name):
        below = [os.path.join(folder, file) for folder, _, files in os.walk(name) for file in files]
        paths = sorted(path for path in below if is_supported(os.path.relpath(path, name)))
        if not paths:
            raise InputError(f"{name} holds no text: the kinds {SUPPORTED} are read; name other files by a glob")
        return paths
    if os.path.lexists(name) or not glob.has_magic(name):
        return [name]
    paths = sorted(path for path in glob.glob(name, recursive=True) if os.path.isfile(path))
    if not paths:
        raise InputError(f"no file matches {name}: check the pattern")
    return paths


# ---- the hub


def find_on_hub(name: str, earlier: Sequence[InputFile] = ()) -> list[InputFile]:
    """List the parquet files of hf:OWNER/NAME[@CONFIG][:SPLIT]; the split is train if not given.

    They are those that the dataset's card gives for the configuration, or else the hub's own conversion.
    """
    match = re.fullmatch(r"hf:([^@:]+)(?:@([^:]+))?(?::(.+))?", name)
    if not match:
        raise InputError(f"{name} is not a dataset on the hub: write hf:OWNER/NAME or hf:OWNER/NAME@CONFIG:SPLIT")
    repo, config, split = match[1], match[2], match[3] or "train"

    def choose(revision: str, paths: list[str], card: Any) -> list[str]:
        if revision == CONVERTED:
            configs = {path.split("/")[0] for path in paths}
            only = next(iter(configs)) if len(configs) == 1 else "default"
            patterns = [f"{config or only}/{split}/*.parquet"]
        else:
            patterns = _card_patterns(card, config, split)
        return [path for path in paths if any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)]

    return list_parquet(name, repo, choose, earlier)


def _card_patterns(card: Any, config: str | None, split: str) -> list[str]:
    """Globs of the files of a split, as the metadata of a dataset's card (README.md) names them."""
    patterns: list[str] = []
    configs = (card or {}).get("configs") or []
    for entry in configs:
        is_default = entry.get("default") or entry.get("config_name") == "default" or len(configs) == 1
        if entry.get("config_name") != config and (config or not is_default):
            continue
        data_files = entry.get("data_files") or []
        for group in data_files if isinstance(data_files, list) else [data_files]:
            if isinstance(group, str):
                group = {"split": "train", "path": group}
            if group.get("split", "train") == split:
                patterns += [group["path"]] if isinstance(group["path"], str) else group["path"]
    return patterns


def list_parquet(
    origin: str,
    repo: str,
    choose: Callable[[str, list[str], Any], list[str]],
    earlier: Sequence[InputFile] = (),
) -> list[InputFile]:
    """List parquet files of a dataset on the hub: on its main branch, or else in the hub's conversion.

    choose: (revision, paths, the card's metadata) -> the paths to take; none: look in the other branch.
    earlier: the files of the preparation to resume, whose own list of this `origin` is kept.
    Raises InputError if the hub cannot be reached or no file is chosen.
    """
    from huggingface_hub import HfApi

    if known := [file for file in earlier if file.origin == origin]:
        return known
    try:
        for revision in ("main", CONVERTED):
            info: Any = HfApi().dataset_info(repo, revision=revision, files_metadata=True)
            parquet = {file.rfilename: file for file in info.siblings if file.rfilename.endswith(".parquet")}
            chosen = [parquet[path] for path in choose(revision, sorted(parquet), info.card_data)]
            if chosen:
                return [
                    InputFile(
                        file.rfilename, file.size or 0, 0, repo, info.sha, getattr(file.lfs, "sha256", ""), origin
                    )
                    for file in chosen
                ]
    except Exception as error:  # the library's network errors have no common class
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{origin} could not be listed ({reason}): check its name and the network") from error
    raise InputError(
        f"{origin} has no complete set of parquet files on the hub: check configuration and split, or download the "
        "files and name them with --input"
    )


def download(source: InputFile, folder: Path) -> Path:
    """Download a file from the hub. Raises InputError if the network fails or the file is damaged."""
    from huggingface_hub import hf_hub_download

    try:
        path = Path(
            hf_hub_download(source.repo, source.name, repo_type="dataset", revision=source.revision, local_dir=folder)
        )
    except Exception as error:  # as above
        raise InputError(
            f"{source.name} could not be downloaded ({error}): run the command again to resume; if the hub no longer "
            f"has revision {source.revision}, delete {folder} to start over"
        ) from error
    if source.sha256 and file_sha256(path) != source.sha256:
        path.unlink()
        raise InputError(f"{source.name} was damaged on the way (its SHA-256 differs): run the command again")
    return path


# ---- reading


def read_chunks(
    source: InputFile, options: ReadOptions, split: ValSplit, skip: int = 0, staging: Path | None = None
) -> Iterator[Chunk]:
    """Read a file after its first `skip` items: rows, lines, pieces of texts, and omissions.

    A file on the hub is downloaded to `staging` and deleted at the end.
    """
    for chunk in _read_source(source, options, split, staging):
        if skip < chunk.items:
            yield chunk.slice(skip, chunk.items)
        skip = max(0, skip - chunk.items)


def _read_source(source: InputFile, options: ReadOptions, split: ValSplit, staging: Path | None) -> Iterator[Chunk]:
    path = source.name
    if source.repo:
        assert staging is not None
        path = str(download(source, staging))

    chunk = None
    try:
        for chunk in _read_file(path, source.name, options, split):
            yield chunk
    except READ_ERRORS as error:
        if chunk and not chunk.is_end:  # end the document that was being read
            yield chunk._replace(data=b"", is_start=False, is_end=True)
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        yield Chunk("bad", source.name, 0, f"cannot be read to its end ({reason}), so it is damaged or cut short")

    if source.repo:
        Path(path).unlink()


def _read_file(path: str, name: str, options: ReadOptions, split: ValSplit) -> Iterator[Chunk]:
    kind, compressions = file_kind(path)
    if kind == "parquet":
        yield from _read_parquet(path, name, options)
        return
    with open(path, "rb") as file:
        stream = _Stream(name, file, file.tell)
        if kind == "zip" and not compressions:
            yield from _read_zip(stream, options, split)
        else:
            yield from _read_stream(stream, options, split)


class _Stream(NamedTuple):
    """Bytes to read: a file, or a member of an archive."""

    name: str
    file: IO[bytes]
    bytes_read: Callable[[], int]  # of the file on disk


def _read_stream(stream: _Stream, options: ReadOptions, split: ValSplit) -> Iterator[Chunk]:
    kind, compressions = file_kind(stream.name)
    for compression in compressions:
        stream = stream._replace(file=_decompress(stream.file, compression))

    if kind == "tar":
        yield from _read_tar(stream, options, split)
    elif kind in ("zip", "parquet"):
        yield Chunk("bad", stream.name, 0, "is inside another file, where it cannot be read; unpack it first")
    else:
        chunks = _read_lines(stream, options) if kind == "lines" else _read_text(stream, options, split)
        for chunk in chunks:
            yield chunk._replace(bytes_read=stream.bytes_read())


def _read_zip(stream: _Stream, options: ReadOptions, split: ValSplit) -> Iterator[Chunk]:
    with zipfile.ZipFile(stream.file) as archive:
        for info in archive.infolist():
            name = f"{stream.name}:{info.filename}"
            if is_supported(info.filename) and not info.is_dir():
                with archive.open(info) as member:
                    yield from _read_stream(_Stream(name, member, stream.bytes_read), options, split)
            elif not info.is_dir():
                yield Chunk("ignored", name, 0, "is hidden or of an unknown kind")


def _read_tar(stream: _Stream, options: ReadOptions, split: ValSplit) -> Iterator[Chunk]:
    with tarfile.open(fileobj=stream.file, mode="r|", bufsize=CHUNK_BYTES) as archive:
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]  # or the list grows with the archive
            name = f"{stream.name}:{member.name}"
            is_archive = file_kind(member.name)[0] in ("tar", "zip", "parquet")
            if member.isfile() and is_supported(member.name) and not is_archive:
                content = archive.extractfile(member)
                assert content is not None
                yield from _read_stream(_Stream(name, content, stream.bytes_read), options, split)
            elif not member.isdir():
                yield Chunk("ignored", name, 0, "is hidden or of an unknown kind")


def _decompress(stream: IO[bytes], compression: str) -> IO[bytes]:
    if compression == ".gz":
        return gzip.GzipFile(fileobj=stream, mode="rb")  # type: ignore[return-value]
    if compression == ".xz":
        return lzma.LZMAFile(stream)  # type: ignore[return-value]
    pyarrow = _import_pyarrow(".zst")  # unlike zstandard's reader it notices that a file is cut short
    return pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, mode="r"), "zstd")


def _import_pyarrow(kind: str) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"reading {kind} files needs pyarrow: run `pip install -e .[data]`") from error
    return pyarrow


def _read_utf8(stream: IO[bytes], options: ReadOptions) -> Iterator[bytes]:
    """Read blocks and convert them to UTF-8, without a byte order mark; the last block is empty.

    Bytes that are invalid in UTF-8 stay, for the workers to count; in another encoding they become U+FFFD here.
    """
    decoder = None if options.is_utf8 else codecs.getincrementaldecoder(options.encoding)("replace")
    is_first = True
    is_last = False
    while not is_last:
        block = stream.read(CHUNK_BYTES)
        is_last = not block
        if decoder:
            block = decoder.decode(block, is_last).encode("utf-8", "surrogatepass")
        if is_first and block:
            block = block.removeprefix(codecs.BOM_UTF8)
            is_first = False
        yield block


def _read_lines(stream: _Stream, options: ReadOptions) -> Iterator[Chunk]:
    """Cut a stream into chunks of whole lines."""
    first = 1
    incomplete: list[bytes] = []  # blocks of the line that is not at its end
    for block in _read_utf8(stream.file, options):
        end = block.rfind(b"\n") + 1
        if end:
            data = b"".join([*incomplete, block[:end]])
            count = data.count(b"\n")
            yield Chunk("lines", stream.name, first, data, count)
            first += count
            incomplete = []
        incomplete.append(block[end:])
        if sum(map(len, incomplete)) > MAX_LINE_BYTES:
            raise ValueError(f"line {first:,} is longer than {MAX_LINE_BYTES:,} bytes")
    if any(incomplete):
        yield Chunk("lines", stream.name, first, b"".join(incomplete))


def _read_text(stream: _Stream, options: ReadOptions, split: ValSplit) -> Iterator[Chunk]:
    """Read a text as one document, in pieces whose ids are those of the whole, with newlines as line ends.

    A document of several pieces gets its split here, by the first one: the workers see each piece alone.
    """
    offset = 0
    text = b""
    tail_start = split.tail_start
    in_val = None if tail_start is None else tail_start == 0
    for block in _normalize_newlines(_read_utf8(stream.file, options)):
        text += block
        if offset == 0 and b"\0" in text[:PIECE_BYTES]:
            reason = f"is binary, not text: byte 0 at offset {text.index(0):,}"
            yield Chunk("bad", stream.name, 0, reason)
            return
        while True:
            end = find_boundary(text) if len(text) > PIECE_BYTES else len(text)
            reaches_tail = False
            if tail_start is not None and not in_val and tail_start < offset + end:
                reaches_tail = True
                end = _character_start(text, tail_start - offset)
            if end == len(text):
                break
            if tail_start is None and offset == 0:
                in_val = split.is_val(text[:end].decode(errors="replace").encode())
            yield Chunk("text", stream.name, offset, text[:end], 1, offset == 0, False, in_val)
            in_val = in_val or reaches_tail
            offset += end
            text = text[end:]
    yield Chunk("text", stream.name, offset, text, 1, offset == 0, True, in_val)


def _normalize_newlines(blocks: Iterator[bytes]) -> Iterator[bytes]:
    carriage_return = b""  # at the end of the block before: a newline may follow
    for block in blocks:
        is_last = not block
        block = carriage_return + block
        carriage_return = b""
        if block.endswith(b"\r") and not is_last:
            block = block[:-1]
            carriage_return = b"\r"
        yield block.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if b"\r" in block else block


def find_boundary(text: bytes, size: int = PIECE_BYTES) -> int:
    """Find where to cut a longer text, after at most `size` bytes, such that both sides have the ids of the whole."""
    for start in (max(0, size - 2**14), 0):  # most texts have a boundary in the last 16 KB
        ends = [match.end() for match in _BOUNDARY.finditer(text, start, size)]
        if ends:
            return ends[-1]
    return _character_start(text, size)


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


def _read_parquet(path: str, name: str, options: ReadOptions) -> Iterator[Chunk]:
    pyarrow = _import_pyarrow(".parquet")
    columns = ["messages", "prompt", "completion"] if options.chat else [options.text_key]
    with pyarrow.parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        present = [column for column in columns if column in names]
        if not present:
            yield Chunk("bad", name, 0, f"has no column {' or '.join(map(repr, columns))}, but {', '.join(names)}")
            return
        bytes_per_row = os.path.getsize(path) / max(1, file.metadata.num_rows)
        first = 1
        for batch in file.iter_batches(128, columns=present):
            rows = batch.to_pylist() if options.chat else batch.column(0).to_pylist()
            bytes_read = int(bytes_per_row * (first + len(rows) - 1))
            yield Chunk("rows", name, first, rows, len(rows), bytes_read=bytes_read)
            first += len(rows)
