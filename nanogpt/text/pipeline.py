"""More machines than one: a step for datatrove's pipelines, which spread documents over tasks; what joins its files.

The ids of a document are those of nanogpt/prepare.py, by the same function; datatrove starts tasks, here or by Slurm,
and starts those again that did not end. A task writes to a folder of its own, whole or anew.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nanogpt.data.dataset import token_dtype
from nanogpt.errors import InputError
from nanogpt.files import atomic_write, output_directory
from nanogpt.text.prepare import SPLITS, ChunkEncoder, Position, Progress, Writer, describe, move, write_chunk
from nanogpt.text.sources import BLOCK, Chunk, ReadOptions
from nanogpt.text.tokenizer import Tokenizer


class Shards:
    """The last step of a pipeline: documents become shards in `<out>/preparing/task-NNNNN/`.

    val_share: part of the documents for validation, by their hash.
    """

    def __init__(self, out: Path, tokenizer: Tokenizer, val_share: float = 0.001, shard_tokens: int = 100_000_000):
        self.out, self.shard_tokens = Path(out).absolute(), shard_tokens
        self.encoder = ChunkEncoder(tokenizer, ReadOptions(), val_share)

    def __call__(self, data: Iterable[Any], rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """data: datatrove's documents, of which the text counts. Yields nothing."""
        folder = task_folder(self.out, rank)
        shutil.rmtree(folder, ignore_errors=True)
        with output_directory(folder):
            dtype, begun = token_dtype(self.encoder.tokenizer.vocab_size), Progress()
            writers = [Writer(folder, split, dtype, self.shard_tokens, False, begun.splits[split]) for split in SPLITS]
            done = begun
            for part in parts(data, f"task {rank}"):
                done = write_chunk(self.encoder.encode([part]), Position(), done, writers)
            for writer in writers:
                writer.close()
            done.splits = {writer.split: writer.state for writer in writers}
            with atomic_write(folder / "done.json") as path:
                path.write_text(json.dumps(dataclasses.asdict(done) | {"tasks": world_size}), encoding="utf-8")
        yield from ()


def parts(data: Iterable[Any], name: str) -> Iterator[Chunk]:
    """About BLOCK bytes of documents at a time."""
    texts: list[str] = []
    first, size = 1, 0
    for document in data:
        texts.append(document.text)
        size += len(document.text)
        if size >= BLOCK:
            yield Chunk("rows", name, first, texts, len(texts))
            first, size, texts = first + len(texts), 0, []
    if texts:
        yield Chunk("rows", name, first, texts, len(texts))


def task_folder(out: Path, rank: int) -> Path:
    return out / "preparing" / f"task-{rank:05}"


def join(out: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """What all tasks wrote becomes the dataset in `out`, in the order of their ranks. Returns its meta.

    Interrupted, it can be called again. Raises InputError where a task is not done.
    """
    out = Path(out).absolute()
    folder = out / "preparing"
    if not (folder / "meta.json").exists():
        found: list[dict[str, Any]] = []
        while not found or len(found) < found[0]["tasks"]:
            path = task_folder(out, len(found)) / "done.json"
            if not path.exists():
                raise InputError(f"task {len(found)} is not done ({path} is missing): run the pipeline again")
            found.append(json.loads(path.read_text(encoding="utf-8")))
        whole = Progress(largest_id=max(task["largest_id"] for task in found))
        for split in SPLITS:
            together = whole.splits[split]
            for rank, task in enumerate(found):
                for shard in task["splits"][split]["shards"]:
                    name = f"{split}-{len(together['shards']):05}.bin"
                    if (task_folder(out, rank) / shard["file"]).exists():  # not moved before
                        os.replace(task_folder(out, rank) / shard["file"], folder / name)
                    together["shards"].append(shard | {"file": name})
                together["bytes"] += task["splits"][split]["bytes"]
                together["documents"] += task["splits"][split]["documents"]
        for task in found:
            whole.replaced = [whole.replaced[0] + task["replaced"][0], whole.replaced[1] or task["replaced"][1]]
        tokenizer.save(folder)
        describe(folder, tokenizer, whole)
    meta = move(out, folder)
    shutil.rmtree(folder)
    return meta
