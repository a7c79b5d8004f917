"""Prepare data on many machines: a step for datatrove's pipelines, and the function that joins its output.

Documents are encoded by the same function as in nanogpt/text/prepare.py. datatrove starts the tasks, here or with
Slurm, and restarts those that failed. Each task writes to its own folder and starts over if it is restarted.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nanogpt.data.dataset import dtype_for
from nanogpt.data.write import SPLITS, SplitState, SplitWriter, move_into_place, write_meta
from nanogpt.errors import InputError
from nanogpt.files import atomic_write, output_directory, read_json
from nanogpt.text.omissions import Omissions
from nanogpt.text.prepare import BatchEncoder
from nanogpt.text.reading import CHUNK_BYTES, Chunk, ReadOptions, ValSplit
from nanogpt.text.tokenizer import Tokenizer


class Shards:
    """The last step of a pipeline: write documents to shards in `<out>/preparing/task-NNNNN/`.

    val_share: fraction of the documents for validation, by their hash.
    """

    def __init__(self, out: Path, tokenizer: Tokenizer, val_share: float = 0.001, shard_tokens: int = 100_000_000):
        self.out = Path(out).absolute()
        self.shard_tokens = shard_tokens
        self.encoder = BatchEncoder(tokenizer, ReadOptions(), ValSplit(val_share))
        tokenizer.print_changes()

    def __call__(self, data: Iterable[Any], rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """data: datatrove's documents, of which only the text is used. Yields nothing."""
        folder = task_folder(self.out, rank)
        shutil.rmtree(folder, ignore_errors=True)
        with output_directory(folder):
            dtype = dtype_for(self.encoder.tokenizer.vocab_size)
            writers = {split: SplitWriter(folder, split, dtype, shard_tokens=self.shard_tokens) for split in SPLITS}
            omissions = Omissions()
            for chunk in _chunks(data, f"task {rank}"):
                self.encoder.encode([chunk]).append_to(writers, omissions)
            for writer in writers.values():
                writer.finish_shard()
            splits = {split: asdict(writer.state) for split, writer in writers.items()}
            done = {"tasks": world_size, "splits": splits, "omissions": asdict(omissions)}
            with atomic_write(folder / "done.json") as path:
                path.write_text(json.dumps(done), encoding="utf-8")
        yield from ()


def _chunks(data: Iterable[Any], name: str) -> Iterator[Chunk]:
    """Collect documents into chunks of about CHUNK_BYTES."""
    first = 1
    texts: list[str] = []
    size = 0
    for document in data:
        texts.append(document.text)
        size += len(document.text)
        if size >= CHUNK_BYTES:
            yield Chunk("rows", name, first, texts)
            first += len(texts)
            texts = []
            size = 0
    if texts:
        yield Chunk("rows", name, first, texts)


def task_folder(out: Path, rank: int) -> Path:
    return out / "preparing" / f"task-{rank:05}"


def join(out: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Join the output of all tasks, in the order of their ranks, into the dataset in `out`; return its meta.json.

    After an interruption, call it again. Raises InputError if a task is not done.
    """
    out = Path(out).absolute()
    staging = out / "preparing"
    is_joined = (staging / "meta.json").exists()
    if not is_joined and (staging / "joined").exists() and not any(staging.glob("task-*")):
        shutil.rmtree(staging)  # an interruption left it when all was in place
        return read_json(out / "meta.json")
    if not is_joined:
        splits = {split: SplitState() for split in SPLITS}
        omissions = Omissions()
        for rank, done in enumerate(_read_done(out)):
            omissions.merge(Omissions(**done["omissions"]))
            for split, state in splits.items():
                _append(state, SplitState(**done["splits"][split]), split, task_folder(out, rank), staging)
        tokenizer.save(staging)
        write_meta(staging, tokenizer, splits, omissions)
    (staging / "joined").touch()
    for folder in staging.glob("task-*"):  # or after an interruption below, one would join their lost shards again
        shutil.rmtree(folder)
    meta = move_into_place(staging, out)
    shutil.rmtree(staging)
    Omissions(meta["omitted"]).print_lines()
    return meta


def _read_done(out: Path) -> list[dict[str, Any]]:
    """The done.json of every task. Raises InputError if one is missing."""
    tasks: list[dict[str, Any]] = []
    while not tasks or len(tasks) < tasks[0]["tasks"]:
        path = task_folder(out, len(tasks)) / "done.json"
        if not path.exists():
            raise InputError(f"task {len(tasks)} is not done ({path} is missing): run the pipeline again")
        tasks.append(json.loads(path.read_text(encoding="utf-8")))
    return tasks


def _append(state: SplitState, task: SplitState, split: str, folder: Path, staging: Path) -> None:
    """Move the shards of a task behind those of the tasks before it."""
    for shard in task.shards:
        name = f"{split}-{len(state.shards):05}.bin"
        if (folder / shard["file"]).exists():  # otherwise moved before an interruption
            os.replace(folder / shard["file"], staging / name)
        state.shards.append(shard | {"file": name})
    state.bytes = (state.bytes or 0) + (task.bytes or 0)
    state.documents = (state.documents or 0) + (task.documents or 0)
    state.largest_id = max(state.largest_id, task.largest_id)
