"""Any text becomes a dataset: read in order, encoded by many processes, written in order, continued after a kill.

The files grow in `<out>/preparing/`, with a journal that says how much of them is sure. What is written depends on the
text and the settings alone, not on the number of workers nor on interruptions.
"""

import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from nanogpt.data.dataset import FORMAT, token_dtype
from nanogpt.errors import InputError
from nanogpt.files import atomic_write, output_directory
from nanogpt.text.chat import NAMES, Chat, Messages, template_for, turns
from nanogpt.text.sources import BLOCK, PIECE, Chunk, InputFile, ReadOptions, border, kind_of, parts
from nanogpt.text.tokenizer import TEMPLATE, Tokenizer

SPLITS = ("train", "val")
SAVE_S = 5  # seconds between two entries of the journal
NO_TEXT = "the input holds no text: give other files, folders or rows with --input"


class EncodedChunk(NamedTuple):
    """What a worker makes of a chunk. Lists have three entries: for the document that the chunk before began, whose
    split it does not know; for train; for val."""

    ids: list[bytes]
    masks: list[bytes]
    documents: list[int]
    text_bytes: list[int]
    largest_id: int
    goes_on: int | None  # split of a document that the next chunk continues
    replaced: list[Any]  # bytes that were no text; where the first of them was
    bad: list[Any]  # rows and files left out; the first of them


@dataclass(frozen=True)
class ChunkEncoder:
    """Documents to ids: what each worker holds. `encode` is a pure function of its parts."""

    tokenizer: Tokenizer
    reading: ReadOptions
    val_share: float

    @cached_property
    def chat(self) -> Chat:
        return Chat(self.tokenizer)

    def encode(self, chunk: list[Chunk]) -> EncodedChunk:
        """Raises InputError with the place of what is no document, unless reading.skip_bad."""
        ids: list[list[np.ndarray]] = [[], [], []]
        masks: list[list[np.ndarray]] = [[], [], []]
        counts = empty_chunk()
        goes_on, end = None, self.tokenizer.end_of_text
        for part, place, raw, messages in documents(chunk, self.reading, counts):
            in_val = hash_fraction(raw) < self.val_share if part.in_val is None else part.in_val
            to = 0 if part.in_val is None and not part.begins else 1 + in_val
            goes_on = None if part.ends else to - 1
            try:
                if messages:
                    new, mask = self.chat.encode(messages)
                    ids[to].append(new)
                    masks[to].append(mask)
                    counts.documents[to] += 1
                    counts.text_bytes[to] += sum(len(text.encode("utf-8", "replace")) for text in contents(messages))
                    continue
                counts.documents[to] += part.begins
                counts.text_bytes[to] += len(raw)
                if part.kind == "text" or len(raw) <= PIECE:
                    ids[to].append(self.tokenizer.encode_ordinary(raw.decode()))
                else:
                    ids[to] += [self.tokenizer.encode_ordinary(piece.decode()) for piece in pieces(raw)]
            except ValueError as error:
                _skip(place, error, self.reading, counts)
            except InputError as error:
                raise InputError(f"{place}: {error}") from error
            if part.ends and end is not None:
                ids[to].append(np.array([end], dtype=np.uint32))
        dtype = token_dtype(self.tokenizer.vocab_size)
        joined = [np.concatenate(part) if part else np.zeros(0, np.uint32) for part in ids]
        return counts._replace(
            ids=[part.astype(dtype).tobytes() for part in joined],
            masks=[b"".join(mask.tobytes() for mask in part) for part in masks],
            largest_id=max(int(part.max(initial=0)) for part in joined),
            goes_on=goes_on,
        )


def empty_chunk() -> EncodedChunk:
    return EncodedChunk([], [], [0] * 3, [0] * 3, 0, None, [0, ""], [0, ""])


def characters(reading: ReadOptions, chunk: list[Chunk]) -> set[str]:
    """The distinct characters of a chunk."""
    return set().union(*(raw.decode() for _, _, raw, _ in documents(chunk, reading, empty_chunk())))


