"""Cases of text: what becomes of odd files, and whether the program names what it leaves out."""

import bz2
import gzip
import io
import json
import lzma
import os
import signal
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np

from cases.command import Case, Result, run

SHARE = ("--val_share=0.4",)  # so that also a few documents are in both splits
SHORT = [f"Document {i}.\n" + "word " * (i % 7) for i in range(400)]


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts).encode()


def tar(members: dict[str, bytes], mode: str = "w") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def parquet(texts: list[str]) -> bytes:
    import pyarrow as pa
    from pyarrow.parquet import write_table

    file = io.BytesIO()
    write_table(pa.table({"text": texts}), file)
    return file.getvalue()


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def prepare(checkout: Path, folder: Path, *inputs: object, flags: tuple[str, ...] = (), **environment: str) -> Result:
    """Prepare in bytes, in folder/out."""
    names = [str(folder / str(name)) for name in inputs]
    arguments = ["--input", *names, f"--out={folder / 'out'}", "--workers=1", "--tokenizer=byte", *flags]
    return run(checkout, "data/prepare.py", *arguments, **environment)


def split_of(folder: Path, split: str) -> list[bytes]:
    """The documents of a split in bytes."""
    ids = np.concatenate([np.fromfile(path, np.uint16) for path in sorted((folder / "out").glob(f"{split}*.bin"))])
    documents = np.split(ids, np.flatnonzero(ids == 256) + 1)
    return [document[document < 256].astype(np.uint8).tobytes() for document in documents if len(document)]


def texts_of(folder: Path) -> list[str]:
    return sorted(text.decode() for split in ("train", "val") for text in split_of(folder, split))


def compare(folder: Path, result: Result, expected: list[str], name: str = "") -> tuple[bool, str]:
    """Right if the texts are these and the output holds a name, or if the program refuses with that name."""
    if result.status:
        return False, result.last_line
    texts = texts_of(folder)
    seen = f"{len(texts):,} of {len(expected):,} documents"
    if name:
        seen += f", and {name!r} is {'' if name in result.output else 'not '}named"
    return texts == sorted(expected) and name in result.output, seen


def cut_between_characters(checkout: Path, folder: Path) -> tuple[bool, str]:
    seen = []
    for text in ("й" * 101, "中" * 100 + "a"):
        write(folder, {"c.txt": text.encode()})
        flags = ("--tokenizer=char",)
        result = prepare(checkout, folder, "c.txt", flags=flags)
        if result.status:
            return False, result.last_line
        sizes = [(folder / f"out/{split}.bin").stat().st_size // 2 for split in ("train", "val")]
        seen.append(f"{sizes[0]} and {sizes[1]} of {len(text)} characters")
        if sum(sizes) != len(text):
            return False, seen[-1]
    return True, "; ".join(seen)


def members_with_a_dot(checkout: Path, folder: Path) -> tuple[bool, str]:
    write(folder, {"x.tar": tar({"./a.jsonl": lines(SHORT[:200])}), "y.zip": zipped({"./b.jsonl": lines(SHORT[200:])})})
    return compare(folder, prepare(checkout, folder, "x.tar", "y.zip"), SHORT)


def members_of_all_kinds(checkout: Path, folder: Path) -> tuple[bool, str]:
    members = {
        "a.jsonl": lines(SHORT[:80]),
        "b.ndjson": lines(SHORT[80:160]),
        "c.json.gz": gzip.compress(lines(SHORT[160:240])),
        "d.parquet": parquet(SHORT[240:320]),
        "e.tar.xz": lzma.compress(tar({"f.jsonl": lines(SHORT[320:])})),
        "g.png": b"\0",
    }
    seen = []
    for name, data in (("x.tar", tar(members)), ("x.zip", zipped(members))):
        write(folder, {name: data})
        is_right, what = compare(folder, prepare(checkout, folder, name, flags=SHARE), SHORT, "g.png")
        if not is_right:
            return False, f"{name}: {what}"
        seen.append(f"{name}: {what}")
    return True, "; ".join(seen)


def json_by_content(checkout: Path, folder: Path) -> tuple[bool, str]:
    files = {
        "a.json": lines(SHORT[:100]),
        "b.ndjson": lines(SHORT[100:200]),
        "c.json.gz": gzip.compress(lines(SHORT[200:300])),
        "d.json": json.dumps([{"text": text} for text in SHORT[300:]], indent=2).encode(),
    }
    write(folder, files)
    return compare(folder, prepare(checkout, folder, *files, flags=SHARE), SHORT)


def end_of_text_in_a_text(checkout: Path, folder: Path) -> tuple[bool, str]:
    write(folder, {"a.txt": "<|endoftext|>".join(SHORT).encode()})
    by_default = prepare(checkout, folder, "a.txt")
    if by_default.status or "--document_separator" not in by_default.output:
        return False, "ordinary tokens without a word"
    result = prepare(checkout, folder, "a.txt", flags=("--document_separator=<|endoftext|>",))
    return compare(folder, result, SHORT, "ends of documents: 399;")


def compressed_in_unusual_ways(checkout: Path, folder: Path) -> tuple[bool, str]:
    import zstandard

    settings = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True, write_content_size=False)
    compressor = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    write(folder, {"a.jsonl.zst": compressor.compress(lines(SHORT[:100])) + compressor.flush()})
    padded = lzma.compress(lines(SHORT[100:200])) + bytes(8) + lzma.compress(lines(SHORT[200:]))
    write(folder, {"b.jsonl.xz": padded})
    is_right, seen = compare(folder, prepare(checkout, folder, "a.jsonl.zst", "b.jsonl.xz"), SHORT)
    if not is_right:
        return False, seen
    write(folder, {"b.jsonl.xz": padded[:-9]})
    result = prepare(checkout, folder, "b.jsonl.xz")
    return result.is_clear_error and "b.jsonl.xz" in result.output, f"{seen}; when cut: {result.last_line}"


