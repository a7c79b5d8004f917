"""Turn text into a dataset: read it in order, encode it in worker processes, write the tokens in order.

Tokens go to shards in `<out>/preparing/`. Each time a shard is finished, the files are synced and `progress.json` is
replaced: it holds the reading position, the finished shards, and the length of the open shard of each split. After a
kill, the same command cuts the open shards to these lengths and reads on from this position. So the result depends only
on the text and the settings, not on the number of workers or on interruptions, and a kill costs the encoding of one
shard at most. When all is written, `move_into_place` moves the dataset to `<out>`.
"""

import contextlib
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from tqdm import tqdm

from nanogpt.console import available_cores
from nanogpt.data.dataset import dtype_for, open_dataset
from nanogpt.data.write import SPLITS, SplitState, SplitWriter, move_into_place, write_meta
from nanogpt.errors import InputError
from nanogpt.files import atomic_write, lock_file, output_directory
from nanogpt.text.chat import Chat, template_for
from nanogpt.text.documents import Document, DocumentParser
from nanogpt.text.fast_bpe import EARLIER_GPT2_PATTERN, PATTERNS
from nanogpt.text.omissions import Omissions
from nanogpt.text.reading import CHUNK_BYTES, Chunk, ReadOptions, ValSplit, hash_fraction, read_chunks, split_pieces
from nanogpt.text.sources import InputFile
from nanogpt.text.tokenizer import END_OF_TEXT, Tokenizer

NO_TEXT = "the input holds no text: give other files, folders or rows with --input"
SPLIT_SHARE = 0.01  # share of the documents that is for validation
TAIL_SHARE = 0.1  # the same of a single text: its end
DEFAULT_BLOCK_SIZE = 1024  # train.py's
Result = TypeVar("Result")


# --- Encoding, in the workers


@dataclass
class EncodedBatch:
    """The tokens of some documents, by split; of conversations also their loss masks."""

    ids: dict[str, np.ndarray]
    masks: dict[str, np.ndarray]
    documents: dict[str, int]
    text_bytes: dict[str, int]
    omissions: Omissions

    def append_to(self, writers: dict[str, SplitWriter], omissions: Omissions) -> None:
        for split, writer in writers.items():
            writer.append(self.ids[split], self.masks.get(split))
            writer.state.documents = (writer.state.documents or 0) + self.documents[split]
            writer.state.bytes = (writer.state.bytes or 0) + self.text_bytes[split]
        omissions.merge(self.omissions)


@dataclass(frozen=True)
class BatchEncoder:
    """Encodes batches of chunks, each independently of all others."""

    tokenizer: Tokenizer
    options: ReadOptions
    split: ValSplit

    @cached_property
    def chat(self) -> Chat:
        return Chat(self.tokenizer)

    @cached_property
    def _end_tokens(self) -> set[bytes]:
        """The texts of tokens that end documents, which may stand for that in other programs' texts."""
        end = self.tokenizer.end_of_text
        return {token.encode() for token in (END_OF_TEXT, "" if end is None else self.tokenizer.label(end)) if token}

    def encode(self, batch: list[Chunk]) -> EncodedBatch:
        """Raises InputError, with the place, for bad rows and files (unless skip_bad) and for unknown characters."""
        parser = DocumentParser(self.options)
        ids: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
        masks: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
        documents = dict.fromkeys(SPLITS, 0)
        text_bytes = dict.fromkeys(SPLITS, 0)
        for document in parser.parse(batch):
            is_val = self.split.is_val(document.text) if document.in_val is None else document.in_val
            split = "val" if is_val else "train"
            try:
                if document.messages:
                    new_ids, mask = self.chat.encode(document.messages)
                    ids[split].append(new_ids)
                    masks[split].append(mask)
                    parser.omissions.add("changed", document.place, self.chat.count_changed(document.messages))
                else:
                    ids[split] += self._encode_text(document)
                    for token in self._end_tokens:
                        parser.omissions.add("end_tokens", document.place, document.text.count(token))
                lost = sum(map(self.tokenizer.count_lost_characters, document.texts))
                parser.omissions.add("unencodable", document.place, lost)
            except ValueError as error:
                parser.leave_out(document.place, error)
                continue
            except InputError as error:
                raise InputError(f"{document.place}: {error}") from error
            documents[split] += document.is_start
            text_bytes[split] += document.text_bytes

        dtype = dtype_for(self.tokenizer.vocab_size)
        return EncodedBatch(
            {split: _concatenate(ids[split], dtype) for split in SPLITS},
            {split: _concatenate(masks[split], np.dtype(np.uint8)) for split in SPLITS if self.options.chat},
            documents,
            text_bytes,
            parser.omissions,
        )

    def _encode_text(self, document: Document) -> list[np.ndarray]:
        first, *others = (piece.decode() for piece in split_pieces(document.text))
        encode_first = self.tokenizer.encode_ordinary if document.is_start else self.tokenizer.encode_continuation
        ids = [encode_first(first), *map(self.tokenizer.encode_continuation, others)]
        if document.is_end and self.tokenizer.end_of_text is not None:
            ids.append(np.array([self.tokenizer.end_of_text], dtype=np.uint32))
        return ids