def sample(reading: ReadOptions, val_share: float, share: float, chunk: list[Chunk]) -> list[str]:
    """The texts of about a `share` of the training documents of a chunk."""
    texts = []
    for part, _, raw, messages in documents(chunk, reading, empty_chunk()):
        if not part.in_val and val_share <= hash_fraction(raw) <= val_share + share * (1 - val_share):
            texts += contents(messages) if messages else [raw.decode()]
    return texts


def hash_fraction(raw: bytes) -> float:
    """A number from 0 to 1 that is a document's own, whatever other documents there are."""
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little") / 2**64


def documents(
    chunk: Iterable[Chunk], reading: ReadOptions, counts: EncodedChunk
) -> Iterator[tuple[Chunk, str, bytes, Messages | None]]:
    """Each document of a chunk that is not empty: its part, its place, its text in UTF-8, and the messages that it is
    of. Counts in `counts` what was replaced by U+FFFD, and what is bad."""
    for part in chunk:
        if part.kind == "bad":
            _count(counts.bad, 1, part.data)
        elif part.kind == "text" and reading.chat:
            _skip(
                part.name,
                ValueError("is a text, where conversations come in rows: .jsonl or .parquet"),
                reading,
                counts,
            )
        elif part.kind == "text":
            raw = _valid(part.data, part.name, part.first, reading, counts)
            if raw or not part.begins:
                yield part, part.name, raw, None
        else:
            rows = part.data.split(b"\n") if part.kind == "lines" else part.data
            for number, row in enumerate(rows, part.first):
                place = f"{part.name}, {'line' if part.kind == 'lines' else 'row'} {number:,}"
                try:
                    if part.kind == "lines":
                        if not row.strip():
                            continue
                        row = json.loads(_valid(row, place, 0, reading, counts))
                    found = _row(row, reading)
                except (ValueError, RecursionError) as error:
                    _skip(place, error, reading, counts)
                    continue
                if isinstance(found, list):
                    yield part, place, json.dumps(found, sort_keys=True).encode(), found
                elif found:
                    raw = found.encode("utf-8", "surrogatepass")
                    yield part, place, _valid(raw, place, 0, reading, counts), None


def _row(row: Any, reading: ReadOptions) -> Any:
    """The text of a row, or with reading.chat its messages. Raises ValueError where it has none."""
    if reading.chat:
        return turns(row)
    if isinstance(row, dict):
        if reading.text_key not in row:
            there = ", ".join(map(str, row)) or "nothing"
            chat = ", or --chat=True" if row.keys() & {"messages", "prompt"} else ""
            raise ValueError(f'has no "{reading.text_key}", but {there}: name the column by --text_key{chat}')
        row = row[reading.text_key]
    if row is not None and not isinstance(row, str):
        raise ValueError(f"{str(row)[:40]!r} is no text")
    return row


def _valid(raw: bytes, place: str, offset: int, reading: ReadOptions, counts: EncodedChunk) -> bytes:
    """UTF-8 with U+FFFD for what is not; bytes.decode puts one for each wrong sequence."""
    mark = "\ufffd".encode()
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        fixed = raw.decode(errors="replace").encode()
        _count(counts.replaced, fixed.count(mark) - raw.count(mark), f"{place}, byte {offset + error.start:,}")
        return fixed
    if not reading.is_utf8 and mark in raw:
        _count(counts.replaced, raw.count(mark), place)
    return raw


def _skip(place: str, error: Exception, reading: ReadOptions, counts: EncodedChunk) -> None:
    """Count a bad row. Raises InputError unless reading.skip_bad."""
    if not reading.skip_bad:
        told = f"{place}: {str(error) or 'no JSON'}"
        raise InputError(f"{told}; correct it, or leave such rows out with --skip_bad=True") from error
    _count(counts.bad, 1, f"{place}: {error}")


def _count(counted: list[Any], n: int, place: str) -> None:
    counted[:] = [counted[0] + n, counted[1] or place]


def pieces(raw: bytes) -> Iterator[bytes]:
    """A long row's text as `text_pieces` cuts a file's, line ends as they are."""
    while len(raw) > PIECE:
        end = border(raw)
        yield raw[:end]
        raw = raw[end:]
    yield raw