def names_in_latin_1(checkout: Path, folder: Path) -> tuple[bool, str]:
    for i, text in enumerate(SHORT[:300]):
        with open(os.fsencode(folder / "in") + f"-{i}-gr\xf6\xdfe.txt".encode("latin-1"), "wb") as file:
            file.write(text.encode() + b"\xe9")
    (folder / "in").mkdir()
    for path in list(folder.iterdir()):
        if path.is_file():
            path.rename(folder / "in" / path.name)
    # As with most languages of a shell; in its own "C" Python is more tolerant.
    result = prepare(checkout, folder, "in", PYTHONIOENCODING="utf-8:strict")
    return compare(folder, result, [text + "\ufffd" for text in SHORT[:300]], ": 300;")


def links_and_spellings(checkout: Path, folder: Path) -> tuple[bool, str]:
    write(folder, {"in/a.jsonl": lines(SHORT[:100]), "in/sub/b.jsonl": lines(SHORT[100:200])})
    write(folder, {"else/c.jsonl": lines(SHORT[200:])})
    (folder / "in/link").symlink_to(folder / "else")
    is_right, seen = compare(folder, prepare(checkout, folder, "in/*", "in/../in"), SHORT)
    return is_right, f"a glob and the same folder: {seen}"


def shares_of_few(checkout: Path, folder: Path) -> tuple[bool, str]:
    write(folder, {"one.txt": ("word " * 2000).encode()})
    result = prepare(checkout, folder, "one.txt", flags=("--val_share=0.05",))
    if result.status:
        return False, result.last_line
    share = sum(map(len, split_of(folder, "val"))) / 10_000
    write(folder, {f"ten/{i}.txt": text.encode() for i, text in enumerate(SHORT[:10])})
    result = prepare(checkout, folder, "ten")
    if result.status:
        return False, result.last_line
    counts = [len(split_of(folder, split)) for split in ("train", "val")]
    return share == 0.05 and counts == [9, 1], f"{share:.3f} of one text; {counts[0]} and {counts[1]} of ten documents"


