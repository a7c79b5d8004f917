"""Text to GPT-2's tokens: data/prepare.py beside nanoGPT's way, and the ids beside those of other libraries.

    pip install -e ".[dev]" psutil
    python runs/prepare/measure.py --books=books.tar.xz --work=FOLDER --to=runs/prepare/speed.json
    python runs/prepare/measure.py --books=books.tar.xz --work=FOLDER --identical --to=runs/prepare/identical.json
    python runs/prepare/measure.py --books=books.tar.xz --work=FOLDER --kills=20 --to=runs/prepare/kills.json
    python runs/prepare/measure.py --books=books.tar.xz --work=FOLDER --rows --to=runs/prepare/rows.json

The last command cuts the books into documents of 4,000 characters in parquet files, like web text, and times both
scripts that read them: data/prepare.py and, by datatrove's tasks, data/fineweb/prepare.py.

nanoGPT's way: Hugging Face datasets loads the same documents, `map` encodes them with tiktoken in the same number of
processes, and the ids go piece by piece to a memory map. It gets the books unpacked, and its seconds are listed with
and without loading. Ours reads the archive itself; `unpacking` (tar -xJf, to disk) is what theirs needs before.
`tiktoken` is the encoding alone, of documents in memory, with one thread per worker: no program that encodes with it
can be faster. Each side is its own process, they take turns, and the memory is the peak of all processes of a side
(PSS), measured in a first round whose seconds do not count, because measuring slows them.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "runs/shakespeare_char_cpu")]

from compare_with_nanogpt import machine  # noqa: E402

from nanogpt.text.reading import hash_fraction  # noqa: E402

VAL_SHARE = 0.01


def ours(books: Path, out: Path, workers: int, *flags: str) -> list[str]:
    script = [sys.executable, str(ROOT / "data/prepare.py"), f"--input={books}", f"--out={out}", "--tokenizer=gpt2"]
    return [*script, f"--workers={workers}", f"--val_share={VAL_SHARE}", *flags]


def by_datasets(folder: Path, out: Path, workers: int) -> None:
    import datasets
    import tiktoken

    began = time.perf_counter()
    encoding = tiktoken.get_encoding("gpt2")
    datasets.config.HF_DATASETS_CACHE = out / "cache"
    files = [str(path) for path in sorted(folder.rglob("*")) if path.is_file()]
    texts = datasets.load_dataset(
        "text", data_files=files, sample_by="document", split="train", cache_dir=str(out / "cache")
    )
    loaded = time.perf_counter() - began
    parts = texts.train_test_split(test_size=VAL_SHARE, seed=1)

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        ids = [*encoding.encode_ordinary(row["text"]), encoding.eot_token]
        return {"ids": ids, "n": len(ids)}

    encoded = parts.map(encode, remove_columns=["text"], num_proc=workers)
    for name, part in encoded.items():
        file = np.memmap(out / f"{name}.bin", dtype=np.uint16, mode="w+", shape=(sum(part["n"]),))
        at, pieces = 0, min(1024, len(part))
        for k in range(pieces):
            rows = part.shard(num_shards=pieces, index=k, contiguous=True).with_format("numpy")
            ids = np.concatenate(rows["ids"][:])
            file[at : at + len(ids)] = ids
            at += len(ids)
        file.flush()
    print(json.dumps({"loading_s": loaded, "total_s": time.perf_counter() - began}))


def by_tiktoken(folder: Path, workers: int) -> None:
    import tiktoken

    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*")) if path.is_file()]
    encoding = tiktoken.get_encoding("gpt2")
    encoding.encode_ordinary("warm")
    began = time.perf_counter()
    count = sum(map(len, encoding.encode_ordinary_batch(texts, num_threads=workers)))
    print(json.dumps({"total_s": time.perf_counter() - began, "tokens": count}))


def time_command(command: list[str], measure_memory: bool = False) -> tuple[float, float, str]:
    """Seconds, the peak memory in MB of the process and its children (if `measure_memory`), and the output."""
    import psutil

    began = time.perf_counter()
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        family = psutil.Process(process.pid)
        while measure_memory and process.poll() is None:
            try:
                members = [family, *family.children(recursive=True)]
                peak = max(peak, sum(member.memory_full_info().pss for member in members))
            except psutil.Error:
                pass
            time.sleep(0.1)
        assert process.stdout is not None
        output = process.stdout.read()
        process.wait()
        seconds = time.perf_counter() - began
    assert process.returncode == 0, (command, output)
    return seconds, peak / 1e6, output


def speed(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    rounds: list[dict[str, Any]] = []
    me = [sys.executable, __file__, f"--workers={args.workers}", f"--work={args.work}"]
    for k in range(args.rounds + 1):
        figures: dict[str, Any] = {}
        out = args.work / "ours"
        shutil.rmtree(out, ignore_errors=True)
        figures["ours_s"], figures["ours_mb"], _ = time_command(
            ours(args.books, out, args.workers), measure_memory=not k
        )
        out = args.work / "theirs"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        _, figures["datasets_mb"], output = time_command([*me, "--side=datasets"], measure_memory=not k)
        parts = json.loads(output.splitlines()[-1])
        figures |= {"datasets_s": parts["total_s"], "datasets_loading_s": parts["loading_s"]}
        figures["tiktoken_s"] = json.loads(time_command([*me, "--side=tiktoken"])[2].splitlines()[-1])["total_s"]
        began = time.perf_counter()
        shutil.rmtree(args.work / "again", ignore_errors=True)
        (args.work / "again").mkdir()
        subprocess.run(["tar", "-xJf", str(args.books), "-C", str(args.work / "again")], check=True)
        figures["unpacking_s"] = time.perf_counter() - began
        print(figures, flush=True)
        rounds.append(figures)
    watched, *rounds = rounds

    def ratio(slow: str, fast: str, more: float = 0, name: str = "datasets_loading_s") -> float:
        return statistics.median((one[slow] + more * one[name]) / one[fast] for one in rounds)

    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {
        "workers": args.workers,
        "bytes_of_text": size,
        "datasets_over_ours": ratio("datasets_s", "ours_s"),
        "unpacking_and_datasets_over_ours": ratio("datasets_s", "ours_s", 1, "unpacking_s"),
        "datasets_without_loading_over_ours": ratio("datasets_s", "ours_s", -1),
        "ours_over_tiktoken": ratio("ours_s", "tiktoken_s"),
        "ours_mb": watched["ours_mb"],
        "datasets_mb": watched["datasets_mb"],
        "rounds": [{name: s for name, s in one.items() if not name.endswith("_mb")} for one in rounds],
    }


def rows(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Tokens a second from parquet files."""
    import pyarrow
    import pyarrow.parquet

    source = args.work / "parquet"
    if not source.exists():
        source.mkdir()
        text = "".join(path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*")) if path.is_file())
        texts = [text[i : i + 4000] for i in range(0, len(text), 4000)]
        for k in range(4):
            part = texts[k::4]
            table = pyarrow.table({"text": part, "id": list(map(str, range(len(part))))})
            pyarrow.parquet.write_table(table, source / f"{k}.parquet", compression="zstd")
    script = [sys.executable, str(ROOT / "data/fineweb/prepare.py"), f"--input={source}", "--tasks=4"]
    speeds: dict[str, list[float]] = {"data/prepare.py": [], "data/fineweb/prepare.py": []}
    for _ in range(args.rounds):
        for name, samples in speeds.items():
            out = args.work / "ours"
            shutil.rmtree(out, ignore_errors=True)
            by_tasks = [*script, f"--out={out}", f"--workers={args.workers}", f"--val_share={VAL_SHARE}"]
            command = by_tasks if "fineweb" in name else ours(source, out, args.workers)
            seconds, _, _ = time_command(command)
            splits = json.loads((out / "meta.json").read_text())["splits"]
            samples.append(sum(part["tokens"] for part in splits.values()) / seconds / 1e6)
    return {"workers": args.workers, "million_tokens_per_s": {n: statistics.median(s) for n, s in speeds.items()}}


def identical(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Compare the files with what tiktoken and transformers make of the same documents."""
    import tiktoken
    import transformers

    out = args.work / "ours"
    if not (out / "meta.json").exists():
        subprocess.run(ours(args.books, out, args.workers), check=True)
    encoding = tiktoken.get_encoding("gpt2")
    theirs = transformers.GPT2TokenizerFast.from_pretrained(write_gpt2(encoding, args.work / "gpt2"))
    transformers.logging.set_verbosity_error()  # about texts longer than a context
    documents = []
    with tarfile.open(args.books) as archive:  # in its order, which is that of the documents
        for member in archive:
            if member.isfile() and member.name.endswith((".txt", ".md")):
                raw = archive.extractfile(member).read()  # type: ignore[union-attr]
                documents.append(raw.replace(b"\r\n", b"\n").replace(b"\r", b"\n"))
    report: dict[str, Any] = {"documents": len(documents), "bytes": sum(map(len, documents))}
    for split in ("train", "val"):
        ids, at = np.fromfile(out / f"{split}.bin", np.uint16), 0
        for raw in documents:
            if (hash_fraction(raw) < VAL_SHARE) == (split == "val"):
                text = raw.decode()
                expected = [*encoding.encode_ordinary(text), encoding.eot_token]
                assert ids[at : at + len(expected)].tolist() == expected, f"tiktoken differs in {split} from {at}"
                assert theirs(text)["input_ids"] == expected[:-1], f"transformers differs in {split} from {at}"
                at += len(expected)
        assert at == len(ids), (split, at, len(ids))
        report[f"{split}_tokens_equal_to_tiktoken_and_transformers"] = at
    return report


def write_gpt2(encoding: Any, folder: Path) -> Path:
    """GPT-2's vocab.json and merges.txt, as transformers reads them, from OpenAI's own files in tiktoken's cache."""
    folder.mkdir(exist_ok=True)
    cache = Path(os.environ["TIKTOKEN_CACHE_DIR"])
    for path in cache.iterdir():
        name = "vocab.json" if path.read_bytes()[:1] == b"{" else "merges.txt"
        shutil.copyfile(path, folder / name)
    return folder


def kills(args: argparse.Namespace) -> dict[str, Any]:
    """For each number of workers, kill preparations at random instants and resume them; one that ends starts again."""
    small = ["--shard_tokens=3000000"]
    whole = args.work / "whole"
    shutil.rmtree(whole, ignore_errors=True)
    began = time.perf_counter()
    subprocess.run(ours(args.books, whole, args.workers, *small), check=True, stderr=subprocess.DEVNULL)
    seconds = time.perf_counter() - began
    expected, report = hashes(whole), {"undisturbed_s": seconds, "files": len(hashes(whole))}
    for workers in (1, 2, 4):
        chance, killed, ended, instants = random.Random(workers), 0, 0, []
        out = args.work / f"killed{workers}"
        shutil.rmtree(out, ignore_errors=True)
        while killed < args.kills:
            command = ours(args.books, out, workers, *small)
            with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
                try:
                    process.wait(instant := chance.uniform(0.1, seconds))
                    assert process.returncode == 0
                    ended += 1
                    assert hashes(out) == expected, f"{workers} workers: another output"
                    shutil.rmtree(out)
                except subprocess.TimeoutExpired:
                    process.kill()
                    killed += 1
                    instants.append(round(instant, 2))
        subprocess.run(ours(args.books, out, workers, *small), check=True, stderr=subprocess.DEVNULL)
        assert hashes(out) == expected, f"{workers} workers: another output"
        report[f"{workers}_workers"] = {"kills": killed, "outputs_equal": ended + 1, "killed_after_s": instants}
        print(report, flush=True)
        shutil.rmtree(out)
    return report


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--identical", action="store_true")
    parser.add_argument("--rows", action="store_true")
    parser.add_argument("--kills", type=int)
    parser.add_argument("--side", choices=("datasets", "tiktoken"))
    parser.add_argument("--to", type=Path)
    args = parser.parse_args()
    folder = args.work / "unpacked"
    if args.side == "datasets":
        by_datasets(folder, args.work / "theirs", args.workers)
        return
    if args.side == "tiktoken":
        by_tiktoken(folder, args.workers)
        return
    if not folder.exists():
        with tarfile.open(args.books) as archive:
            archive.extractall(folder, filter="data")
    report = (
        kills(args)
        if args.kills
        else identical(args, folder)
        if args.identical
        else rows(args, folder)
        if args.rows
        else speed(args, folder)
    )
    command = [arg for arg in sys.argv[1:] if not arg.startswith(("--books", "--work"))]
    about = {"command": " ".join(["python runs/prepare/measure.py --books=books.tar.xz --work=FOLDER", *command])}
    text = json.dumps(about | {"machine": machine()} | report, indent=1) + "\n"
    print(text)
    if args.to:
        args.to.write_text(text)


if __name__ == "__main__":
    main()