def contents(messages: Messages) -> list[str]:
    """The texts of a conversation."""
    return [message[name] for message in messages for name in NAMES[1:] if name in message]


_make: Callable[[], ChunkEncoder]  # of a worker
_encoder: ChunkEncoder | None = None  # of a worker that has encoded something


def read_encoder(folder: Path, reading: ReadOptions, val_share: float) -> ChunkEncoder:
    """With the tokenizer that was saved in `folder`."""
    tokenizer = Tokenizer.load(folder)
    assert tokenizer is not None
    return ChunkEncoder(tokenizer, reading, val_share)


def _start_worker(make: Callable[[], ChunkEncoder]) -> None:
    """A worker leaves Ctrl-C to its parent, and ends when the parent does, killed or not."""
    global _make
    _make = make
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()  # type: ignore[union-attr]


def _encode(chunk: list[Chunk]) -> EncodedChunk:
    global _encoder
    _encoder = _encoder or _make()
    return _encoder.encode(chunk)


def chunks(
    sources: list[InputFile],
    reading: ReadOptions,
    start: "Position",
    most: int | None,
    folder: Path,
    cut: int | None = None,
) -> Iterator[tuple[list[Chunk], "Position"]]:
    """What workers are handed, about BLOCK bytes at a time, and the position after it. most: documents, None for all.

    Raises InputError for what cannot be read, after what was read before it.
    """
    chunk: list[Chunk] = []
    size, position = 0, start
    try:
        for part, after in _positions(sources, reading, start, folder, cut):
            if part and most is not None and after.documents > most:
                keep = most - position.documents
                if keep and part.kind != "text":
                    chunk.append(part.head(keep))
                break
            if chunk and (size >= BLOCK or (part and not part.begins)):
                yield chunk, position
                chunk, size = [], 0
            position = after
            if part:
                chunk.append(part)
                size += part.size
    except InputError:
        if chunk:
            yield chunk, position
        raise
    if chunk:
        yield chunk, position


def _positions(
    sources: list[InputFile], reading: ReadOptions, start: "Position", folder: Path, cut: int | None
) -> Iterator[tuple[Chunk | None, "Position"]]:
    """Each part and the position after it; None at the end of a source."""
    position = start
    for number in range(start.source, len(sources)):
        for part in parts(sources[number], reading, position.items, position.state, folder, cut):
            position = Position(
                number,
                position.items + part.items,
                part.state,
                position.documents + part.documents,
                position.read - position.here + part.read,
                part.read,
            )
            yield part, position
        read = position.read - position.here + sources[number].size
        position = Position(number + 1, documents=position.documents, read=read)
        yield None, position


class Position(NamedTuple):
    """How far the sources are read."""

    source: int = 0
    items: int = 0  # of that source
    state: Any = None  # of a stream from the hub
    documents: int = 0  # rows, empty ones included, and texts; of all sources
    read: int = 0  # bytes, of all sources
    here: int = 0  # bytes, of that source


def in_order(
    pool: Executor, job: Callable[[list[Chunk]], Any], work: Iterator[tuple[list[Chunk], Position]], ahead: int
) -> Iterator[tuple[Any, Position]]:
    """What `job` makes of each chunk, in their order, no more than `ahead` of them under way. An error in reading is
    raised after all that was read before is done."""
    waiting: deque[tuple[Future[Any], Position]] = deque()
    fault: InputError | None = None
    while not fault:
        try:
            chunk, position = next(work)
        except StopIteration:
            break
        except InputError as error:
            fault = error
            break
        waiting.append((pool.submit(job, chunk), position))
        if len(waiting) >= ahead:
            future, position = waiting.popleft()
            yield future.result(), position
    for future, position in waiting:
        yield future.result(), position
    if fault:
        raise fault


