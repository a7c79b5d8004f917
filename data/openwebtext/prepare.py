"""OpenWebText in GPT-2's encoding: python data/openwebtext/prepare.py [--docs=N] [--input FILE ...] [--workers=N]

8,013,769 documents, about nine billion tokens, in 80 parquet shards that are fetched, checked, tokenized and deleted
one after the other. The ids of finished shards are kept in `pieces/`, so an interrupted run goes on with the next;
at the end they become the dataset. What is written does not depend on the number of workers.

Any other dataset of parquet files on the hub with a column `text`, such as ten billion tokens of FineWeb:
python data/openwebtext/prepare.py --repo=HuggingFaceFW/fineweb --under=sample/10BT --out=data/fineweb
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
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
from nanogpt.data import file_sha256, read_text, summary, write_dataset, writing
from nanogpt.tokenizer import Tokenizer, aside

Encoded = tuple[list[bytes], list[int]]  # uint16 ids of train and of val; documents, bytes of text in train, in val


def hub_shards(repo: str, under: str) -> list[dict[str, Any]]:
    """Name, commit and SHA-256 of each shard of `repo` on the Hugging Face hub whose path begins with `under`."""
    from huggingface_hub import HfApi

    try:
        for revision in ("main", "refs/convert/parquet"):
            found: Any = HfApi().dataset_info(repo, revision=revision, files_metadata=True)
            parquet = [file for file in found.siblings if file.rfilename.endswith(".parquet")]
            files = {file.rfilename: file.lfs for file in parquet if file.rfilename.startswith(under)}
            if files and not any("partial" in name for name in files):
                shard = {"repo": repo, "revision": found.sha}
                return [shard | {"source": name, "sha256": files[name].sha256} for name in sorted(files)]
    except Exception as error:  # the library's network errors have no class in common
        raise InputError(f"{repo} could not be listed ({error}): check the network, or give --input") from error
    raise InputError(f"{repo} has no whole set of parquet files under {under!r}: give --input")


def download(shard: dict[str, Any], folder: Path) -> Path:
    from huggingface_hub import hf_hub_download

    repo, name, revision = shard["repo"], shard["source"], shard["revision"]
    try:
        path = Path(hf_hub_download(repo, name, repo_type="dataset", revision=revision, local_dir=folder))
    except Exception as error:  # as above
        raise InputError(
            f"{name} could not be downloaded ({error}): run the command again to go on here; should commit {revision} "
            f"be gone from the hub, delete {folder} to begin anew"
        ) from error
    if file_sha256(path) != shard["sha256"]:
        path.unlink()
        raise InputError(f"{name} came damaged (its SHA-256 differs) and was deleted: run the command again")
    return path


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
            raise InputError(f"{path} is no whole parquet file with a column `text` ({error}): replace it") from error
    elif path.suffix == ".jsonl":
        with path.open("rb") as file:  # line by line: such files may be larger than memory
            for number, line in enumerate(file, 1):
                try:
                    text = line.strip() and json.loads(line)["text"]
                except (ValueError, TypeError, KeyError) as error:
                    raise InputError(f'{path}, line {number}: no JSON object with a "text"; correct it') from error
                if text:
                    yield str(text)
    else:
        yield read_text(path)


def encode(texts: list[str], val_share: float) -> Encoded:
    """A worker's job: the documents' ids, each in the split that its hash says, with an end of text after it."""
    import tiktoken

    encoding = tiktoken.get_encoding("gpt2")  # kept by the library after the first call
    ids: list[list[int]] = [[], []]  # train, val
    counts = [len(texts), 0, 0]
    for text in texts:
        raw = text.encode("utf-8", "surrogatepass")
        in_val = int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little") / 2**64 < val_share
        ids[in_val] += [*encoding.encode_ordinary(text), encoding.eot_token]
        counts[1 + in_val] += len(raw)
    return [np.array(part, dtype=np.uint16).tobytes() for part in ids], counts


def start_worker() -> None:
    """A worker leaves Ctrl-C to its parent, and ends when the parent does, killed or not."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()  # type: ignore[union-attr]