def _concatenate(arrays: list[np.ndarray], dtype: np.dtype) -> np.ndarray:
    return np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.zeros(0, dtype)


@cache
def load_encoder(folder: Path, options: ReadOptions, split: ValSplit) -> BatchEncoder:
    """Make an encoder with the tokenizer saved in `folder`, once for each worker."""
    tokenizer = Tokenizer.load(folder)
    assert tokenizer is not None
    return BatchEncoder(tokenizer, options, split)


def encode_batch(folder: Path, options: ReadOptions, split: ValSplit, batch: list[Chunk]) -> EncodedBatch:
    return load_encoder(folder, options, split).encode(batch)


def find_characters(options: ReadOptions, batch: list[Chunk]) -> set[str]:
    """The distinct characters of a batch."""
    return set().union(*(document.text.decode() for document in DocumentParser(options).parse(batch)))


def sample_texts(options: ReadOptions, split: ValSplit, fraction: float, batch: list[Chunk]) -> list[str]:
    """The texts of about this fraction of the training documents of a batch."""
    low = split.share if split.tail_start is None else 0.0
    high = low + fraction * (1 - low)
    texts = []
    for document in DocumentParser(options).parse(batch):
        if not document.in_val and low <= hash_fraction(document.text) <= high:
            texts += document.texts
    return texts


# --- Reading in order, with many workers


class Position(NamedTuple):
    """A reading position in the inputs."""

    source: int = 0
    items: int = 0  # of this source
    documents: int = 0  # of all sources, empty rows included
    bytes_read: int = 0  # of this source


@dataclass(frozen=True)
class Job:
    """The inputs, how to read them, and the workers that process them."""

    sources: list[InputFile]
    options: ReadOptions
    split: ValSplit
    limit: int | None  # documents
    staging: Path
    pool: Executor
    workers: int

    def map(self, function: Callable[[list[Chunk]], Result], start: Position) -> Iterator[tuple[Result, Position]]:
        """Apply a function to each batch from `start` on, in the workers; yield results in order with the positions
        after them."""
        waiting: deque[tuple[Future[Result], Position]] = deque()
        for batch, position in read_batches(self, start):
            waiting.append((self.pool.submit(function, batch), position))
            if len(waiting) >= 4 * self.workers + 24:  # enough to read on while the workers start
                future, done = waiting.popleft()
                yield future.result(), done
        for future, done in waiting:
            yield future.result(), done


def read_batches(job: Job, start: Position, batch_bytes: int | None = None) -> Iterator[tuple[list[Chunk], Position]]:
    """Read batches of about `batch_bytes`, by default CHUNK_BYTES, and the position after each."""
    batch: list[Chunk] = []
    size = 0
    position = start
    for chunk, after in _read_all(job, start):
        if job.limit is not None and after.documents > job.limit:
            if chunk.kind != "text" and position.documents < job.limit:
                batch.append(chunk.slice(0, job.limit - position.documents))
            batch.append(Chunk("omitted", chunk.name, 0, Omissions({"unread": [1, chunk.name]})))
            position = Position(len(job.sources), documents=job.limit)
            break
        batch.append(chunk)
        size += chunk.size
        position = after
        if size >= (batch_bytes or CHUNK_BYTES):
            yield batch, position
            batch = []
            size = 0
    if batch:
        yield batch, position