class Writer:
    """A split's shards, growing: `<split>-00000.bin` and so on in `folder`, and where loss is masked `.mask` beside.

    All but the last have `shard_tokens` tokens. `state` (JSON) goes to the journal after `sync`; a writer made of it
    goes on there, whatever was written later.
    """

    def __init__(self, folder: Path, split: str, dtype: np.dtype, shard_tokens: int, masked: bool, state: Any):
        self.folder, self.split, self.width, self.most = folder, split, dtype.itemsize, shard_tokens
        self.shards: list[dict[str, Any]] = list(state["shards"])
        self.tokens, self.text_bytes, self.documents = state["tokens"], state["bytes"], state["documents"]
        self.suffixes = (".bin", ".mask") if masked else (".bin",)
        self._files: list[Any] = []
        if self.tokens:
            self._open()

    @property
    def state(self) -> dict[str, Any]:
        """`tokens`: of the shard that is not full yet."""
        facts = {"tokens": self.tokens, "bytes": self.text_bytes, "documents": self.documents}
        return {"shards": list(self.shards), **facts}

    def _open(self) -> None:
        self._digests = [hashlib.sha256() for _ in self.suffixes]
        stem = f"{self.split}-{len(self.shards):05}"
        for suffix, digest, width in zip(self.suffixes, self._digests, (self.width, 1), strict=False):
            file = (self.folder / f"{stem}{suffix}").open("r+b" if self.tokens else "w+b")
            self._files.append(file)
            file.truncate(self.tokens * width)
            while data := file.read(BLOCK):
                digest.update(data)

    def append(self, *streams: bytes) -> None:
        """The next tokens' ids, and where loss is masked a byte for each."""
        at, n = 0, len(streams[0]) // self.width
        while at < n:
            if not self._files:
                self._open()
            take = min(n - at, self.most - self.tokens)
            for file, digest, data, width in zip(self._files, self._digests, streams, (self.width, 1), strict=False):
                piece = data[at * width : (at + take) * width]
                file.write(piece)
                digest.update(piece)
            at, self.tokens = at + take, self.tokens + take
            if self.tokens == self.most:
                self.close()

    def sync(self) -> None:
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """The last shard is complete."""
        if self._files:
            self.sync()
            facts: dict[str, Any] = {"file": Path(self._files[0].name).name, "tokens": self.tokens}
            names = ("sha256", "mask_sha256")
            facts |= {name: digest.hexdigest() for name, digest in zip(names, self._digests, strict=False)}
            self.shards.append(facts)
            for file in self._files:
                file.close()
            self._files, self.tokens = [], 0


@dataclass
class Progress:
    """What a preparation counts; in the journal as JSON."""

    position: list[Any] = field(default_factory=lambda: list(Position()))  # a Position
    splits: dict[str, Any] = field(
        default_factory=lambda: {s: {"shards": [], "tokens": 0, "bytes": 0, "documents": 0} for s in SPLITS}
    )
    open_split: int = 0  # of the document that is being written
    largest_id: int = 0
    replaced: list[Any] = field(default_factory=lambda: [0, ""])
    bad: list[Any] = field(default_factory=lambda: [0, ""])


def check_numbers(val_share: float | None, workers: int, most: int | None = None, shard_tokens: int = 1) -> None:
    """Raises InputError for what no preparation can do, before anything is fetched."""
    if min(workers, shard_tokens, 1 if most is None else most) < 1:
        raise InputError("the numbers of workers, of documents and of tokens in a shard count from 1 up")
    if val_share is not None and not 0 < val_share < 1:
        raise InputError(f"the share of documents for validation lies between 0 and 1, not at {val_share}")


