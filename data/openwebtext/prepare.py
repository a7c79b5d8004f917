"""OpenWebText in GPT-2's encoding: python data/openwebtext/prepare.py [--docs=N] [--input FILE ...] [--workers=N]

8,013,769 documents, about nine billion tokens, in 80 parquet shards that are fetched, tokenized and deleted one after
the other. What a finished shard gave is kept in `pieces/`, so an interrupted run goes on where it stopped; at the end
the pieces become the dataset. What is written does not depend on the number of workers.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nanogpt import InputError, run_script
from nanogpt.data import read_text, summary, write_dataset
from nanogpt.tokenizer import Tokenizer, aside

REPO = "Skylion007/openwebtext"
Encoded = dict[str, np.ndarray]  # ids by split; "counts": rows of documents, bytes of train and of val


def hub_shards() -> list[dict[str, Any]]:
    """Name and revision of each shard on the Hugging Face hub."""
    from huggingface_hub import HfApi

    try:
        for revision in ("main", "refs/convert/parquet"):
            files = HfApi().list_repo_files(REPO, revision=revision, repo_type="dataset")
            shards = sorted(name for name in files if name.endswith(".parquet"))
            if shards and not any("partial" in name for name in shards):
                return [{"source": name, "revision": revision} for name in shards]
    except Exception as error:  # the library's network errors have no class in common
        raise InputError(
            f"{REPO} could not be listed ({error}): check the network, or give files by --input"
        ) from error
    raise InputError(f"{REPO} no longer has a whole set of parquet files: give files by --input")


def download(shard: dict[str, Any], folder: Path) -> Path:
    from huggingface_hub import hf_hub_download

    name, revision = shard["source"], shard["revision"]
    try:
        return Path(hf_hub_download(REPO, name, repo_type="dataset", revision=revision, local_dir=folder))
    except Exception as error:  # as above
        raise InputError(f"{name} could not be downloaded ({error}): run the command again to go on here") from error


def documents(path: Path) -> Iterator[str]:
    """The texts of a .parquet file (column `text`), of a .jsonl file (key `text`), or of any other: one document."""
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise InputError("reading parquet files needs pyarrow: run `pip install -e .[data]`") from error
        try:
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1024, columns=["text"]):
                yield from filter(None, batch.column("text").to_pylist())
        except (ValueError, OSError, KeyError) as error:  # pyarrow's own errors are kinds of these
            raise InputError(
                f"{path} is not a whole parquet file with a column `text` ({error}): replace it"
            ) from error
    elif path.suffix == ".jsonl":
        for number, line in enumerate(read_text(path).split("\n"), 1):
            try:
                yield from [str(json.loads(line)["text"])] if line else []
            except (ValueError, TypeError, KeyError) as error:
                raise InputError(
                    f'{path}, line {number}: no JSON object with a "text"; correct or remove it'
                ) from error
    else:
        yield read_text(path)


def encode(texts: list[str], val_share: float) -> Encoded:
    """A worker's job: the documents' ids, each in the split that its hash says, with an end of text after it."""
    import tiktoken

    encoding = tiktoken.get_encoding("gpt2")  # kept by the library after the first call
    ids: dict[str, list[int]] = {"train": [], "val": []}
    text_bytes = dict.fromkeys(ids, 0)
    for text in texts:
        raw = text.encode("utf-8", "surrogatepass")
        draw = int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little") / 2**64
        split = "val" if draw < val_share else "train"
        ids[split] += [*encoding.encode_ordinary(text), encoding.eot_token]
        text_bytes[split] += len(raw)
    arrays = {split: np.array(ids[split], dtype=np.uint16) for split in ids}
    return arrays | {"counts": np.array([[len(texts), text_bytes["train"], text_bytes["val"]]])}


def start_worker() -> None:
    """A worker leaves Ctrl-C to its parent, and ends when the parent does, killed or not."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()  # type: ignore[union-attr]


def encode_all(texts: Iterator[str], val_share: float, pool: ProcessPoolExecutor, ahead: int) -> Encoded:
    """The same of all of a shard's documents, in their order; no more than `ahead` jobs are under way."""
    done: list[Encoded] = []
    waiting: deque[Future[Encoded]] = deque()
    while batch := list(islice(texts, 128)):
        waiting.append(pool.submit(encode, batch, val_share))
        if len(waiting) >= ahead:
            done.append(waiting.popleft().result())
    done += [job.result() for job in waiting] or [encode([], val_share)]
    return {key: np.concatenate([result[key] for result in done]) for key in done[0]}


def read_pieces(pieces: list[Path], key: str) -> Iterator[np.ndarray]:
    for piece in pieces:
        with np.load(piece) as arrays:
            yield arrays[key]


def main() -> None:
    parser = argparse.ArgumentParser(description="Prepare OpenWebText, or documents of your own, in GPT-2's encoding.")
    parser.add_argument("--docs", type=int, help="take only so many documents (default: all)")
    parser.add_argument("--input", type=Path, nargs="+", help=".parquet, .jsonl or .txt files, instead of the download")
    parser.add_argument(
        "--val-share", type=float, default=0.0005, help="part of the documents for val (default: 0.0005)"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder (default: beside this script)")
    args = parser.parse_args()
    if min(args.workers, args.docs or 1) < 1:
        raise InputError("--workers and --docs count from 1 up")
    if missing := [path for path in args.input or [] if not path.is_file()]:
        raise InputError(f"{missing[0]} is no file: give .parquet, .jsonl or .txt files with --input")
    here = [{"source": str(path.resolve()), "size": path.stat().st_size} for path in args.input or []]
    shards = here or hub_shards()
    tokenizer = Tokenizer.gpt2()
    pieces: list[Path] = []
    counts = np.zeros(3, dtype=np.int64)  # documents, bytes of text in train, in val
    folder = args.out / "pieces"
    folder.mkdir(parents=True, exist_ok=True)
    spawn = multiprocessing.get_context("spawn")  # pyarrow's and tqdm's threads do not survive a fork
    with ProcessPoolExecutor(args.workers, spawn, start_worker) as pool:
        for number, shard in enumerate(shards):
            left = args.docs and args.docs - int(counts[0])
            if left == 0:
                break
            name = f"shard {number + 1} of {len(shards)} ({shard['source']})"
            facts = json.dumps(shard | {"docs": left, "val_share": args.val_share})
            piece = folder / f"{number:05}.npz"
            if piece.exists() and next(read_pieces([piece], "facts")) == facts:
                print(f"{name}: done before")
            else:
                path = download(shard, folder) if "revision" in shard else Path(shard["source"])
                texts = tqdm(islice(documents(path), left), name, unit=" documents", disable=None)
                try:
                    result = encode_all(texts, args.val_share, pool, 4 * args.workers)
                except BrokenProcessPool as error:
                    raise InputError(
                        "a worker was killed, most likely for memory: run again with fewer --workers"
                    ) from error
                with aside(piece) as partial, partial.open("wb") as file:
                    np.savez(file, facts=facts, **result)
                if "revision" in shard:
                    path.unlink()
            pieces.append(piece)
            counts += next(read_pieces([piece], "counts")).sum(axis=0)
    meta = write_dataset(
        args.out,
        {"train": read_pieces(pieces, "train"), "val": read_pieces(pieces, "val")},
        tokenizer,
        {"train": int(counts[1]), "val": int(counts[2])},
    )
    shutil.rmtree(folder)
    print(f"{args.out}: {counts[0]:,} documents\n{summary(meta)}")


if __name__ == "__main__":
    run_script(main)