def _read_all(job: Job, start: Position) -> Iterator[tuple[Chunk, Position]]:
    position = start
    for number in range(start.source, len(job.sources)):
        for chunk in read_chunks(job.sources[number], job.options, job.split, position.items, job.staging):
            items = position.items + chunk.items
            documents = position.documents + chunk.documents
            position = Position(number, items, documents, chunk.bytes_read)
            yield chunk, position
        position = Position(number + 1, documents=position.documents)


@contextlib.contextmanager
def worker_pool(workers: int) -> Iterator[Executor]:
    """Start worker processes at once. Raises InputError if one is killed."""
    spawn = multiprocessing.get_context("spawn")  # the threads of pyarrow and tqdm do not survive a fork
    pool: Executor
    try:
        pool = ProcessPoolExecutor(workers, spawn, _start_worker)
    except OSError as error:  # some containers have no shared memory, as semaphores need
        print(f"no worker processes, because the system has no shared memory ({error.strerror}): one thread prepares")
        pool = ThreadPoolExecutor(1)
    try:
        for _ in range(workers):
            pool.submit(int)
        yield pool
    except BrokenProcessPool as error:
        raise InputError("a worker was killed, probably for memory: run again with fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent process, and exit when it ends, killed or not."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()  # type: ignore[union-attr]


# --- Resuming


@dataclass
class Progress:
    """The contents of progress.json: the call, and how far it is."""

    settings: dict[str, Any]
    sources: list[InputFile]
    split: ValSplit | None = None  # None: not chosen yet
    position: Position = field(default_factory=Position)
    splits: dict[str, SplitState] = field(default_factory=lambda: {split: SplitState() for split in SPLITS})
    omissions: Omissions = field(default_factory=Omissions)

    def can_resume(self, settings: dict[str, Any], sources: list[InputFile]) -> bool:
        """Compare with a later call: inputs that were not read yet may have changed."""
        read = self.position.source + 1
        is_of_all = self.split != ValSplit(settings["val_share"] or SPLIT_SHARE)
        if is_of_all or is_learned(settings["tokenizer"]):  # all were read to choose the split, or the tokenizer
            read = max(len(sources), len(self.sources))
        return settings == self.settings and sources[:read] == self.sources[:read]

    def save(self, folder: Path) -> None:
        with atomic_write(folder / "progress.json") as path:
            path.write_text(json.dumps(asdict(self)), encoding="utf-8")


def read_progress(folder: Path) -> Progress | None:
    """Read the progress of an interrupted preparation; None if there is none to resume."""
    try:
        saved = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not any((folder / name).exists() for name in ("tokenizer.json", "meta.json")):
        return None  # it was finished and moved
    return Progress(
        saved["settings"],
        [InputFile(*source) for source in saved["sources"]],
        ValSplit(**saved["split"]) if saved.get("split") else None,
        Position(*saved["position"]),
        {split: SplitState(**state) for split, state in saved["splits"].items()},
        Omissions(**saved["omissions"]),
    )


def find_earlier(out: Path) -> list[InputFile]:
    """The inputs of the preparation that was interrupted in `out`; none if there was none."""
    progress = read_progress(out / "preparing")
    return progress.sources if progress else []


# --- The whole preparation


def prepare(
    out: Path,
    sources: list[InputFile],
    tokenizer_spec: str | Tokenizer,
    *,
    options: ReadOptions,
    omissions: Omissions,
    val_share: float | None = None,
    shard_tokens: int = 100_000_000,
    workers: int | None = None,
    limit: int | None = None,
    train_mb: float = 100,
    pattern: str = "gpt2",
) -> dict[str, Any]:
    """Make a dataset of `sources` in the folder `out`, or resume the same call; return its meta.json.

    A dataset that the same call made before stays; another one is replaced when the new one is complete.

    tokenizer_spec: "char", "byte", "bpe:<ids>" (trained on up to `train_mb` MB of the training documents, split into
    words by a `pattern` of PATTERNS), an argument of `Tokenizer.from_name_or_path`, or a Tokenizer. val_share: fraction
    of the documents for validation, by their hash, or the end of a single text; None means 0.01, or a tenth. limit:
    number of documents to read. omissions: of finding the sources; what is omitted is printed and in meta.json.
    Raises InputError for input that cannot be read, an empty split, too little disk space.
    """
    workers = workers or available_cores()
    staging = out / "preparing"
    known = tokenizer_spec if isinstance(tokenizer_spec, Tokenizer) else None
    if isinstance(tokenizer_spec, str) and not is_learned(tokenizer_spec):
        known = Tokenizer.from_name_or_path(tokenizer_spec)
    settings = {
        "options": asdict(options),
        "val_share": val_share,
        "tokenizer": _fingerprint(known) if known else tokenizer_spec,
        "shard_tokens": shard_tokens,
        "limit": limit,
        "train_mb": train_mb,
        "pattern": pattern,
    }
    made_from = _hash(json.dumps([settings, sources]))
    if (out / "meta.json").exists():
        with contextlib.suppress(InputError):
            meta = open_dataset(out, block_size=1).meta
            if meta.get("made_from") == made_from and (not staging.exists() or read_progress(staging) is None):
                shutil.rmtree(staging, ignore_errors=True)  # left by a kill after all was in place
                print("already prepared from the same input with the same settings")
                return meta
        print(f"{out} holds a dataset made from other input or settings; the new one will replace it once complete")

    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(worker_pool(workers))
        stack.enter_context(output_directory(staging))
        lock = lock_file(staging / "lock")
        if lock is None:
            raise InputError(f"another process is preparing {out}: wait until it ends, or give another --out")
        stack.enter_context(lock)
        progress = read_progress(staging)
        if progress and progress.can_resume(settings, sources):
            print(f"resuming after {progress.position.source} of {len(sources)} inputs")
        else:
            if progress:
                print(f"{out}: settings or inputs differ from those of the interrupted preparation; starting over")
            _clear(staging)
            progress = Progress(settings, sources)

        if not (staging / "meta.json").exists():
            job = Job(sources, options, ValSplit(val_share or SPLIT_SHARE), limit, staging, pool, workers)
            progress.split = progress.split or choose_split(job, tail_share=val_share or TAIL_SHARE)
            job = replace(job, split=progress.split)
            tokenizer = known or Tokenizer.load(staging)
            tokenizer = tokenizer or learn_tokenizer(str(tokenizer_spec), job, train_mb, pattern)
            if options.chat:
                tokenizer.template = template_for(tokenizer)
                Chat(tokenizer)  # raises InputError for a broken template
            tokenizer.print_changes()
            if not (staging / "tokenizer.json").exists():  # a kill amid writing it again would leave half of it
                tokenizer.save(staging)
            check_disk(job, tokenizer, out)
            encode_all(job, tokenizer, shard_tokens, progress)
            omissions.merge(progress.omissions)
            write_meta(staging, tokenizer, progress.splits, omissions, made_from)
        meta = move_into_place(staging, out)

    shutil.rmtree(staging)
    Omissions(meta["omitted"]).print_lines()
    if meta["dtype"] == "uint32":
        print("the vocabulary is larger than 65,536, so each id takes four bytes (uint32)")
    for split, facts in meta["splits"].items():
        tokens = facts["tokens"]
        if tokens <= DEFAULT_BLOCK_SIZE:
            print(
                f"warning: {split} has only {tokens:,} tokens, so it has no row for a block_size of {tokens:,} or "
                "more: give more text, or another --val_share"
            )
    return meta


def encode_all(job: Job, tokenizer: Tokenizer, shard_tokens: int, progress: Progress) -> None:
    """Encode and write everything after progress.position. Raises InputError for an empty split."""
    dtype = dtype_for(tokenizer.vocab_size)
    writers = {}
    for split, state in progress.splits.items():
        writers[split] = SplitWriter(
            job.staging, split, dtype, shard_tokens=shard_tokens, has_mask=job.options.chat, state=state
        )
    progress.save(job.staging)

    offsets = [*itertools.accumulate((source.size for source in job.sources), initial=0)]
    start = progress.position
    encode = partial(encode_batch, job.staging, job.options, job.split)
    with tqdm(
        total=offsets[-1] or None,
        initial=offsets[start.source] + start.bytes_read,
        unit="B",
        unit_scale=True,
        disable=None,
    ) as bar:
        for encoded, progress.position in job.map(encode, start):
            finished = [len(state.shards) for state in progress.splits.values()]
            encoded.append_to(writers, progress.omissions)
            if finished != [len(state.shards) for state in progress.splits.values()]:
                for writer in writers.values():
                    writer.sync()
                progress.save(job.staging)
            bar.update(offsets[progress.position.source] + progress.position.bytes_read - bar.n)

    for writer in writers.values():
        writer.finish_shard()
    progress.position = Position(len(job.sources))
    progress.save(job.staging)
    documents = sum(state.documents or 0 for state in progress.splits.values())
    for split, state in progress.splits.items():
        if not state.shards:
            raise InputError(
                f"none of the {documents:,} documents is in the {split} split, which their hashes decide: give more "
                "documents or another --val_share"
            )


def choose_split(job: Job, tail_share: float) -> ValSplit:
    """The split of job; one that leaves neither side empty, if there are too few documents; or the end of one text.

    Reads documents until both sides have one. Raises InputError if there is no document, or only one that is no text.
    """
    parser = DocumentParser(job.options)
    hashes: set[float] = set()  # the lowest and the highest
    text_bytes = 0
    documents = 0
    for batch, _ in read_batches(job, Position(), batch_bytes=1):
        for chunk in batch:
            if chunk.kind == "text":
                text_bytes += len(chunk.data)
            if not chunk.is_start:
                continue
            for document in parser.parse([chunk]):
                documents += 1
                hashes.add(hash_fraction(document.text))
            hashes = {min(hashes), max(hashes)} if hashes else set()
        if hashes and min(hashes) < job.split.share <= max(hashes):
            return job.split

    if not documents:
        raise InputError("; ".join([NO_TEXT, *parser.omissions.lines]))
    if documents == 1 and text_bytes > 1:
        return ValSplit(job.split.share, min(int((1 - tail_share) * text_bytes), text_bytes - 1))
    if len(hashes) == 1:
        problem = "only one document" if documents == 1 else f"{documents:,} times the same document"
        raise InputError(f"the input holds {problem}, where two splits need two: give more, or a longer text file")
    lowest, highest = sorted(hashes)
    return ValSplit(min(highest, math.nextafter(lowest, 1)) if lowest >= job.split.share else highest)


def is_learned(tokenizer: str) -> bool:
    return tokenizer == "char" or tokenizer.startswith("bpe:")


def learn_tokenizer(name: str, job: Job, train_mb: float, pattern: str) -> Tokenizer:
    """Make a tokenizer from the text: its characters, or byte pairs by their frequency. Raises InputError."""
    if name == "char":
        characters = job.map(partial(find_characters, job.options), Position())
        text = "".join(set().union(*(batch for batch, _ in characters)))
        return Tokenizer.characters(text)

    size = name.removeprefix("bpe:")
    if not size.isdigit():
        raise InputError(f"--tokenizer={name}: the vocabulary size is not a number; write for example bpe:8192")
    fraction = min(1.0, 1e6 * train_mb / max(1, sum(source.text_bytes for source in job.sources)))

    def texts() -> Iterator[str]:
        remaining = 1e6 * train_mb
        for batch, _ in job.map(partial(sample_texts, job.options, job.split, fraction), Position()):
            for text in batch:
                yield text
                remaining -= len(text)
            if remaining < 0:
                return

    return Tokenizer.train_bpe(texts(), int(size), pattern)


def check_disk(job: Job, tokenizer: Tokenizer, out: Path) -> None:
    """Raises InputError if the tokens will not fit on the disk, at one for each character or for four bytes of text."""
    bytes_per_token = 1 if tokenizer.name in ("byte", "char") else 4
    text_bytes = sum(source.text_bytes for source in job.sources)
    total = text_bytes * dtype_for(tokenizer.vocab_size).itemsize // bytes_per_token
    needed = total - sum(path.stat().st_size for path in job.staging.glob("*-*.bin"))
    free = shutil.disk_usage(out).free
    if needed > free:
        raise InputError(
            f"{out} needs about {needed / 1e9:,.1f} GB and has {free / 1e9:,.1f} GB free: free some space, give --out "
            "on another disk, or read fewer documents with --docs"
        )


def _fingerprint(tokenizer: Tokenizer) -> str:
    settings = [tokenizer.template, tokenizer.named_tokens, tokenizer.end_of_text]
    content = tokenizer._inner.to_str()
    # In a GGUF file the split has only a name; earlier versions spelled it otherwise.
    content = content.replace(json.dumps(PATTERNS["gpt2"]), json.dumps(EARLIER_GPT2_PATTERN))
    return _hash(content + json.dumps(settings))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _clear(staging: Path) -> None:
    for path in staging.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()