def prepare(
    out: Path,
    sources: list[InputFile],
    tokenizer: str,
    *,
    reading: ReadOptions,
    val_share: float | None = None,
    shard_tokens: int = 100_000_000,
    workers: int | None = None,
    most: int | None = None,
    train_mb: float = 100,
    pattern: str = "gpt2",
) -> dict[str, Any]:
    """Make a dataset of `sources` in the folder `out`; continue what the same call began before. Returns its meta.

    tokenizer: "char", "byte", "bpe:<ids>" (trained on up to `train_mb` MB of the training documents, whose words are
    cut by a `pattern` of PATTERNS), a hub id, or what `Tokenizer.named` knows. val_share: part of the documents for
    validation, by their hash; None means 0.01, and for a single text the last tenth of it. most: documents to take.
    Raises InputError for what cannot be read, for a split without tokens, for too little disk.
    """
    import filelock

    workers = workers or os.cpu_count() or 1
    check_numbers(val_share, workers, most, shard_tokens)
    is_text = len(sources) == 1 and not sources[0].repo and kind_of(sources[0].name)[0] in ("text", None)
    tail = is_text and val_share is None
    share = val_share if val_share is not None else 0.1 if tail else 0.01
    settings = dataclasses.asdict(reading) | {"tokenizer": tokenizer, "share": share, "tail": tail, "most": most}
    settings |= {"shard_tokens": shard_tokens, "train_mb": train_mb, "pattern": pattern}
    folder = out / "preparing"
    with contextlib.ExitStack() as held:
        pool = held.enter_context(_workers(workers, partial(read_encoder, folder, reading, share)))
        made = None if is_made_of_text(tokenizer) else known_tokenizer(tokenizer)
        if made is not None:
            told = made._inner.to_str() + str(made.template)
            settings["tokenizer"] += f" {hashlib.sha256(told.encode()).hexdigest()}"
        held.enter_context(output_directory(folder))
        try:
            held.enter_context(filelock.FileLock(folder / "lock").acquire(timeout=0))
        except filelock.Timeout as error:
            raise InputError(f"another process prepares {out}: wait for its end, or give another --out") from error
        journal = _journal(folder)
        before, done, goes_on = journal.get("sources", []), Progress(), False
        if journal:
            done = Progress(**journal["done"])
            sure = done.position[0] + (done.position[1] > 0) if made else max(len(before), len(sources))
            goes_on = journal["settings"] == settings and before[:sure] == [list(source) for source in sources[:sure]]
            if goes_on:
                print(f"{done.position[0]} of {len(sources)} inputs were done before")
            else:
                print(f"other settings or inputs than in the interrupted preparation in {out}: it begins anew")
        if not goes_on:
            for path in folder.iterdir():
                if path.name != "lock":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            done = Progress()
        if not (folder / "meta.json").exists():
            cut = None
            if tail:
                cut = int(0.9 * sum(len(part.data) for part in parts(sources[0], reading) if part.kind == "text"))
            work = Job(sources, reading, most, folder, cut, pool, workers)
            made = made or (
                Tokenizer.load(folder) if goes_on else _tokenizer(tokenizer, work, share, train_mb, pattern)
            )
            assert made is not None
            if reading.chat:
                made.template = template_for(made)
                Chat(made)  # which finds out whether it is broken
            made.save(folder)
            _check_disk(out, sources, made, done)
            entry = {"settings": settings, "sources": sources}
            done = _encode_all(work, token_dtype(made.vocab_size), done, entry, shard_tokens)
            describe(folder, made, done)
        meta = move(out, folder)
    shutil.rmtree(folder)
    for (n, first), told in (
        (meta["replaced"], "places that were no text became U+FFFD"),
        (meta["bad"], "bad rows or files were left out"),
    ):
        if n:
            print(f"{n:,} {told}; the first: {first}")
    if meta["dtype"] == "uint32":
        print("ids have four bytes each (uint32), because they go beyond 65,535")
    return meta


@dataclass(frozen=True)
class Job:
    """What is to be read."""

    sources: list[InputFile]
    reading: ReadOptions
    most: int | None
    folder: Path
    cut: int | None
    pool: Executor
    workers: int

    def each(self, job: Callable[[list[Chunk]], Any], start: Position) -> Iterator[tuple[Any, Position]]:
        """What `job` makes of each chunk. As many may wait that reading goes on while workers start."""
        read = chunks(self.sources, self.reading, start, self.most, self.folder, self.cut)
        return in_order(self.pool, job, read, 4 * self.workers + 24)


