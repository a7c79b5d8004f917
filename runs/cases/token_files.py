"""Cases of token files: those of other programs, given as --dataset."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cases.command import Case, Result, run

TEXT = "".join(f"The {n}th line of a text whose length matters: {n * n}.\n" for n in range(300))
Write = Callable[[Path, np.ndarray], None]  # ids into a file named .bin


def write_llm_c(path: Path, ids: np.ndarray) -> None:
    path.write_bytes(struct.pack("<iii1012x", 20240520, 1, len(ids)) + ids.astype("<u2").tobytes())


def write_array(path: Path, ids: np.ndarray) -> None:
    np.save(path.with_suffix(".npy"), ids.astype("<u2"))
    path.with_suffix(".npy").rename(path)


def write_megatron(path: Path, ids: np.ndarray) -> None:
    """A single document."""
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 4, 1, 2)
    path.with_suffix(".idx").write_bytes(header + struct.pack("<iqqq", len(ids), 0, 0, 1))
    ids.astype("<i4").tofile(path)


def look(checkout: Path, folder: Path, write: Write, name: str = "{}.bin") -> tuple[Result, int]:
    """Write a prepared text's ids in another program's way, look at them: what is printed, and their number."""
    text, data = folder / "text.txt", folder / "data"
    text.write_text(TEXT)
    prepared = run(checkout, "data/prepare.py", f"--input={text}", "--tokenizer=byte", f"--out={data}")
    if prepared.status:
        return prepared, 0
    dtype = json.loads((data / "meta.json").read_text())["dtype"]
    (data / "meta.json").unlink()
    for split in ("train", "val"):
        ids = np.fromfile(data / f"{split}.bin", dtype)
        (data / f"{split}.bin").unlink()
        write(data / name.format(split), ids)
    return run(checkout, "data/look.py", str(data), "--split=val"), len(ids)


def is_read(write: Write, name: str = "{}.bin") -> Callable[[Path, Path], tuple[bool, str]]:
    def case(checkout: Path, folder: Path) -> tuple[bool, str]:
        result, tokens = look(checkout, folder, write, name)
        is_right = result.status == 0 and f"val: {tokens:,} tokens" in result.output
        seen = result.output.splitlines()[0] if result.status == 0 else result.last_line
        return is_right, f"{tokens:,} tokens; {seen.replace(str(folder), '…')}"

    return case


def is_noticed(dtype: str) -> Callable[[Path, Path], tuple[bool, str]]:
    def case(checkout: Path, folder: Path) -> tuple[bool, str]:
        result, tokens = look(checkout, folder, lambda path, ids: ids.astype(dtype).tofile(path))
        is_right = result.is_clear_error and f"--token_dtype={dtype}" in result.output
        seen = result.output.splitlines()[0] if result.status == 0 else result.last_line
        return is_right, f"{tokens:,} tokens; {seen.replace(str(folder), '…')}"

    return case


def cut_short(checkout: Path, folder: Path) -> tuple[bool, str]:
    text, data = folder / "text.txt", folder / "data"
    text.write_text(TEXT)
    run(checkout, "data/prepare.py", f"--input={text}", "--tokenizer=byte", f"--out={data}")
    with (data / "val.bin").open("r+b") as file:
        file.truncate(200)
    result = run(checkout, "data/look.py", str(data), "--split=val")
    return result.is_clear_error and "100 tokens" in result.output, result.last_line


CASES: dict[str, Case] = {
    "D1": Case("llm.c's .bin with a header, as train.bin", is_read(write_llm_c)),
    "D1b": Case("llm.c's .bin by its own name", is_read(write_llm_c, "tiny_shakespeare_{}.bin")),
    "D2": Case("NumPy's array renamed to train.bin", is_read(write_array)),
    "D2b": Case("build-nanogpt's .npy by its own name", is_read(write_array, "edufineweb_{}_000001.npy")),
    "D2c": Case("Megatron's .bin of int32 beside its .idx", is_read(write_megatron)),
    "D2d": Case("raw uint32 without meta.json", is_noticed("uint32")),
    "D2e": Case("raw int64 without meta.json", is_noticed("int64")),
    "D2f": Case("a file shorter than its meta.json says", cut_short),
}