def reading_of_text(checkout: Path, folder: Path) -> tuple[bool, str]:
    write(folder, {"a.txt": ("word\n" * 2000).encode()})
    flags = ("--tokenizer=char",)
    prepare(checkout, folder, "a.txt", flags=flags)
    size = ("--n_layer=1", "--n_head=1", "--n_embd=16", "--block_size=16", "--batch_size=8", "--max_iters=2")
    quiet = (
        "--eval_interval=2",
        "--eval_iters=1",
        "--device=cpu",
        "--compile=False",
        "--gradient_accumulation_steps=1",
    )
    out = f"--out_dir={folder / 'run'}"
    run(checkout, "train.py", f"--dataset={folder / 'out'}", out, *size, *quiet)
    write(folder, {"prompt.txt": b"\xef\xbb\xbfword\r\n"})
    write(folder, {"plain.txt": b"word\nword\n" * 9, "windows.txt": b"\xef\xbb\xbf" + b"word\r\nword\r\n" * 9})
    outputs = []
    for name in ("plain", "windows"):
        result = run(checkout, "evaluate.py", out, f"--text={folder / name}.txt", "--device=cpu")
        if result.status:
            return False, result.last_line
        outputs.append(next(line for line in result.output.splitlines() if line.startswith("bits per byte")))
    sample = run(
        checkout, "sample.py", out, f"--start=FILE:{folder / 'prompt.txt'}", "--num_samples=1", "--max_new_tokens=1"
    )
    is_right = outputs[0] == outputs[1] and sample.status == 0
    return is_right, f"{outputs[0]}; with a byte order mark and CRLF {outputs[1]}; sample.py: status {sample.status}"


KILL = """
import os, runpy, sys
replace = os.replace
def kill_before_the_last(old, new):
    if os.path.basename(new) == "meta.json" and "preparing" not in str(new):
        os.kill(os.getpid(), 9)
    replace(old, new)
os.replace = kill_before_the_last
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def killed_before_its_last_rename(checkout: Path, folder: Path) -> tuple[bool, str]:
    rows = [json.dumps({"prompt": text, "completion": "Yes."}) for text in SHORT]
    write(folder, {"talks.jsonl": "\n".join(rows).encode(), "kill.py": KILL.encode()})
    script = str(checkout / "data/prepare.py")
    flags = ["--input", str(folder / "talks.jsonl"), f"--out={folder / 'out'}", "--chat=True", "--tokenizer=byte"]
    command = [sys.executable, str(folder / "kill.py"), script, *flags, "--workers=1"]
    killed = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(checkout)}, capture_output=True)
    result = run(checkout, "data/look.py", str(folder / "out"))
    is_right = killed.returncode == -signal.SIGKILL and result.is_clear_error and "prepar" in result.last_line
    return is_right, f"killed: {killed.returncode}; then look.py: {result.last_line}"


def other_names_and_encodings(checkout: Path, folder: Path) -> tuple[bool, str]:
    text = "word\n" * 400
    inputs = {
        "a.txt.bz2": bz2.compress(text.encode()),
        "enwik8.zip": zipped({"enwik8": text.encode()}),
        "in/wiki.raw": text.encode(),
        "in16/utf16.txt": text.encode("utf-16"),
    }
    write(folder, inputs)
    for name in ("a.txt.bz2", "enwik8.zip", "in", "in16"):
        result = prepare(checkout, folder, name)
        if result.status:
            return False, result.last_line
        train, val = (b"".join(split_of(folder, split)).decode() for split in ("train", "val"))
        if train + val != text:
            return False, f"{name}: other text"
    return True, "a.txt.bz2, a member without suffix, .raw and UTF-16 are read"


CASES = {
    "T1": Case("one text in Cyrillic, one in Chinese", cut_between_characters),
    "T2": Case("members of archives called ./a.jsonl", members_with_a_dot),
    "T3": Case("an archive with members of all kinds", members_of_all_kinds),
    "T4": Case("JSON lines called .json, .ndjson, .json.gz; a JSON array", json_by_content),
    "T8": Case("stories in one text with <|endoftext|> between them", end_of_text_in_a_text),
    "T10a": Case("zstd --long=31; xz with stream padding; the same cut short", compressed_in_unusual_ways),
    "T10b": Case("names of files in Latin-1, with invalid bytes inside", names_in_latin_1),
    "T11": Case("a linked subfolder, a quoted glob, a folder by two spellings", links_and_spellings),
    "T12": Case("--val_share of one text; ten small files", shares_of_few),
    "T13": Case("evaluate.py --text and sample.py --start with BOM and CRLF", reading_of_text),
    "T14": Case("conversations, killed before the last rename", killed_before_its_last_rename),
    "T15": Case(".bz2, enwik8.zip, .raw, UTF-16", other_names_and_encodings),
}