def encode_all(texts: Iterator[str], val_share: float, pool: ProcessPoolExecutor, ahead: int) -> Iterator[Encoded]:
    """The same of all of a shard's documents, in their order; no more than `ahead` jobs are under way."""
    waiting: deque[Future[Encoded]] = deque()
    while batch := list(islice(texts, 128)):
        waiting.append(pool.submit(encode, batch, val_share))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def read_ids(path: Path) -> Iterator[np.ndarray]:
    with path.open("rb") as file:
        while len(ids := np.fromfile(file, np.uint16, 1 << 22)):
            yield ids


def main() -> None:
    parser = argparse.ArgumentParser(description="Prepare OpenWebText, or documents of your own, in GPT-2's encoding.")
    parser.add_argument("--docs", type=int, default=sys.maxsize, help="take only so many documents (default: all)")
    parser.add_argument("--input", type=Path, nargs="+", help=".parquet, .jsonl or .txt files, instead of the download")
    parser.add_argument("--repo", default="Skylion007/openwebtext", help="a dataset on the hub (default: %(default)s)")
    parser.add_argument("--under", default="", help="take only its files whose path begins so")
    parser.add_argument("--val-share", type=float, default=0.0005, help="part of the documents for val")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder (default: beside this script)")
    args = parser.parse_args()
    if min(args.workers, args.docs) < 1 or not 0 < args.val_share < 1:
        raise InputError("--workers and --docs count from 1 up, and --val-share lies between 0 and 1")
    if missing := [path for path in args.input or [] if not (path.is_file() and os.access(path, os.R_OK))]:
        raise InputError(f"{missing[0]} is no file that can be read: give .parquet, .jsonl or .txt files with --input")
    tokenizer = Tokenizer.gpt2()
    here = [{"source": str(path.resolve()), "size": path.stat().st_size} for path in args.input or []]
    folder = args.out / "pieces"
    saved, train, val = (folder / name for name in ("state.json", "train.ids", "val.ids"))
    spawn = multiprocessing.get_context("spawn")  # pyarrow's and tqdm's threads do not survive a fork
    pool = ProcessPoolExecutor(args.workers, spawn, start_worker)
    with writing(folder), train.open("ab") as train_file, val.open("ab") as val_file, pool:
        files = train_file, val_file
        old: dict[str, Any] = json.loads(saved.read_text()) if saved.exists() else {"shards": [], "settings": []}
        settings = [args.docs, args.val_share, args.repo, args.under]
        # A continued run stays at the commit of the first, whatever the hub lists by now.
        listed = [shard for shard in old["shards"] if "revision" in shard and old["settings"][2:] == settings[2:]]
        shards = here or listed or hub_shards(args.repo, args.under)
        if old["settings"] == settings and old["shards"][: old["done"]] == shards[: old["done"]]:
            state = old | {"shards": shards}
            print(f"{old['done']} of {len(shards)} shards were done before")
        else:
            state = {"settings": settings, "shards": shards, "done": 0, "counts": [0, 0, 0], "sizes": [0, 0]}
            saved.unlink(missing_ok=True)  # before the ids that it describes go
        for file, size in zip(files, state["sizes"], strict=True):
            file.truncate(size)  # to where the last finished shard ended
            file.seek(size)
        for shard in shards[state["done"] :]:
            left = args.docs - state["counts"][0]
            if left == 0:
                break
            path = download(shard, folder) if "revision" in shard else Path(shard["source"])
            texts = tqdm(islice(documents(path), left), path.name, unit=" documents", disable=None)
            try:
                for encoded, counts in encode_all(texts, args.val_share, pool, 4 * args.workers):
                    state["counts"] = np.add(state["counts"], counts).tolist()
                    for file, ids in zip(files, encoded, strict=True):
                        file.write(ids)
            except BrokenProcessPool as error:
                raise InputError("a worker was killed, probably for memory: run again with fewer --workers") from error
            for file in files:
                file.flush()
                os.fsync(file.fileno())
            state |= {"done": state["done"] + 1, "sizes": [file.tell() for file in files]}
            with aside(saved) as partial:
                partial.write_text(json.dumps(state))
            if "revision" in shard:
                path.unlink()
    documents_read, train_bytes, val_bytes = state["counts"]
    splits = {"train": read_ids(train), "val": read_ids(val)}
    meta = write_dataset(args.out, splits, tokenizer, {"train": train_bytes, "val": val_bytes})
    shutil.rmtree(folder)
    print(f"{args.out}: {documents_read:,} documents\n{summary(meta)}")


if __name__ == "__main__":
    run_script(main)