@contextlib.contextmanager
def _workers(n: int, make: Callable[[], ChunkEncoder]) -> Iterator[Executor]:
    """n processes, which start at once; `make` is called where there is something to encode."""
    spawn = multiprocessing.get_context("spawn")  # the threads of pyarrow and tqdm do not survive a fork
    pool = ProcessPoolExecutor(n, spawn, _start_worker, (make,))
    try:
        for _ in range(n):
            pool.submit(int)
        yield pool
    except BrokenProcessPool as error:
        raise InputError("a worker was killed, probably for memory: run again with fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def is_made_of_text(tokenizer: str) -> bool:
    return tokenizer == "char" or tokenizer.startswith("bpe:")


def known_tokenizer(name: str) -> Tokenizer:
    if name == "byte":
        return Tokenizer.bytes()
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not os.path.exists(name):
        from nanogpt.pretrained import read_tokenizer

        return read_tokenizer(name)  # by its id on the hub
    return Tokenizer.named(name)


def _tokenizer(name: str, work: Job, val_share: float, train_mb: float, pattern: str) -> Tokenizer:
    """A tokenizer made of the text: its characters, or byte pairs by how often they come. Raises InputError."""
    if name == "char":
        found = work.each(partial(characters, work.reading), Position())
        text = "".join(set().union(*(some for some, _ in found)))
        if not text:
            raise InputError(NO_TEXT)
        return Tokenizer.characters(text)
    if not name[4:].isdigit():
        raise InputError(f"--tokenizer={name} is no size of a vocabulary: give one such as bpe:8192")
    share = min(1.0, 1e6 * train_mb / max(1, _text_bytes(work.sources)))

    def texts() -> Iterator[str]:
        left = 1e6 * train_mb
        job = partial(sample, work.reading, val_share if work.cut is None else 0.0, share)
        for some, _ in work.each(job, Position()):
            for text in some:
                yield text
                left -= len(text)
            if left < 0:
                return

    return Tokenizer.train_bpe(texts(), int(name[4:]), pattern)


def _text_bytes(sources: list[InputFile]) -> int:
    """Bytes of text in sources on disk, as a guess: text in English takes a third when it is compressed."""
    packed = [kind_of(s.name)[1] or kind_of(s.name)[0] in ("zip", "parquet") for s in sources]
    return sum(source.size * (3 if small else 1) for source, small in zip(sources, packed, strict=True))


def _check_disk(out: Path, sources: list[InputFile], tokenizer: Tokenizer, done: "Progress") -> None:
    """Raises InputError where the tokens, four bytes of text each but for characters and bytes, have no room."""
    width = token_dtype(tokenizer.vocab_size).itemsize
    per_token = 1 if tokenizer.vocab_size <= 257 or tokenizer.name == "char" else 4
    written = sum(path.stat().st_size for path in (out / "preparing").glob("*-*.bin"))
    needed, free = _text_bytes(sources) * width // per_token - written, shutil.disk_usage(out).free
    if needed > free:
        raise InputError(
            f"{out} needs about {needed / 1e9:,.1f} GB and has {free / 1e9:,.1f} GB free: make room, or give --out on "
            "another disk, or fewer documents by --docs"
        )


def _encode_all(work: Job, dtype: np.dtype, done: "Progress", entry: dict[str, Any], shard_tokens: int) -> "Progress":
    """Read, encode and write from where `done` stands to the end, keeping a journal of `entry` and what is done."""
    writers = [
        Writer(work.folder, split, dtype, shard_tokens, work.reading.chat, done.splits[split]) for split in SPLITS
    ]

    def save() -> None:
        for writer in writers:
            writer.sync()
        with atomic_write(work.folder / "journal.json") as path:
            path.write_text(json.dumps(entry | {"done": dataclasses.asdict(done)}))

    save()
    start, saved_at, began = Position(*done.position), time.monotonic(), time.monotonic()
    total = sum(source.size for source in work.sources)
    with tqdm(total=total or None, initial=start.read, unit="B", unit_scale=True, disable=None) as bar:
        size = tokens = 0
        try:
            for encoded, position in work.each(_encode, start):
                done = write_chunk(encoded, position, done, writers)
                if time.monotonic() > saved_at + SAVE_S:
                    save()
                    saved_at = time.monotonic()
                size, tokens = size + sum(encoded.text_bytes), tokens + sum(map(len, encoded.ids)) // dtype.itemsize
                speed = 1e-6 / (time.monotonic() - began)
                bar.set_postfix_str(f"{size * speed:.1f} MB/s of text, {tokens * speed:.2f}M tokens/s", refresh=False)
                bar.update(position.read - bar.n)
        except (InputError, KeyboardInterrupt):
            save()
            raise
    for writer in writers:
        writer.close()
    done = dataclasses.replace(done, splits={writer.split: writer.state for writer in writers})
    return done


def write_chunk(encoded: EncodedChunk, position: Position, done: "Progress", writers: list[Writer]) -> "Progress":
    """Write what a worker made; what is done then."""
    for to, (ids, documents, size) in enumerate(zip(encoded.ids, encoded.documents, encoded.text_bytes, strict=True)):
        writer = writers[to - 1 if to else done.open_split]
        writer.append(ids, encoded.masks[to])
        writer.documents += documents
        writer.text_bytes += size
    return Progress(
        position=list(position),
        splits={writer.split: writer.state for writer in writers},
        open_split=done.open_split if encoded.goes_on in (None, -1) else encoded.goes_on,
        largest_id=max(done.largest_id, encoded.largest_id),
        replaced=[done.replaced[0] + encoded.replaced[0], done.replaced[1] or encoded.replaced[1]],
        bad=[done.bad[0] + encoded.bad[0], done.bad[1] or encoded.bad[1]],
    )


def describe(folder: Path, tokenizer: Tokenizer, done: "Progress") -> None:
    """Write meta.json. Raises InputError for a split without tokens."""
    meta: dict[str, Any] = {"format": FORMAT, "tokenizer": tokenizer.name, "vocab_size": tokenizer.vocab_size}
    meta |= {"largest_id": done.largest_id, "dtype": token_dtype(tokenizer.vocab_size).name}
    meta |= {"end_of_text": tokenizer.end_of_text, "replaced": done.replaced, "bad": done.bad}
    count = sum(split["documents"] for split in done.splits.values())
    if not count:
        raise InputError(NO_TEXT)
    splits, masked = {}, False
    for split, written in done.splits.items():
        shards = written["shards"]
        if not shards:
            raise InputError(
                f"of {count:,} documents none fell into the {split} split by its hash: give more of them, or another "
                "--val_share (0.01 unless given)"
                if count > 1
                else f"the {split} split would be empty: give a longer text or more documents"
            )
        masked = "mask_sha256" in shards[0]
        facts = {"tokens": sum(shard["tokens"] for shard in shards)}
        facts |= {"bytes": written["bytes"], "documents": written["documents"]}
        if len(shards) == 1:
            splits[split] = facts | {name: shards[0][name] for name in shards[0] if name.endswith("sha256")}
        else:
            splits[split] = facts | {"shards": shards}
    meta |= {"loss_mask": masked, "splits": splits}
    with atomic_write(folder / "meta.json") as path:
        path.write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def move(out: Path, folder: Path) -> dict[str, Any]:
    """What `folder` holds takes the place of the dataset in `out`, meta.json last. Killed, the next call goes on.

    Until the last file is there, `out` is no dataset.
    """
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    names = {"tokenizer.json": "tokenizer.json"}
    for split, facts in meta["splits"].items():
        files = [shard["file"] for shard in facts.get("shards", [])]
        names |= {file: file for file in files} if files else {f"{split}-00000.bin": f"{split}.bin"}
    if meta["loss_mask"]:
        names |= {old.replace(".bin", ".mask"): new.replace(".bin", ".mask") for old, new in names.items()}
        names[TEMPLATE] = TEMPLATE
    names["meta.json"] = "meta.json"
    moved = {new for old, new in names.items() if not (folder / old).exists()}
    for path in out.iterdir():
        ours = path.name in ("meta.json", TEMPLATE) or re.fullmatch(r"(train|val)(-\d+)?\.(bin|mask)", path.name)
        if ours and path.name not in moved:
            path.unlink()
    for old, new in names.items():
        if new not in moved:
            os.replace(folder / old, out / new)
    return meta


def earlier(out: Path) -> list[InputFile]:
    """The sources of the preparation that was interrupted in `out`; none without one."""
    return [InputFile(*source) for source in _journal(out / "preparing").get("sources", [])]


def _journal(folder: Path) -> dict[str, Any]:
    try:
        there = any((folder / name).exists() for name in ("tokenizer.json", "meta.json"))
        return json.loads((folder / "journal.json").read_text()) if there else {}
    except (OSError, ValueError):
        return {}
